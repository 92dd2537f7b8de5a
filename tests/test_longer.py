"""Runs that are trained longer than they were planned, and short ones: which learning rates they take."""

import math
from pathlib import Path

import pytest
import torch
from conftest import TINY, Run

from language_model.runs.config import ConfigError
from language_model.runs.plan import plan
from language_model.training.schedule import warmup_cosine, with_cooldown

EVERY_STEP = ["trainer.log_every_n_steps=1", "callbacks.sample=null", "optimizer.lr=1e-3"]


def rates(total: int, steps: int) -> list[float]:
    return [warmup_cosine(step, 1e-3, total, 2, 1e-5) for step in range(steps)]


def test_every_step_of_a_longer_run_has_the_rate_of_the_new_schedule(train) -> None:
    assert train(*EVERY_STEP).column("lr") == pytest.approx(rates(16, 16))
    longer = train(*EVERY_STEP, "trainer.max_epochs=4")
    assert longer.column("lr") == pytest.approx(rates(16, 16) + rates(32, 32)[16:])
    warning = "at step 16 the learning rate rises from 1e-05 to 0.00056: the schedule is stretched from 16 to 32 steps."
    assert warning in longer.output
    assert "To keep it at 1e-05: total_steps=16" in longer.output


@pytest.mark.parametrize("cooldown", [False, True])
def test_what_the_warning_offers(train, cooldown: bool) -> None:
    train(*EVERY_STEP)
    settings = ["total_steps=16", *["cooldown_start=16"] * cooldown]
    longer = train(*EVERY_STEP, "trainer.max_epochs=4", *settings)
    assert "the schedule is stretched" not in longer.output
    expected = [1e-5 * (16 - i) / 16 if cooldown else 1e-5 for i in range(16)]
    assert longer.column("lr")[16:] == pytest.approx(expected)


def test_a_rate_that_rises_after_a_cooldown_is_said(train) -> None:
    train(*EVERY_STEP, "total_steps=32", "cooldown_start=8")
    longer = train(*EVERY_STEP, "total_steps=32", "cooldown_start=8", "trainer.max_epochs=3")
    assert "at step 16 the learning rate rises from 0 to 0.0004" in longer.output


def test_a_cooldown_falls_from_the_rate_of_its_start_to_zero() -> None:
    schedule = with_cooldown(lambda step: 1 / (1 + step), 4, 14)
    assert [schedule(step) for step in (0, 4, 9, 13, 14, 20)] == pytest.approx([1, 0.2, 0.1, 0.02, 0, 0])
    for end in (None, 3, 4):
        with pytest.raises(ValueError, match="a later end is needed"):
            with_cooldown(lambda step: 1.0, 4, end)


def test_a_constant_rate_with_a_cooldown(train) -> None:
    run = train(*EVERY_STEP, "schedule=constant", "cooldown_start=8")
    assert run.column("lr") == pytest.approx([1e-3] * 9 + [1e-3 * (16 - step) / 8 for step in range(9, 16)])


def test_a_checkpoint_starts_a_run_with_the_settings_given(train) -> None:
    """Not with the optimizer's settings in the checkpoint."""
    first = train(*EVERY_STEP, "schedule=constant", name="first")
    settings = ["schedule=constant", "optimizer.lr=1e-4", "optimizer.weight_decay=0.5", "trainer.max_epochs=3"]
    resume = f"resume={first.folder / 'checkpoints' / 'last.ckpt'}"
    second = train(*EVERY_STEP[:2], *settings, resume, name="second")
    assert second.column("lr") == pytest.approx([1e-4] * 8)
    (group,) = second.checkpoint("last")["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.5
    assert math.isclose(group["lr"], 1e-4)


def test_a_short_run_shortens_a_warmup_that_was_not_typed(train) -> None:
    settings = [setting for setting in (*TINY, *EVERY_STEP) if "warmup" not in setting]
    short = train(*settings, tiny=False)
    assert "warmup   1 steps, a tenth of the schedule: 50 would be more than its 16" in short.output
    assert short.config["schedule"]["warmup_steps"] == 1
    assert short.column("lr")[0] == pytest.approx(1e-3)
    longer = train(*settings, "trainer.max_epochs=9", tiny=False)  # 72 steps: 50 would do, but it has done its warmup
    assert longer.config["schedule"]["warmup_steps"] == 1
    with pytest.raises(SystemExit, match=r"error: schedule.warmup_steps=50 is longer than the run of total_steps=16;"):
        train(*settings, "schedule.warmup_steps=50", tiny=False, name="typed")


def test_more_steps_than_the_epochs_have_are_said(train) -> None:
    run = train("trainer.max_steps=99", "callbacks.sample=null")
    assert "trainer.max_steps=99: the run ends before, at step 16, by trainer.max_epochs=2" in run.output


def test_a_text_with_the_settings_of_the_sonnets_is_said(train, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abcdefgh" * 100)
    assert (
        "data.path without data=text: " in train(f"data.path={tmp_path / 'mine.txt'}", "callbacks.sample=null").output
    )


def test_the_default_run_of_one_epoch_starts() -> None:
    run = plan("trainer.max_epochs=1", "trainer.accelerator=cpu")
    assert (run.steps, run.config.schedule.warmup_steps) == (39, 3)


def test_a_run_that_is_cut_short_says_that_its_rate_has_not_decayed(train, tmp_path: Path) -> None:
    stop = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100", "trainer.max_epochs=9"]
    cut = train(*EVERY_STEP, *stop)
    assert cut.result["steps"] == 16
    assert "rate     9.1e-04 at the end, step 16 of the schedule's 72: it has not decayed" in cut.output
    (command,) = (line for line in cut.output.splitlines() if "cooldown_start=16" in line)
    overrides = command.partition("scripts/train.py ")[2].split()
    train(*overrides, tiny=False, name=None)
    assert Run(cut.folder).column("lr")[-2:] == pytest.approx([rates(72, 17)[16], rates(72, 17)[16] / 2])
    assert torch.load(cut.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 18


def test_a_schedule_longer_than_the_epochs_offers_a_command_that_works(train) -> None:
    cut = train(*EVERY_STEP, "total_steps=72")
    (command,) = (line for line in cut.output.splitlines() if "cooldown_start=16" in line)
    train(*command.partition("scripts/train.py ")[2].split(), tiny=False, name=None)
    assert torch.load(cut.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 18


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.overfit_batches=2", "trainer.val_check_interval=3"], "trainer.val_check_interval=3: an epoch has 2"),
        (["trainer.overfit_batches=0.01"], "trainer.overfit_batches=0.01: leaves none of an epoch's 35"),
        (["trainer.limit_val_batches=0.5"], "trainer.limit_val_batches=0.5: leaves none of the 1 validation batches"),
        (["trainer.val_check_interval=36"], "trainer.val_check_interval=36: an epoch has 35 batches; allowed: 1 to 35"),
        (["trainer.val_check_interval=0.01"], "trainer.val_check_interval=0.01: less than one of an epoch's 35"),
        (
            ["trainer.check_val_every_n_epoch=null"],
            "trainer.val_check_interval=1.0: with trainer.check_val",
        ),
        (["trainer.limit_train_batches=0.01"], "trainer.limit_train_batches=0.01: leaves none of an epoch's 35"),
        (["trainer.precision=16", "optimizer.fused=false"], "trainer.precision=16-mixed: not on a CPU; allowed: bf16"),
        (["cooldown_start=1750"], "cooldown_start=1750: the run ends at step 1750; a later end is needed"),
    ],
)
def test_lengths_that_do_not_fit(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan("data.val_fraction=0.1", "trainer.accelerator=cpu", *overrides)
    assert str(refused.value).startswith(says)
