from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from language_model.training.module import LanguageModel
from language_model.training.schedule import warmup_cosine


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    return events


@pytest.fixture
def poem(tmp_path) -> str:
    (tmp_path / "poem.txt").write_text("Shall I compare thee to a summer's day?\n" * 150)
    return f"data.path={tmp_path / 'poem.txt'}"


def test_tensorboard_shows_losses_over_tokens_the_schedule_and_samples(train, poem: str) -> None:
    tiny = train("data=text", poem, "callbacks.sample.every_n_steps=8")
    events = events_of(tiny.folder)
    scalars = set(events.Tags()["scalars"])
    assert {"watch/lr", "watch/grad_norm", "watch/lr_planned", "x_axis_tokens/val/loss"} <= scalars
    assert not scalars & {"hp_metric", "epoch", "lr"}
    groups = sorted({tag.split("/")[0] for tag in scalars})  # TensorBoard opens the first two
    assert groups == ["train", "val", "watch", "x_axis_tokens"]
    assert sorted(tag for tag in scalars if tag.startswith("train/")) == ["train/loss", "train/loss_epoch"]
    tokens = 32 * 16  # of a step
    by_tokens = events.Scalars("x_axis_tokens/train/loss")
    assert [e.step for e in by_tokens] == [n * tokens for n in (4, 8, 12, 16)]
    assert [e.value for e in by_tokens] == [e.value for e in events.Scalars("train/loss")]
    assert [e.step for e in events.Scalars("x_axis_tokens/val/loss")] == [8 * tokens, 16 * tokens]
    planned = {e.step: e.value for e in events.Scalars("watch/lr_planned")}
    settings = tiny.config["schedule"]
    assert planned == {
        step: pytest.approx(warmup_cosine(step, settings["lr"], 16, settings["warmup_steps"], settings["min_lr"]))
        for step in range(16)
    }
    samples = events.Tensors("sample/text_summary")
    assert [e.step for e in samples] == [8, 16, 16]  # every eight steps, and the end
    assert samples[-1].tensor_proto.string_val[0].decode().startswith("```\nShall I")


def test_each_chart_holds_one_line_for_each_run(train) -> None:
    events = events_of(train().folder)
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts["training loss"] == ["^train/loss$"]
    assert charts["validation loss"] == ["^val/loss$"]
    assert charts["learning rate, planned and actual"] == ["^watch/lr_planned$", "^watch/lr$"]
    assert charts["gradient norm"] == ["^watch/grad_norm$"]


def test_histograms_are_an_option(train) -> None:
    assert events_of(train().folder).Tags()["histograms"] == []
    with_them = events_of(train("callbacks.dashboard.histograms_every_n_steps=8", name="histograms").folder)
    found = with_them.Tags()["histograms"]
    assert found
    assert {tag.partition("/")[2] for tag in found if tag.startswith("weights/")} == {
        tag.partition("/")[2] for tag in found if tag.startswith("weights_grad/")
    }
    assert [e.step for e in with_them.Histograms(found[0])] == [8, 16]


def test_a_resumed_run_draws_its_schedule_once(train) -> None:
    train("callbacks.last.every_n_steps=8", "trainer.max_epochs=1")
    events = events_of(train("callbacks.last.every_n_steps=8", "trainer.max_epochs=2", "total_steps=16").folder)
    assert len(events.Scalars("watch/lr_planned")) == 8
    # two files of one second come in any order
    assert sorted(e.step for e in events.Scalars("x_axis_tokens/train/loss")) == [n * 512 for n in (4, 8, 12, 16)]


def hparams_of(folder: Path) -> dict[str, object]:
    content = events_of(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    row = parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in row.items()}


def test_hparams_lists_the_settings_that_are_tuned(train, poem: str) -> None:
    run = train("data=text", poem)
    row = hparams_of(run.folder)
    assert row["Best val/loss"] == pytest.approx(run.result["best"])
    assert row["Status"] == "finished"
    assert row["data"] == "poem.txt"
    assert row["model.d_model"] == 16
    assert row["optimizer.betas"] == "[0.9, 0.999]"
    assert not row.keys() & {"data.encoding", "data.cache", "data.seed", "trainer.benchmark", "model._target_"}
    # with a list of columns in one run, TensorBoard would neither look for those of others nor for what differs
    assert "_hparams_/experiment" not in events_of(run.folder).summary_metadata


def test_a_run_that_ends_inside_its_first_epoch_is_listed_and_says_what_its_loss_is(train) -> None:
    """It has no mean of an epoch, so nothing to choose a best checkpoint by."""
    run = train("trainer.max_steps=5", "trainer.max_epochs=-1")
    row = hparams_of(run.folder)
    assert row["Status"] == "finished"
    assert row["model.d_model"] == 16
    assert not any(name.startswith("Best") for name in row)
    assert "train/loss_epoch" not in run.result["metrics"]
    assert "best" not in run.result
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {"last.ckpt"}
    assert run.result["unfinished_epoch"]["steps"] == 5
    loss = run.result["unfinished_epoch"]["loss"]
    assert f"final    training loss {loss:.4f} (mean over the last 5 steps of an unfinished epoch); " in run.output
    assert "best     none is saved: train/loss_epoch was not logged; last.ckpt holds the last weights" in run.output
    assert "could not find" not in run.output
    assert "warning" not in run.output.lower()


def test_hparams_lists_runs_that_failed_or_have_no_best(train, monkeypatch, tmp_path: Path) -> None:
    without = hparams_of(train("callbacks.best=null", "callbacks.restore_best=null", name="without").folder)
    assert without["Status"] == "finished"
    assert not any(name.startswith("Best") for name in without)

    def crash(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LanguageModel, "training_step", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(name="failed")
    assert hparams_of(tmp_path / "failed")["Status"] == "failed"
