"""The monitored metric: any that is logged, lower or higher better, the same for all parts that read it."""

from pathlib import Path

import pytest
from conftest import ACCURACY, TINY

import language_model
from language_model.runs.config import ConfigError
from language_model.runs.monitor import known_mode

OWN = "+callbacks.own._target_=conftest.Accuracy"
TEXT = ["data=text", "data.batch_size=4"]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """Overrides for a text with a validation split."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 30)
    return [*TEXT, f"data.path={tmp_path / 'text.txt'}"]


def test_a_metric_is_added_by_logging_it(train) -> None:
    run = train(*ACCURACY, "callbacks.early_stopping.patience=1")
    assert run.column("train/accuracy") == pytest.approx([0.8, 1.6])  # both epochs: it has improved
    assert run.config["monitor_mode"] == run.result["monitor_mode"] == "max"
    assert run.config["callbacks"]["best"]["mode"] == run.config["callbacks"]["early_stopping"]["mode"] == "max"
    assert run.result["monitor"] == "train/accuracy"
    assert run.result["best"] == pytest.approx(1.6)
    assert run.checkpoint("best")["global_step"] == 16
    assert ", train/accuracy 1.6000; uniform baseline" in run.output


def test_the_lowest_is_kept_where_that_is_the_mode(train) -> None:
    run = train(OWN, "monitor=train/accuracy", "monitor_mode=min", "callbacks.early_stopping.patience=1")
    assert run.checkpoint("best")["global_step"] == 8
    assert "stopped_early" in run.result


def test_a_metric_of_one_callback_has_the_mode_that_its_name_says(tmp_path: Path) -> None:
    run = language_model.plan(*TINY, OWN, f"folder={tmp_path / 'run'}", "callbacks.best.monitor=train/accuracy")
    assert (run.config.monitor_mode, run.config.callbacks.best.mode) == ("min", "max")
    assert run.config.callbacks.early_stopping.mode == "min"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"), ("val/perplexity", "min"), ("val/bits_per_byte", "min"), ("train/loss_epoch", "min"),
        ("val/error_rate", "min"), ("val/accuracy", "max"), ("val/f1", None),
    ],
)  # fmt: skip
def test_what_is_better_is_known_by_the_name(metric: str, mode: str | None) -> None:
    assert known_mode(metric) == mode


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["monitor=train/los_epoch"],
            "monitor=train/los_epoch: no callback logs it; .*; did you mean train/loss_epoch?",
        ),
        (["monitor=val/loss"], "monitor=val/loss: no callback logs it; .*; known: train/loss_epoch"),
        (["monitor=val/accuracy", OWN], "monitor=val/accuracy: no callback logs it"),  # there is no validation
        (["monitor=accuracy", OWN], "monitor=accuracy: no callback logs it; a callback of your own can, as train/..."),
        (["callbacks.best.monitor=abc"], "callbacks.best.monitor=abc: no callback logs it"),
        (["callbacks.early_stopping.monitor=abc"], "callbacks.early_stopping.monitor=abc: no callback logs it"),
        (["callbacks.pruning.monitor=abc"], "callbacks.pruning.monitor=abc: no callback logs it"),
        (["callbacks.best.monitor=null"], "callbacks.best.monitor=null: a metric is needed"),
        (["monitor=train/f1", OWN], "monitor_mode: whether a lower or a higher train/f1 is better is not known; type"),
        (["callbacks.best.monitor=train/f1", OWN], "callbacks.best.mode: whether a lower or a higher train/f1"),
        (["monitor_mode=max"], "monitor_mode=max: a lower train/loss_epoch is better; allowed: min, null"),
        (["callbacks.best.mode=max"], "callbacks.best.mode=max: a lower train/loss_epoch is better"),
        (["monitor_mode=most"], "monitor_mode=most: "),
    ],
)
def test_what_cannot_be_monitored_is_refused(tmp_path: Path, overrides: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=found.replace("?", r"\?")) as error:
        language_model.plan(*TINY, f"folder={tmp_path / 'run'}", *overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["monitor=train/f1", "monitor_mode=max"],
            "monitor=train/f1: not logged by the end of the first epoch; logged: ",
        ),
        (
            ["monitor=val/f1", "monitor_mode=max"],
            "monitor=val/f1: not logged by the end of the first validation; logged: ",
        ),
        (
            ["callbacks.early_stopping.monitor=val/accuracy"],
            "callbacks.early_stopping.monitor=val/accuracy: not logged by the end of the first validation; logged: ",
        ),
    ],
)
def test_a_metric_that_is_not_logged_ends_the_run(
    train, text: list[str], capsys: pytest.CaptureFixture, overrides: list[str], found: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(OWN, *text, *overrides)
    assert str(stopped.value).startswith(f"error: {found}")
    assert "train/loss" in str(stopped.value)
    assert "not logged by the end" not in capsys.readouterr().out  # said once
    assert "\n" not in str(stopped.value)


def test_a_training_metric_with_validations_inside_an_epoch(train, text: list[str]) -> None:
    """It is looked at when it is logged, not at each validation: two epochs, of which the second is better."""
    overrides = ["trainer.val_check_interval=2", "callbacks.early_stopping.patience=1"]
    run = train(*text, *ACCURACY, *overrides)
    assert run.result["best"] == pytest.approx(1.6)
    assert run.checkpoint("best")["global_step"] == run.result["steps"] == 16
    train(*text, *ACCURACY, *overrides, "trainer.max_epochs=3", "total_steps=16")  # the same settings


def test_a_run_with_another_mode_is_another_run(train) -> None:
    train(*ACCURACY)
    with pytest.raises(SystemExit, match=r"was trained with other settings: .*mode=max then, min now"):
        train(*ACCURACY, "monitor_mode=min", "trainer.max_epochs=3")
    assert train(*ACCURACY, "trainer.max_epochs=3", "total_steps=16").result["best"] == pytest.approx(2.4)
