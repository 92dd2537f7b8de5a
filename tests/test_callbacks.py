import io
import logging
import math
import re
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console as Terminal
from test_module import Bigram, batches, loader

from language_model import terminal
from language_model.data.tokenizer import CharTokenizer
from language_model.training.callbacks import Console, GradientNorm, Sample, Throughput
from language_model.training.callbacks import console as console_module
from language_model.training.callbacks import throughput as throughput_module
from language_model.training.checkpoint import AtomicCheckpointIO, LastCheckpoint
from language_model.training.module import LanguageModel
from language_model.training.optimizer import adamw
from language_model.training.schedule import constant


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes to the project's log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")
    monkeypatch.setattr(terminal.log, "handlers", [handler])
    monkeypatch.setattr(terminal.log, "level", logging.INFO)
    terminal.log.manager._clear_cache()
    return lines


def fit(watchers: list, train: int = 12, val: int = 0, ckpt_path=None, **options) -> L.Trainer:
    usual = {
        "max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 4, "gradient_clip_val": 0.1, "logger": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    trainer = L.Trainer(**usual | options, callbacks=watchers, enable_model_summary=False, num_sanity_val_steps=0)
    module = LanguageModel(Bigram(), partial(adamw, lr=0.1), partial(constant, lr=0.1), CharTokenizer("abcde"))
    trainer.fit(module, loader(batches(train)), loader(batches(val)) if val else None, ckpt_path=ckpt_path)
    return trainer


class Norms(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(pl_module.grad_norm))


@pytest.mark.filterwarnings("ignore:.*")
def test_gradient_norms_are_summed_up() -> None:
    norms, summed = Norms(), GradientNorm()
    fit([norms, summed], gradient_clip_val=0.21)  # some are above, some below
    values = norms.values
    assert summed.summary() == {
        "grad_norm_max": pytest.approx(max(values)),
        "grad_norm_mean": pytest.approx(sum(values) / 12),
        "grad_norm_last": pytest.approx(values[-1]),
        "clipped_share": pytest.approx(sum(value > 0.21 for value in values) / 12),
        "skipped_steps": 0,
    }
    assert 0 < summed.summary()["clipped_share"] < 1
    assert GradientNorm().summary() == {}


def summed_up(norms: list[float], before: GradientNorm | None = None) -> GradientNorm:
    """Statistics of steps with these norms, clipped to 2; in a run that is resumed from that of another."""
    summed = GradientNorm(warn_factor=1.0, warn_steps=100)
    if before is not None:
        summed.load_state_dict(before.state_dict())
    trainer = SimpleNamespace(global_step=summed.steps, gradient_clip_val=2.0, log_every_n_steps=1)
    module = SimpleNamespace(device="cpu")
    summed.on_train_start(trainer, module)
    for norm in norms:
        trainer.global_step += 1
        module.grad_norm = torch.tensor(norm)
        summed.on_train_batch_end(trainer, module, None, None, 0)
    return summed


def test_steps_whose_gradient_overflowed_are_counted_apart() -> None:
    """As with float16: their weights stay as they were, so their norm is that of no step."""
    expected = {
        "grad_norm_max": 4.0, "grad_norm_mean": 2.5, "grad_norm_last": 1.0, "clipped_share": 0.5, "skipped_steps": 3,
    }  # fmt: skip
    norms = [math.inf, 2.0, 4.0, math.nan, 3.0, 1.0, math.inf]
    assert summed_up(norms).summary() == expected
    assert summed_up(norms[3:], summed_up(norms[:3])).summary() == expected
    assert summed_up([math.inf]).summary() == {"skipped_steps": 1}


def test_gradient_norms_of_an_earlier_versions_checkpoint_are_added_to() -> None:
    before = GradientNorm()
    before.steps, before._sums = 2, torch.tensor([6.0, 4.0, 1.0, 0.0, 1.0])
    assert summed_up([3.0], before).summary() == {
        "grad_norm_max": 4.0, "grad_norm_mean": 3.0, "grad_norm_last": 3.0,
        "clipped_share": pytest.approx(2 / 3), "skipped_steps": 0,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*")
def test_an_accumulated_step_counts_once() -> None:
    summed = GradientNorm()
    fit([summed], accumulate_grad_batches=3)
    assert summed.steps == 4


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(("warn_steps", "warnings"), [(4, 1), (12, 1), (13, 0)])
def test_a_gradient_norm_that_stays_far_above_the_clip_is_warned_of_once(
    said: list[str], warn_steps: int, warnings: int
) -> None:
    fit([GradientNorm(warn_factor=10, warn_steps=warn_steps)], gradient_clip_val=1e-4)
    found = [line for line in said if "WARNING: the gradient norm was above 10 times the clip of 0.0001" in line]
    assert len(found) == warnings


@pytest.mark.filterwarnings("ignore:.*")
def test_throughput_counts_tokens_and_leaves_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1_000))
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: float(next(clock)))
    throughput = Throughput()
    logged: list[float] = []

    class Log(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step % 4 == 0:
                logged.append(float(trainer.callback_metrics["train/tokens_per_sec"]))

        def on_validation_start(self, trainer, pl_module) -> None:
            for _ in range(100):
                next(clock)  # a long validation

    trainer = fit([throughput, Log()], val=1, val_check_interval=4)
    assert trainer.global_step == 12
    assert throughput.tokens == 12 * 4 * 6  # batches × windows × tokens
    # The clock is read at the start of each batch, at each log, and where a validation stops it: a second each.
    assert logged == [pytest.approx(4 * 24 / 4), pytest.approx(4 * 24 / 5), pytest.approx(4 * 24 / 5)]
    assert throughput.tokens_per_sec == pytest.approx(288 / throughput.seconds)
    assert throughput.seconds == 15


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("every", [1, 3, 4])
def test_throughput_leaves_saves_out(monkeypatch: pytest.MonkeyPatch, tmp_path, every: int) -> None:
    """Whoever saves, and whenever: between two steps, after a validation, at the end of an epoch or of the run."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: float(next(clock)))
    throughput, saves = Throughput(), []

    class Slow(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
            saves.append(path)
            saved = checkpoint["callbacks"]["Throughput"]
            assert saved["tokens"] == (0 if not saved["seconds"] else throughput.tokens)
            for _ in range(1_000):
                next(clock)

    watchers = [
        throughput,
        LastCheckpoint(str(tmp_path), every_n_steps=every),
        ModelCheckpoint(tmp_path, "step-{step}", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(tmp_path, "epoch-{epoch}", save_on_train_epoch_end=True, save_top_k=-1),
    ]
    fit(watchers, val=1, val_check_interval=4, enable_checkpointing=True, plugins=[Slow()])
    assert len(saves) >= 12 // every + 6 + 1
    assert throughput.tokens == 288
    assert 12 <= throughput.seconds < 12 * 4  # each batch's time, and nothing of a save's


@pytest.mark.filterwarnings("ignore:.*")
def test_throughput_waits_for_the_device_before_it_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step is still being computed when Python is done with it: here 100 seconds of work."""
    now = [0.0]
    monkeypatch.setattr(throughput_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(throughput_module, "wait_for", lambda device: now.__setitem__(0, now[0] + 100.0))
    throughput = Throughput()
    fit([throughput], val=1, val_check_interval=6, log_every_n_steps=100)
    assert throughput.seconds == 200  # at the validation, and at the end


@pytest.mark.filterwarnings("ignore:.*")
def test_lines_in_the_chapters_form(said: list[str]) -> None:
    fit([Console(log_interval=2)], max_epochs=4)

    form = r"INFO: Epoch   (\d) \| Loss: \d\.\d{4} \| LR: 0\.100000 \| Time: \d+\.\ds"
    assert said[0].startswith("INFO: lines    Loss: mean of the epoch so far | LR: of the last step | Time: since this")
    assert [re.fullmatch(form, line)[1] for line in said[1:]] == ["0", "2", "3"]  # every second, and the last


@pytest.mark.filterwarnings("ignore:.*")
def test_the_lines_loss_is_the_epochs_own(said: list[str]) -> None:
    trainer = fit([Console(log_interval=1)], max_epochs=1)
    assert f"Loss: {trainer.callback_metrics['train/loss_epoch']:.4f}" in said[1]


@pytest.mark.filterwarnings("ignore:.*")
def test_validations_inside_an_epoch_have_lines_of_their_own(said: list[str]) -> None:
    fit([Console()], val=1, val_check_interval=4)
    assert [line.split(" |")[0] for line in said[1:]] == ["INFO: Step 4", "INFO: Step 8", "INFO: Epoch   0"]
    assert all("Val loss: " in line for line in said[1:])


@pytest.mark.filterwarnings("ignore:.*")
def test_a_line_says_what_it_is_of(said: list[str]) -> None:
    """The validation before, where the epoch ends without one; the last step, where the run ends inside an epoch."""
    fit([Console(log_interval=1)], val=1, val_check_interval=5, max_epochs=-1, max_steps=13)
    lines = [re.sub(r"\d\.\d+", "x", line.split(" | LR")[0]) for line in said[1:]]
    assert lines == [
        "INFO: Step 5 | Loss: x | Val loss: x",
        "INFO: Step 10 | Loss: x | Val loss: x",
        "INFO: Epoch   0 | Loss: x | Val loss: x (step 10)",
        "INFO: Epoch   1 until step 13 | Loss: x | Val loss: x",
    ]


@pytest.mark.filterwarnings("ignore:.*")
def test_the_bar_shows_loss_rate_speed_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal(force_terminal=True, width=140, highlight=False, record=True, file=io.StringIO())
    monkeypatch.setattr(console_module, "terminal", screen)
    shown: list[str] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            bar = console._bar
            assert bar is not None
            bar.refresh()
            shown.append(str(bar.tasks[0].fields["values"]) + f" {bar.tasks[0].completed}")

    console = Console()
    fit([Throughput(), console, Look()])

    assert re.fullmatch(r"loss \d\.\d{4} · lr 1\.00e-01 · [\d,]+ tokens/s 12", shown[-1])
    assert console._bar is None  # taken away


@pytest.mark.filterwarnings("ignore:.*")
def test_the_bar_is_taken_away_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal(force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(console_module, "terminal", screen)

    class Failing(L.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise RuntimeError("out of luck")

    console = Console()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit([console, Failing()])
    assert console._bar is None


def test_other_processes_are_silent(said: list[str]) -> None:
    console = Console()
    console.disable()
    asked: list[bool] = []
    trainer = SimpleNamespace(global_step=0, current_epoch=0, callback_metrics={})
    module = SimpleNamespace(last_lr=0.1, mean_epoch_loss=lambda: asked.append(True) or 1.0)
    console.on_train_start(trainer, module)
    console._log(trainer, module, "Epoch 0")
    assert said == []
    assert asked  # the first process waits for this
    console.enable()
    console._log(trainer, module, "Epoch 0")
    assert len(said) == 1


def test_a_sample_starts_with_its_prompt_and_disturbs_nothing() -> None:
    network = Bigram().train()
    network.max_seq_len = 3
    state = torch.get_rng_state()
    text = Sample(max_new_tokens=7).generate_sample(network, CharTokenizer("abcde"), "bad")
    assert len(text) == 10
    assert text.startswith("bad")
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("every", "interval", "steps"),
    [(4, 4, [4, 8, 12]), (8, 4, [8]), (5, 4, [8, 12]), (5, 12, [12]), (100, 4, []), (None, 4, [])],
)
@pytest.mark.parametrize("interrupted_at", [None, 3, 4, 6, 9])
def test_samples_are_as_far_apart_as_is_set(
    tmp_path, every: int | None, interval: int, steps: list[int], interrupted_at: int | None
) -> None:
    """By steps, not by time: a resumed run has them at the same steps. One more comes at the end."""

    class Noted(Sample):
        written: list[int] = []  # noqa: RUF012

        def _write_sample(self, trainer, pl_module) -> None:
            self.written.append(trainer.global_step)

    class Last(LastCheckpoint):
        def save(self, trainer) -> None:
            saved[:] = Noted.written
            super().save(trainer)

    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == interrupted_at:
                raise SIGTERMException

    saved: list[int] = []
    options = {"val": 1, "val_check_interval": interval, "enable_checkpointing": True}
    options["logger"] = CSVLogger(tmp_path, name="", version="")
    if interrupted_at is not None:
        with pytest.raises(SystemExit):
            fit([Noted(every), Last(str(tmp_path), 2), Interrupt()], **options)
        Noted.written = saved
        options["ckpt_path"] = tmp_path / "last.ckpt"
    fit([Noted(every), LastCheckpoint(str(tmp_path))], **options)
    assert Noted.written == [*steps, 12]


@pytest.mark.filterwarnings("ignore:.*")
def test_a_network_without_max_seq_len_is_sampled_from() -> None:
    """Within the windows' length; the description says what the text is of."""

    class Data(L.LightningDataModule):
        tokenizer, default_prompt, seq_len = CharTokenizer("abcde"), "bad", 6

        def train_dataloader(self):
            return loader(batches(2))

    sample = Sample(max_new_tokens=20, top_k=3)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[sample])
    module = LanguageModel(Bigram(), partial(adamw, lr=0.1), partial(constant, lr=0.1), CharTokenizer("abcde"))
    trainer.fit(module, Data())
    assert len(sample.text) == 23
    assert sample.description == "prompt 'bad', temperature 0.8, top_k 3, last weights (step 2)"


def test_early_stopping_in_the_first_epoch_restores_the_best_weights(train) -> None:
    early = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100"]
    run = train("data.val_fraction=0.3", "trainer.val_check_interval=2", *early)
    assert run.result["epochs"] == 0  # complete ones
    assert run.result["restored_best"]


def test_without_a_best_checkpoint_nothing_is_restored(train) -> None:
    """Not the last of those that are saved every few epochs, either."""
    early = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100"]
    run = train("callbacks.best=null", "callbacks.every.every_n_epochs=1", "trainer.max_epochs=5", *early)
    assert run.result["stopped_early"]
    assert "restored_best" not in run.result
    assert "last weights (step 16)" in run.result["sample_description"]


def test_the_last_line_has_the_loss_of_the_validation_after_the_last_epoch(train) -> None:
    early = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100"]
    between = ["data.val_fraction=0.3", "monitor=train/loss_epoch", "trainer.check_val_every_n_epoch=7"]
    run = train(*between, *early, "trainer.max_epochs=5")
    (line,) = (line for line in run.output.splitlines() if line.startswith("Epoch   1"))
    assert f"Val loss: {run.result['metrics']['val/loss']:.4f} | LR" in line
    assert run.checkpoint("last")["validated_step"] == run.result["steps"] == 16


def test_log_lines_reach_the_terminal_unwrapped(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with (tmp_path / "out").open("w+") as file:
        monkeypatch.setattr(terminal, "terminal", Terminal(file=file, width=20))
        monkeypatch.setattr(terminal.log, "handlers", [terminal.TerminalHandler()])
        monkeypatch.setattr(terminal.log, "level", logging.INFO)
        terminal.log.manager._clear_cache()
        terminal.log.info("a line [of] more than twenty characters")
        terminal.log.warning("look out")
        file.seek(0)
        assert file.read() == "a line [of] more than twenty characters\nwarning: look out\n"


@pytest.mark.filterwarnings("ignore:.*")
def test_mfu_is_operations_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput_module, "peak_flops", lambda device, precision: 1e9)
    monkeypatch.setattr(Bigram, "flops_per_token", lambda self, seq_len: 1000 * seq_len, raising=False)
    throughput = Throughput()
    trainer = fit([throughput])
    assert throughput.mfu == pytest.approx(throughput.tokens_per_sec * 1000 * next(iter(batches(1)))[0].shape[1] / 1e9)
    assert float(trainer.callback_metrics["train/mfu"]) > 0
    assert Throughput().mfu is None
