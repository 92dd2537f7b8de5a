"""Runs of earlier versions, and what may change on resume; test_train.py resumes runs of this version."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TINY, Run
from filelock import FileLock
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

from language_model.files import ROOT
from language_model.model.dropout import Dropout
from language_model.runs import announce, fit
from language_model.runs.folder import read_config, read_settings
from language_model.runs.moved_names import MODULES, MOVED, with_current_names
from language_model.runs.records import read_result
from language_model.runs.resume import can_change_on_resume
from language_model.training.callbacks import BestCheckpoint, RestoreBest, Sample
from language_model.training.log_files import read_rows

# A run of commit 0a1ae00 (before the package had folders), killed in its last epoch. Where it was written stands as
# PROJECT, FOLDER and CACHE in its config.
HALF_RUN = ROOT / "tests" / "stored_half_run"
# What the same command logged there when nothing interrupted it: the mean training loss of each epoch.
LOSSES = [3.5634, 2.9202, 2.5746]


@pytest.fixture
def half_run(tmp_path: Path) -> Path:
    folder = tmp_path / "half"
    shutil.copytree(HALF_RUN, folder)
    config = (folder / "config.yaml").read_text()
    for name, path in (("PROJECT", ROOT), ("FOLDER", folder), ("CACHE", tmp_path / "corpora")):
        config = config.replace(name, path.as_posix())
    (folder / "config.yaml").write_text(config)
    return folder


def rounded_dropout(self: Dropout, x: torch.Tensor) -> torch.Tensor:
    """Dropout as that version had it, with p rounded to a multiple of 1/256: 0.1 was 0.1016."""
    if not self.training:
        return x
    dropped = round(self.p * 256)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),)).view(torch.int8)
    keep = bits[: x.numel()].view(x.shape) >= dropped - 128
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))


def test_a_run_of_an_earlier_version_resumes(train, half_run: Path) -> None:
    """Its dropout is exact from here on, so that its losses are not quite those it would have had."""
    run = train(f"resume={half_run}", name="half", tiny=False)
    assert run.losses == pytest.approx(LOSSES, abs=0.01)
    assert run.result["steps"] == 90


def test_with_its_dropout_it_resumes_to_what_it_would_have_come_to(
    train, half_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dropout, "forward", rounded_dropout)
    run = train(f"resume={half_run}", name="half", tiny=False)
    assert "resuming from" in run.output
    assert run.losses == pytest.approx(LOSSES, abs=2e-4)
    assert run.result["steps"] == 90
    assert run.config["model"]["_target_"] == "language_model.model.gpt.GPT"
    assert run.column("step")[-1] == 89
    earlier = next((HALF_RUN / "tensorboard").iterdir())
    assert (half_run / earlier.name).is_file()  # moved to where event files are now
    assert not list((half_run / "tensorboard").iterdir())


def test_it_knows_its_best_value(train, half_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which that version saved under the name of Lightning's class."""
    content = torch.load(half_run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (saved,) = (state["best_model_score"] for key, state in content.items() if "n_epochs': 1," in key)
    restored = []
    monkeypatch.setattr(BestCheckpoint, "on_train_start", lambda self, *_: restored.append(self.best_model_score))
    train(f"resume={half_run}", name="half", tiny=False)
    assert restored == [saved]


def test_another_setting_of_an_earlier_version_is_refused(train, half_run: Path) -> None:
    with pytest.raises(SystemExit, match=r"optimizer.lr=0.01 then, 0.02 now"):
        train(f"resume={half_run}", "optimizer.lr=0.02", name=None, tiny=False)


def test_every_moved_name_is_one_of_today() -> None:
    import pkgutil

    for new in (*MODULES.values(), *MOVED.values()):
        assert pkgutil.resolve_name(f"language_model.{new}")


def test_names_of_earlier_versions_are_read_as_those_of_today(tmp_path: Path) -> None:
    old = {
        "model": {"_target_": "language_model.gpt.GPT", "attention": "plain"},
        "data": {"path": "a=b"},
        "trainer": {},
        "optimizer": {},
    }
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    model = {"_target_": "language_model.model.gpt.GPT", "attention": "unfused"}
    assert read_config(tmp_path).model == model
    assert read_settings(tmp_path)["data.path"] == "a=b"
    overrides = ["model.attention=plain", "data.path=plain", "optimizer._target_=language_model.optim.muon", "seed=1"]
    assert with_current_names(overrides) == [
        "model.attention=unfused", "data.path=plain",
        "optimizer._target_=language_model.training.optimizer.muon", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("++model.attention='plain'", "++model.attention='unfused'"),
        ("+x={_target_:language_model.callbacks.Sample}", "+x={_target_:language_model.training.callbacks.Sample}"),
        ("language_model.checkpoint.Last", "language_model.training.checkpoint.LastCheckpoint"),
        ("language_model.data.datamodule.TextData", "language_model.data.datamodule.TextData"),
        ({"model.attention": ["plain", "fused"]}, {"model.attention": ["unfused", "fused"]}),
        (3, 3),
    ],
)  # fmt: skip
def test_names_are_found_wherever_a_user_could_have_typed_them(old, new) -> None:
    assert with_current_names(old) == new
    assert with_current_names(new) == new


def test_the_uniform_baseline_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"guessing_loss": 3.76}))
    assert read_result(tmp_path) == {"uniform_baseline": 3.76}
    assert read_result(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("key", "can_change"),
    [("trainer.max_epochs", True), ("callbacks.sample.prompt", True), ("optimizer.lr", False), ("seed", False)],
)
def test_how_a_run_is_watched_may_change_and_what_it_computes_not(key: str, can_change: bool) -> None:
    assert can_change_on_resume(key) == can_change


def kill(*_: object, **__: object) -> None:
    raise Killed


class Killed(BaseException):
    """Ends a run where it is raised, without anything that would be done for an error."""


def hparams_entries(folder: Path) -> int:
    return sum(file.read_bytes().count(b"_hparams_/session_start_info") for file in folder.glob("events.*"))


def files_of_training(folder: Path) -> dict[str, bytes]:
    files = [folder / "metrics.csv", *(folder / "checkpoints").iterdir()]
    return {file.name: file.read_bytes() for file in files}


EARLY = ["trainer.max_epochs=20", "callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=100"]
INSIDE_AN_EPOCH = ["trainer.max_epochs=-1", "trainer.max_steps=11"]
VALIDATED = ["data.val_fraction=0.3", "model.dropout=0.3"]
# Where no validation was due, so that one is made after the last epoch.
EARLY_BETWEEN_VALIDATIONS = [*EARLY, *VALIDATED, "monitor=train/loss_epoch", "trainer.check_val_every_n_epoch=7"]


@pytest.mark.parametrize(
    "ends_by",
    [[], EARLY, INSIDE_AN_EPOCH, EARLY_BETWEEN_VALIDATIONS],
    ids=["epochs", "early", "steps", "early, between validations"],
)
@pytest.mark.parametrize("by_resume", [False, True])
def test_a_trained_run_that_failed_in_its_last_sample_is_concluded(
    train, monkeypatch: pytest.MonkeyPatch, ends_by: list[str], by_resume: bool
) -> None:
    whole = train(*ends_by, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(Sample, "generate_sample", kill)
        with pytest.raises(Killed):
            train(*ends_by)
    folder = whole.folder.parent / "run"
    trained = files_of_training(folder)
    again = [f"resume={folder}"] if by_resume else ends_by
    run = train(*again, tiny=not by_resume)
    assert ("val/loss" in run.result["metrics"]) == (ends_by == EARLY_BETWEEN_VALIDATIONS)
    assert "it is trained: what comes after the training is left" in run.output
    assert files_of_training(folder) == trained
    assert hparams_entries(folder) == hparams_entries(whole.folder) == 1
    different = ("seconds", "tokens_per_sec", "mfu", "best_checkpoint")
    ours, theirs = ({k: v for k, v in each.result.items() if k not in different} for each in (run, whole))
    for result in (ours, theirs):
        result["metrics"].pop("train/tokens_per_sec")
    assert ours == theirs
    assert run.result["seconds"] > 0.05  # those of the training too


@pytest.mark.parametrize("place", ["log_hyperparameters", "write_json"])
def test_a_run_killed_while_it_writes_its_result_gets_it_once(
    train, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(announce if place == "log_hyperparameters" else fit, place, kill)
        with pytest.raises(Killed):
            train()
    run = train()
    assert run.result["status"] == "finished"
    assert hparams_entries(run.folder) == 1
    assert "nothing is left to train" in train().output
    assert hparams_entries(run.folder) == 1


def test_an_older_run_whose_result_is_lost_gets_it(train) -> None:
    """Its checkpoint does not say that it is trained, but has all the steps."""
    first = train()
    file = first.folder / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    del content["limits"], content["seconds"]
    torch.save(content, file)
    (first.folder / "result.json").unlink()
    trained = files_of_training(first.folder)
    again = train()
    assert files_of_training(first.folder) == trained
    assert {**again.result, "seconds": 0} == {**first.result, "seconds": 0}


def test_the_result_of_a_shorter_run_is_not_that_of_the_longer(train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after the longer run has written its settings, and before its first step."""
    train()
    longer = ["trainer.max_epochs=3", "total_steps=24"]
    train("total_steps=24")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "train", kill)
        with pytest.raises(Killed):
            train(*longer)
    assert len(train(*longer).losses) == 3


def test_a_run_goes_on_inside_the_epoch_in_which_its_steps_ended(train) -> None:
    same = ["trainer.max_epochs=-1", "total_steps=32", "model.dropout=0.3"]
    whole = train(*same, "trainer.max_steps=20", name="whole")
    train(*same, "trainer.max_steps=12")
    longer = train(*same, "trainer.max_steps=20")
    assert longer.column("train/loss") == whole.column("train/loss")
    assert longer.losses == whole.losses
    assert longer.result["epochs"] == whole.result["epochs"] == 2


def test_a_callback_or_a_logger_may_come_and_go(train, tmp_path: Path) -> None:
    added = [
        "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}",
        f"+logger.more={{_target_: language_model.training.log_files.TableLogger, save_dir: {tmp_path / 'more'}}}",
    ]
    same = ["total_steps=40", "model.dropout=0.3"]
    whole = train(*same, "trainer.max_epochs=5", name="whole")
    train(*same)
    train(*same, *added, "trainer.max_epochs=3")
    train(*same, "trainer.max_epochs=4")
    without = train(*same, "callbacks.early_stopping=null", "callbacks.every=null", "trainer.max_epochs=5")
    assert without.losses == whole.losses
    assert (tmp_path / "more" / "metrics.csv").exists()
    with pytest.raises(SystemExit, match=r"early_stopping.patience=1000 then, 3 now"):
        train(*same, "callbacks.early_stopping.patience=3", "trainer.max_epochs=6", name="whole")


def test_a_run_that_stopped_early_goes_on_without_early_stopping(train) -> None:
    stopped = train(*EARLY, "total_steps=160")
    assert stopped.result["epochs"] == 3
    longer = train("trainer.max_epochs=5", "total_steps=160", "callbacks.early_stopping=null")
    assert longer.result["epochs"] == 5
    assert "stopped_early" not in longer.result
    assert "restored_best" not in longer.result


def start(code: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a process with these overrides as sys.argv, which can be told to go on by a line on its standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *overrides],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    said = []
    for said_now in process.stdout:
        said.append(said_now)
        if line in said_now:
            return
    pytest.fail("".join(said))


PLAN_THEN_FIT = """
import sys
import zipfile
from language_model import fit, plan
from language_model.runs.config import ConfigError
run = plan(*sys.argv[1:])
print("planned", flush=True)
input()
try:
    print("status", fit(run)["status"])
except ConfigError as error:
    print("refused", error)
"""


@pytest.mark.parametrize(
    ("other", "says"),
    [([], "nothing is left to train\nstatus finished"), (["model.d_ff=8"], "trained with other settings: model.d_ff=")],
)
def test_a_folder_is_looked_at_again_behind_its_lock(train, corpora: str, other: list[str], says: str) -> None:
    """Another process has planned a run of the same new name; this one trains it first, and holds the lock."""
    folder = Path(corpora.partition("=")[2]).parent / f"race{len(other)}"
    second = start(PLAN_THEN_FIT, *TINY, corpora, f"folder={folder}", *other)
    wait_for(second, "planned")
    train(f"folder={folder}", name=None)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    lock = FileLock(folder / ".lock", is_singleton=True)  # the one that this process took
    assert second.stdin is not None
    second.stdin.write("\n")
    second.stdin.flush()
    wait_for(second, "waiting  for the process that is training")
    lock.release(force=True)
    said, _ = second.communicate(timeout=120)
    assert says in said
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_run_killed_before_it_wrote_its_settings_starts_again(train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert train().result["status"] == "finished"


def test_another_number_of_processes_says_what_a_step_takes(train) -> None:
    first = train("total_steps=24")
    file = first.folder / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["random_state"] *= 2
    torch.save(content, file)
    said = train("total_steps=24", "trainer.max_epochs=3").output
    assert "saved by 2 processes and this run has 1: from here on a step takes 512 tokens instead of 1,024" in said
    assert "to keep them: trainer.devices=2" in said


def flip_a_bit(file: Path) -> None:
    """Of the first weight."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        weight = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
        content[content.index(archive.read(weight)) + 2] ^= 8
    file.write_bytes(content)


def test_a_flipped_bit_in_a_checkpoint_is_found(train) -> None:
    first = train("total_steps=24")
    checkpoints = first.folder / "checkpoints"
    flip_a_bit(checkpoints / "last.ckpt")
    with pytest.raises(
        SystemExit, match=r"^error: resume: .*/last\.ckpt is damaged: the checksum of archive/data/0 diff"
    ):
        train("total_steps=24", f"resume={checkpoints / 'last.ckpt'}", "trainer.max_epochs=3", name="other")
    longer = train("total_steps=24", "trainer.max_epochs=3")
    assert "last.ckpt is damaged: the checksum of archive/data/0 differs; resuming from " in longer.output
    for file in checkpoints.iterdir():
        flip_a_bit(file)
    with pytest.raises(SystemExit, match=r"^error: .*no checkpoint to resume from; remove .* to start again$"):
        train("total_steps=24", "trainer.max_epochs=4")


def figures(run: Run) -> list[dict[str, str]]:
    """The rows of metrics.csv, without the speed."""
    return [
        {name: value for name, value in row.items() if name != "train/tokens_per_sec"}
        for row in read_rows(run.folder / "metrics.csv")
        if row["train/tokens_per_sec"] == "" or row["train/loss"]
    ]


def assert_same_weights(run: Run, other: Run) -> None:
    weights, theirs = (each.checkpoint("last")["state_dict"] for each in (run, other))
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


class Failing(L.Callback):
    """Fails in a hook, as for a full disk, at or after a batch."""

    def __init__(self, hook: str, batches: int) -> None:
        def fail(trainer: L.Trainer, *_: object) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx >= batches:
                raise OSError(errno.ENOSPC, "No space left on device")

        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_that_failed_after_a_step_goes_on_as_if_it_had_not(train, hook: str, accumulated: int) -> None:
    same = [
        *VALIDATED, f"trainer.accumulate_grad_batches={accumulated}", "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1", "callbacks.last.every_n_steps=2",
    ]  # fmt: skip
    whole = train(*same, name="whole")
    failing = f"+callbacks.failing={{_target_:test_resume.Failing,hook:{hook},batches:4}}"
    with pytest.raises(SystemExit, match="the disk is full"):
        train(*same, failing)
    run = train(*same)
    assert "resuming from" in run.output
    assert_same_weights(run, whole)
    assert figures(run) == figures(whole)


@pytest.mark.parametrize(
    "ends_by",
    [["trainer.max_epochs=-1", "trainer.max_steps=7", "trainer.val_check_interval=3"], ["trainer.max_epochs=1"]],
    ids=["inside an epoch", "at its end"],
)
def test_a_run_goes_on_from_its_best_checkpoint_to_the_same_weights(train, ends_by: list[str]) -> None:
    """Which is saved in the middle of what Lightning does after a step."""
    same = [*VALIDATED, "total_steps=16"]
    whole = train(*same, name="whole")
    first = train(*same, *ends_by)
    assert first.checkpoint("best")["global_step"] == first.result["steps"]
    flip_a_bit(first.folder / "checkpoints" / "last.ckpt")
    longer = train(*same, *ends_by, "trainer.max_epochs=2", "trainer.max_steps=16")
    assert "resuming from " in longer.output
    assert "best.ckpt" in longer.output
    assert_same_weights(longer, whole)


@pytest.mark.parametrize("from_best", [False, True])
def test_a_run_that_stopped_inside_an_accumulation_goes_on_with_all_batches_of_the_step(train, from_best: bool) -> None:
    same = [
        *VALIDATED, "total_steps=8", "trainer.limit_train_batches=16", "trainer.accumulate_grad_batches=4",
        "trainer.val_check_interval=5", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    whole = train(*same, "callbacks.early_stopping=null", name="whole")
    stopped = train(*same, "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100")
    assert stopped.result["unfinished_epoch"]["steps"] == 3  # the last of them not taken
    assert stopped.result["steps"] == stopped.checkpoint("best")["global_step"] == 2
    if from_best:
        flip_a_bit(stopped.folder / "checkpoints" / "last.ckpt")
    longer = train(*same, "callbacks.early_stopping=null")
    assert_same_weights(longer, whole)
    assert longer.column("train/loss") == whole.column("train/loss")
    assert longer.losses == whole.losses


def started_on_two_processes(folder: Path, corpora: str, *overrides: str) -> subprocess.Popen[str]:
    """Start a data-parallel run, and wait for its first checkpoint."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *TINY, corpora, f"folder={folder}", *overrides]
    process = subprocess.Popen(
        [*command, "trainer.devices=2", "trainer.strategy=ddp", "callbacks.console.log_interval=1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_for(process, "Epoch   0")
    return process


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("sent", "to_all", "status"), [("SIGTERM", 0, 143), ("SIGTERM", 1, 143), ("SIGINT", 1, 130)])
def test_a_signal_stops_all_processes_at_one_step(
    train, corpora: str, tmp_path: Path, sent: str, to_all: int, status: int
) -> None:
    """One alone would wait for the others for good, with the lock held."""
    process = started_on_two_processes(tmp_path / "two", corpora, "trainer.max_epochs=100000")
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, sent))
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, said
    assert said.count("resume with: python") == 1
    stopped = Run(tmp_path / "two")
    assert stopped.result["status"] == "interrupted"
    assert stopped.checkpoint("last")["global_step"] == stopped.result["steps"] > 0
    assert len(stopped.checkpoint("last")["random_state"]) == 2
    lock = FileLock(tmp_path / "two" / ".lock")
    lock.acquire(timeout=0)
    lock.release()


def test_a_run_that_goes_on_has_not_stopped_early() -> None:
    stopping = EarlyStopping("val/loss")
    stopping.load_state_dict(stopping.state_dict() | {"stopped_epoch": 3, "stopping_reason_message": "no improvement"})
    RestoreBest().on_train_start(SimpleNamespace(callbacks=[stopping]), None)
    assert not stopping.stopped_epoch
    assert not stopping.stopping_reason_message
