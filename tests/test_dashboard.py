import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from language_model.training.schedule import warmup_cosine


def events_of(run) -> EventAccumulator:
    events = EventAccumulator(
        str(run.folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0}
    )
    events.Reload()
    return events


@pytest.fixture
def poem(tmp_path) -> str:
    (tmp_path / "poem.txt").write_text("Shall I compare thee to a summer's day?\n" * 150)
    return f"data.path={tmp_path / 'poem.txt'}"


def test_tensorboard_shows_losses_over_tokens_the_schedule_and_samples(train, poem: str) -> None:
    tiny = train("data=text", poem)
    events = events_of(tiny)
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "lr", "train/grad_norm", "schedule/lr", "tokens_seen/val/loss"} <= scalars
    assert "hp_metric" not in scalars
    tokens = 32 * 16  # of a step
    assert [e.step for e in events.Scalars("tokens_seen/train/loss")] == [n * tokens for n in (4, 8, 12, 16)]
    assert [e.value for e in events.Scalars("tokens_seen/train/loss")] == [
        e.value for e in events.Scalars("train/loss")
    ]
    assert [e.step for e in events.Scalars("tokens_seen/val/loss")] == [8 * tokens, 16 * tokens]
    planned = {e.step: e.value for e in events.Scalars("schedule/lr")}
    settings = tiny.config["schedule"]
    assert planned == {
        step: pytest.approx(warmup_cosine(step, settings["lr"], 16, settings["warmup_steps"], settings["min_lr"]))
        for step in range(16)
    }
    samples = events.Tensors("sample/text_summary")
    assert [e.step for e in samples] == [8, 16, 16]  # each validation, and the end
    assert samples[-1].tensor_proto.string_val[0].decode().startswith("```\nShall I")


def test_the_charts_hold_several_metrics(train) -> None:
    events = events_of(train())
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts["loss"] == ["^train/loss$", "^val/loss$"]
    assert charts["learning rate and gradient norm"] == ["^lr$", "^train/grad_norm$"]


def test_histograms_are_an_option(train) -> None:
    assert events_of(train()).Tags()["histograms"] == []
    with_them = events_of(train("callbacks.dashboard.histograms_every_n_steps=8", name="histograms"))
    found = with_them.Tags()["histograms"]
    assert found
    assert {tag.partition("/")[2] for tag in found if tag.startswith("weights/")} == {
        tag.partition("/")[2] for tag in found if tag.startswith("gradients/")
    }
    assert [e.step for e in with_them.Histograms(found[0])] == [8, 16]


def test_a_resumed_run_draws_its_schedule_once(train) -> None:
    train("callbacks.last.every_n_steps=8", "trainer.max_epochs=1")
    events = events_of(train("callbacks.last.every_n_steps=8", "trainer.max_epochs=2", "total_steps=16"))
    assert len(events.Scalars("schedule/lr")) == 8
    # two files of one second come in any order
    assert sorted(e.step for e in events.Scalars("tokens_seen/train/loss")) == [n * 512 for n in (4, 8, 12, 16)]
