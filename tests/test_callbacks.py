import io
import logging
import re
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console as Terminal
from test_module import Bigram, batches, loader

from language_model import terminal
from language_model.data.tokenizer import CharTokenizer
from language_model.training.callbacks import Console, GradientNorm, Sample, Throughput
from language_model.training.callbacks import console as console_module
from language_model.training.callbacks import throughput as throughput_module
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


def fit(watchers: list, train: int = 12, val: int = 0, **options) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 4, "gradient_clip_val": 0.1} | options,
        callbacks=watchers, logger=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    module = LanguageModel(Bigram(), partial(adamw, lr=0.1), partial(constant, lr=0.1), CharTokenizer("abcde"))
    trainer.fit(module, loader(batches(train)), loader(batches(val)) if val else None)
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
    assert summed.summary(torch.tensor(values[-1])) == {
        "grad_norm_max": pytest.approx(max(values)),
        "grad_norm_mean": pytest.approx(sum(values) / 12),
        "grad_norm_last": pytest.approx(values[-1]),
        "clipped_share": pytest.approx(sum(value > 0.21 for value in values) / 12),
    }
    assert 0 < summed.summary(torch.tensor(0.0))["clipped_share"] < 1
    assert GradientNorm().summary(torch.tensor(0.0)) == {}


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
    # The clock is read when it starts, at each of the three logs, and where a validation stops it: a second each.
    assert logged == [pytest.approx(4 * 24 / 1), pytest.approx(4 * 24 / 2), pytest.approx(4 * 24 / 2)]
    assert throughput.tokens_per_sec == pytest.approx(288 / throughput.seconds)
    assert throughput.seconds < 10


@pytest.mark.filterwarnings("ignore:.*")
def test_lines_in_the_chapters_form(said: list[str]) -> None:
    fit([Console(log_interval=2)], max_epochs=4)

    form = r"INFO: Epoch   (\d) \| Loss: \d\.\d{4} \| LR: 0\.100000 \| Time: \d+\.\ds"
    assert [re.fullmatch(form, line)[1] for line in said] == ["0", "2", "3"]  # every second, and the last


@pytest.mark.filterwarnings("ignore:.*")
def test_the_lines_loss_is_the_epochs_own(said: list[str]) -> None:
    trainer = fit([Console(log_interval=1)], max_epochs=1)
    assert f"Loss: {trainer.callback_metrics['train/loss_epoch']:.4f}" in said[0]


@pytest.mark.filterwarnings("ignore:.*")
def test_validations_inside_an_epoch_have_lines_of_their_own(said: list[str]) -> None:
    fit([Console()], val=1, val_check_interval=4)
    assert [line.split(" |")[0] for line in said] == ["INFO: Step 4", "INFO: Step 8", "INFO: Epoch   0"]
    assert all("Val loss: " in line for line in said)


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
    trainer = SimpleNamespace(global_step=0, current_epoch=0, callback_metrics={})
    module = SimpleNamespace(last_lr=0.1, epoch_loss=SimpleNamespace(value=1.0))
    console.on_train_start(trainer, module)
    console._log(trainer, module, "Epoch 0")
    assert said == []
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
