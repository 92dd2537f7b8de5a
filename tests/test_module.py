import contextlib
import csv
import math
from functools import partial

import lightning as L
import lightning.pytorch.callbacks.timer
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import language_model.training.module
from language_model.data.tokenizer import CharTokenizer, IdTokenizer
from language_model.data.windows import IGNORE_INDEX
from language_model.training.checkpoint import LastCheckpoint
from language_model.training.final_validation import FinalValidation
from language_model.training.module import LanguageModel, NonFiniteError
from language_model.training.optimizer import adamw, muon
from language_model.training.schedule import constant, warmup_cosine

V = 5
ABCDE = CharTokenizer("abcde")


class Bigram(nn.Module):
    """The smallest language model: a table of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def rows(folder, name: str) -> list[float]:
    """A column of metrics.csv, where it is filled in."""
    return [float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row.get(name)]


class Validations(L.Callback):
    """Notes the step and the loss of every validation; can stop the run, or interrupt it, after a number of steps."""

    def __init__(self, stop_at: int | None = None, interrupt_at: int | None = None) -> None:
        self.stop_at, self.interrupt_at = stop_at, interrupt_at
        self.seen: list[tuple[int, float]] = []
        self.saved = 0  # of these, before the last save

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.interrupt_at:
            raise SIGTERMException

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.stop_at

    def on_validation_end(self, trainer, pl_module) -> None:
        assert pl_module.validated_step == trainer.global_step
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))


class Recorder(L.Callback):
    """Notes the loss, rate and gradient norm of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.steps):
            self.steps.append((float(outputs["loss"]), pl_module.last_lr, float(pl_module.grad_norm)))


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(V, (2, size, 6), generator=generator).unbind(0)) for _ in range(count)]


def loader(some: list) -> DataLoader:
    return DataLoader(some, batch_size=None)


def fit(
    tmp_path,
    network: nn.Module,
    train: list,
    val=None,
    lr=0.1,
    schedule=None,
    tokenizer=ABCDE,
    optimizer=None,
    callbacks=(),
    ckpt_path=None,
    **trainer,
):
    recorder = Recorder()
    schedule = schedule or partial(constant, lr=lr)
    module = LanguageModel(network, optimizer or partial(adamw, lr=lr, weight_decay=0.01), schedule, tokenizer)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "gradient_clip_val": 1.0} | trainer,
        callbacks=[recorder, *callbacks], logger=logger, enable_checkpointing=bool(callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(train), loader(val) if val else None, ckpt_path=ckpt_path)
    return recorder, trainer, module


@pytest.mark.filterwarnings("ignore:.*")
def test_training_is_the_chapters_loop(tmp_path) -> None:
    """Loss, clipped gradients, AdamW and the rate of each step, against the loop as the chapter prints it."""
    torch.manual_seed(1)
    network, plain = Bigram(), Bigram()
    plain.load_state_dict(network.state_dict())
    data = batches(12)
    schedule = partial(warmup_cosine, lr=0.1, total_steps=24, warmup_steps=5, min_lr=1e-3)
    recorder, _, _ = fit(tmp_path, network, data, schedule=schedule, max_epochs=2, gradient_clip_val=0.05)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.01)
    for step, (inputs, targets) in enumerate(data * 2):
        rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = nn.CrossEntropyLoss()(plain(inputs).view(-1, V), targets.view(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        assert norm > 0.05
        assert recorder.steps[step] == pytest.approx((loss.item(), rate, norm.item()), rel=1e-5)
    torch.testing.assert_close(network.table.weight, plain.table.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*")
def test_every_group_follows_the_schedule_from_its_own_peak(tmp_path) -> None:
    def two_groups(named_parameters):
        weight = [parameter for _, parameter in named_parameters]
        return torch.optim.SGD([{"params": weight, "lr": 0.2}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.04}])

    schedule = partial(warmup_cosine, lr=0.2, total_steps=10, warmup_steps=4)
    module = LanguageModel(Bigram(), two_groups, schedule, ABCDE)
    configured = module.configure_optimizers()
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in configured["optimizer"].param_groups])
        configured["optimizer"].step()
        configured["lr_scheduler"]["scheduler"].step()
    for step, (first, second) in enumerate(rates):
        expected = warmup_cosine(step, 0.2, 10, 4)
        assert first == pytest.approx(expected)
        assert second == pytest.approx(expected / 5)


@pytest.mark.filterwarnings("ignore:.*")
def test_what_is_logged(tmp_path) -> None:
    data = batches(6)
    recorder, trainer, _ = fit(tmp_path, Bigram(), data, lr=0.03, log_every_n_steps=2)
    lines = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    steps = [row for row in lines if row["train/loss"]]
    assert [int(row["step"]) for row in steps] == [1, 3, 5]
    for row, (loss, rate, norm) in zip(steps, recorder.steps[1::2], strict=True):
        assert float(row["train/loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(row["lr"]) == pytest.approx(rate)
        assert float(row["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    mean = sum(loss for loss, _, _ in recorder.steps) / 6
    assert float(trainer.callback_metrics["train/loss_epoch"]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("clip", [0.01, None])
@pytest.mark.parametrize(("count", "limit"), [(8, 1.0), (6, 1.0), (8, 5), (12, 0.5)])
def test_an_accumulated_step_is_a_step_on_the_whole_batch(tmp_path, clip: float | None, count: int, limit) -> None:
    """Also the last one of an epoch, which has the batches that are left."""
    torch.manual_seed(2)
    network, whole = Bigram(), Bigram()
    whole.load_state_dict(network.state_dict())
    data = batches(count)
    used = data[: limit if isinstance(limit, int) else int(count * limit)]
    joined = [tuple(torch.cat(parts) for parts in zip(*used[i : i + 4], strict=True)) for i in (0, 4)]
    same = {"gradient_clip_val": clip, "max_epochs": 2}
    recorder, trainer, _ = fit(
        tmp_path / "a", network, data, accumulate_grad_batches=4, limit_train_batches=limit, **same
    )
    expected, _, _ = fit(tmp_path / "b", whole, joined, **same)
    assert trainer.global_step == 4
    assert rows(tmp_path / "a", "train/loss") == pytest.approx(rows(tmp_path / "b", "train/loss"), rel=1e-5)
    assert [step[2] for step in recorder.steps] == pytest.approx([step[2] for step in expected.steps], rel=1e-4)
    torch.testing.assert_close(network.table.weight, whole.table.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*")
def test_clipping_by_value(tmp_path) -> None:
    recorder, _, module = fit(tmp_path, Bigram(), batches(1), gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert recorder.steps[0][2] > 1e-2  # the norm before
    assert module.network.table.weight.grad is None or module.network.table.weight.grad.abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore:.*")
def test_validation_loss_is_the_mean_over_tokens(tmp_path) -> None:
    val = batches(2) + batches(1, size=1)
    val[2][1][0, 2:] = IGNORE_INDEX  # a short last window
    _, trainer, module = fit(tmp_path, Bigram(), batches(1), val)
    losses = [
        loss
        for inputs, targets in val
        for loss, target in zip(
            F.cross_entropy(module.network(inputs).flatten(0, 1), targets.flatten(), reduction="none").tolist(),
            targets.flatten().tolist(),
            strict=True,
        )
        if target != IGNORE_INDEX
    ]
    assert len(losses) == 24 + 24 + 2
    mean = sum(losses) / len(losses)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(mean, rel=1e-5)
    assert float(trainer.callback_metrics["val/perplexity"]) == pytest.approx(math.exp(mean), rel=1e-5)


ENDINGS = {
    "max_steps": ({"max_steps": 5, "val_check_interval": 3}, [3, 5]),
    "max_steps, where it is due": ({"max_steps": 6, "val_check_interval": 3}, [3, 6]),
    "max_epochs": ({"max_epochs": 3, "check_val_every_n_epoch": 7}, [24]),
    "max_epochs, where it is due": ({"max_epochs": 4, "check_val_every_n_epoch": 2}, [16, 32]),
    "the end of an epoch": ({"max_epochs": 1, "val_check_interval": 3}, [3, 6, 8]),
    "batches across epochs": (
        {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 5}, [5, 10, 15, 16],
    ),
    "a callback": ({"max_epochs": 9, "check_val_every_n_epoch": 7, "stop_at": 5}, [5]),
    "accumulation": ({"max_epochs": 1, "accumulate_grad_batches": 3, "val_check_interval": 4}, [1, 3]),
    "no validation": ({"max_steps": 5, "limit_val_batches": 0}, []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_last_step_is_validated_once_however_a_run_ends(tmp_path, ending: str) -> None:
    options, steps = ENDINGS[ending]
    validations = Validations(stop_at=options.get("stop_at"))
    options = {"max_epochs": -1} | {name: value for name, value in options.items() if name != "stop_at"}
    _, trainer, module = fit(tmp_path, Bigram(), batches(8), batches(2), callbacks=[validations], **options)
    assert [step for step, _ in validations.seen] == steps
    if steps:
        final = float(module.loss(batches(2)[0]).detach() + module.loss(batches(2)[1]).detach()) / 2
        assert module.validated_step == trainer.global_step
        assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(final, rel=1e-5)
        assert rows(tmp_path, "val/loss") == pytest.approx([loss for _, loss in validations.seen])


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    ("monitor", "intervals", "steps"),
    [
        ("val/loss", {"val_check_interval": 3}, [3, 6]),  # just validated
        ("train/loss_epoch", {"val_check_interval": 3}, [3, 6, 11, 14, 16]),
        ("train/loss_epoch", {"check_val_every_n_epoch": 7}, [16]),
    ],
)
def test_a_run_that_stopped_early_is_validated_at_its_end(
    tmp_path, monitor: str, intervals: dict, steps: list[int]
) -> None:
    validations = Validations()
    by_epochs = monitor == "train/loss_epoch"
    stopping = EarlyStopping(monitor, patience=1, min_delta=100, check_on_train_epoch_end=by_epochs)
    callbacks = [FinalValidation(), validations, stopping]
    _, trainer, _ = fit(tmp_path, Bigram(), batches(8), batches(2), callbacks=callbacks, max_epochs=9, **intervals)
    assert trainer.global_step == steps[-1]
    assert [step for step, _ in validations.seen] == steps
    lines = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["val/loss"]]
    assert [int(row["step"]) + 1 for row in lines] == steps


@pytest.mark.filterwarnings("ignore:.*")
def test_max_time_ends_with_a_validation(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    validations, clock = Validations(), iter(range(10_000))
    monkeypatch.setattr(lightning.pytorch.callbacks.timer.time, "monotonic", lambda: float(next(clock)))
    _, trainer, _ = fit(
        tmp_path, Bigram(), batches(8), batches(2), callbacks=[validations], max_epochs=-1,
        max_time="00:00:00:20", check_val_every_n_epoch=7,
    )  # fmt: skip
    assert 0 < trainer.global_step < 56  # the first validation that is due
    assert [step for step, _ in validations.seen] == [trainer.global_step]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 13, "val_check_interval": 3},
        {"max_epochs": 2, "check_val_every_n_epoch": 7},
        {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 4},
        {"max_epochs": 2, "accumulate_grad_batches": 3, "check_val_every_n_epoch": None, "val_check_interval": 5},
    ],
)
@pytest.mark.parametrize("interrupt_at", [1, 3, 4, 5])
def test_an_interrupted_run_validates_no_more_and_no_less(tmp_path, options: dict, interrupt_at: int) -> None:
    """Together its parts validate as the whole run does, and come to the same weights.

    All batches are alike, since this data is not skipped on resume, as the data module's is.
    """

    def part(name: str, validations: Validations, ckpt_path=None) -> Bigram:
        torch.manual_seed(3)
        network, last = Bigram(), LastCheckpoint(str(tmp_path / name), every_n_steps=1)
        last.on_exception = lambda *args: None  # as when killed: what was saved before is all that is left
        save = last.save
        last.save = lambda trainer: (setattr(validations, "saved", len(validations.seen)), save(trainer))
        with contextlib.suppress(SystemExit):
            fit(
                tmp_path / name, network, batches(1) * 8, batches(2), callbacks=[validations, last],
                ckpt_path=ckpt_path, **{"max_epochs": -1} | options,
            )  # fmt: skip
        return network

    whole, first, second = Validations(), Validations(interrupt_at=interrupt_at), Validations()
    expected = part("whole", whole)
    part("parts", first)
    resumed = part("rest", second, tmp_path / "parts" / "last.ckpt")
    assert first.seen[: first.saved] + second.seen == whole.seen
    assert resumed.table.weight.equal(expected.table.weight)


@pytest.mark.filterwarnings("ignore:.*")
def test_the_mean_of_an_epoch_is_logged_if_the_epoch_is_complete(tmp_path) -> None:
    recorder, trainer, module = fit(tmp_path, Bigram(), batches(8), max_epochs=-1, max_steps=10)
    losses = [loss for loss, _, _ in recorder.steps]
    assert rows(tmp_path, "train/loss_epoch") == [pytest.approx(sum(losses[:8]) / 8, rel=1e-5)]
    assert module.unfinished_epoch == {"loss": pytest.approx(sum(losses[8:]) / 2, rel=1e-5), "steps": 2}
    _, trainer, module = fit(
        tmp_path / "b", Bigram(), batches(8), max_epochs=-1, max_steps=3, limit_train_batches=6,
        accumulate_grad_batches=2,
    )  # fmt: skip
    assert "train/loss_epoch" in trainer.callback_metrics  # of all the batches that an epoch has here
    assert module.unfinished_epoch is None


@pytest.mark.filterwarnings("ignore:.*")
def test_the_mean_of_an_epoch_is_that_of_all_processes(tmp_path) -> None:
    _, trainer, module = fit(tmp_path, Bigram(), batches(8))
    mine = float(module.mean_epoch_loss())
    other = torch.tensor([20.0, 4.0], dtype=torch.float64)  # four batches with a mean loss of 5
    trainer.strategy.reduce = lambda sums, reduce_op: sums + other
    assert float(module.mean_epoch_loss()) == pytest.approx((8 * mine + 20) / 12)


@pytest.mark.filterwarnings("ignore:.*")
def test_callbacks_get_the_logits_of_a_validation(tmp_path) -> None:
    class Calls(Bigram):
        count = 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.count += not self.training
            return super().forward(tokens)

    class Logits(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
            logits = pl_module.network.table(batch[0])
            assert outputs["logits"].equal(logits)
            assert outputs["loss"] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())))

    _, _, module = fit(tmp_path, Calls(), batches(2), batches(3), callbacks=[Logits()])
    assert module.network.count == 3


@pytest.mark.filterwarnings("ignore:.*")
def test_bits_per_byte_by_hand(tmp_path) -> None:
    """Characters of one to four bytes, all equally likely: every prediction costs log2(5) bits."""
    tokenizer = CharTokenizer("aéΩ学👩")
    network = Bigram()
    nn.init.zeros_(network.table.weight)
    ids = torch.from_numpy(tokenizer.encode("a学👩éΩ学aa")).long()
    targets = torch.cat([ids[1:], torch.tensor([IGNORE_INDEX, IGNORE_INDEX])])
    batch = (torch.cat([ids, ids[:1]])[None], targets[None])
    _, trainer, _ = fit(tmp_path, network, [batch], [batch], tokenizer=tokenizer, lr=1e-9)
    num_bytes = 3 + 4 + 2 + 2 + 3 + 1 + 1  # of all characters but the first
    bits = 7 * math.log2(5)
    assert float(trainer.callback_metrics["val/bits_per_byte"]) == pytest.approx(bits / num_bytes, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*")
def test_no_bits_per_byte_where_tokens_have_no_text(tmp_path) -> None:
    _, trainer, module = fit(tmp_path, Bigram(), batches(1), batches(1), tokenizer=IdTokenizer(V))
    assert "val/loss" in trainer.callback_metrics
    assert "val/bits_per_byte" not in trainer.callback_metrics
    assert "token_bytes" not in module.state_dict()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "optimizer", [partial(adamw, lr=0.1, fused=True), partial(muon, lr=0.1, not_muon=(), fused=True)]
)
@pytest.mark.parametrize(("bad", "every", "saved"), [(2, 1, 2), (5, 1, 5), (2, None, 0), (5, None, 0)])
def test_where_a_device_works_on_a_bad_step_is_left_out_and_told_later(
    tmp_path, monkeypatch: pytest.MonkeyPatch, optimizer, bad: int, every: int | None, saved: int
) -> None:
    """As on a GPU: the weights stay as they were before that step; it is named, also if it was the last; not kept."""
    monkeypatch.setattr(language_model.training.module, "is_asynchronous", lambda device: True)
    weights = []

    class Explodes(Bigram):
        def forward(self, tokens):
            weights.append(self.table.weight.detach().clone())
            return super().forward(tokens) * (math.inf if len(weights) == bad + 1 else 1.0)

    network, last = Explodes(), LastCheckpoint(str(tmp_path), every_n_steps=every)
    with pytest.raises(NonFiniteError, match=f"the gradient of step {bad} is not finite"):
        fit(tmp_path, network, batches(6), optimizer=optimizer, gradient_clip_val=1.0, callbacks=[last])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == saved
    assert not weights[bad].equal(weights[bad - 1])
    assert network.table.weight.equal(weights[bad])


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("make", [partial(adamw, lr=0.1), partial(muon, lr=0.1, not_muon=())])
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_has_its_optimizer_fused_or_not_as_it_is_set_now(tmp_path, make, fused: bool) -> None:
    last = LastCheckpoint(str(tmp_path), every_n_steps=None)
    fit(tmp_path, Bigram(), batches(2), optimizer=partial(make, fused=not fused), callbacks=[last])
    file = tmp_path / "last.ckpt"
    _, trainer, _ = fit(
        tmp_path, Bigram(), batches(2), optimizer=partial(make, fused=fused), max_epochs=2, ckpt_path=file,
        callbacks=[last],
    )  # fmt: skip
    assert trainer.global_step == 4
    assert [group["fused"] for group in trainer.optimizers[0].param_groups] == [fused]
