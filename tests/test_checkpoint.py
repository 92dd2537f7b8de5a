import errno
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from language_model.runs import fit
from language_model.runs.config import ConfigError
from language_model.runs.load import load_checkpoint
from language_model.training.checkpoint import (
    AtomicCheckpointIO,
)
from language_model.training.checkpoint_file import CheckpointError, read_checkpoint
from language_model.training.log_files import EventLogger, TableLogger, log_file_lengths, read_rows, truncate_logs
from language_model.training.random_state import get_random_state, set_random_state, to_plain_values


def test_a_checkpoint_is_written_and_read(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weight": torch.arange(3)}, tmp_path / "deep" / "last.ckpt")
    assert torch.equal(
        io.load_checkpoint(tmp_path / "deep" / "last.ckpt", weights_only=True)["weight"], torch.arange(3)
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"last.ckpt could not be written: the disk is full; the checkpoint before it is whole"
    ):
        io.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_every_generator_comes_back(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second number for the next call
    torch.save(to_plain_values(get_random_state()), tmp_path / "state")
    drawn = [(torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.rand()) for _ in range(3)]
    random.seed(5)
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [(torch.rand(3).tolist(), random.gauss(0, 1), random.random(), np.random.rand()) for _ in range(3)] == drawn


def loggers(folder: Path) -> L.Trainer:
    made = [
        EventLogger(str(folder)),
        TableLogger(str(folder), flush_logs_every_n_steps=100),
    ]
    return L.Trainer(logger=made, accelerator="cpu", enable_checkpointing=False, barebones=False)


def log(trainer: L.Trainer, first: int, last: int, **more: float) -> None:
    for step in range(first, last):
        for logger in trainer.loggers:
            logger.log_metrics({"loss": step / 2, **more}, step)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("earlier_version", [False, True])
def test_metrics_files_are_cut_to_what_they_were(tmp_path: Path, earlier_version: bool) -> None:
    """Also when a column comes to metrics.csv only after the checkpoint, and when events are where they once were."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    trainer = loggers(killed)
    log(trainer, 0, 5)
    (killed / "config.yaml").write_text("seed: 0")
    length = log_file_lengths(trainer, killed)
    assert length["metrics.csv"] == 5
    assert len(length) == 2
    log(trainer, 5, 8, accuracy=0.5)
    for logger in trainer.loggers:
        logger.finalize("failed")
    if earlier_version:
        (killed / "tensorboard").mkdir()
        for file in killed.glob("events.*"):
            file.rename(killed / "tensorboard" / file.name)
    trainer = loggers(killed)
    (killed / "metrics.csv").write_text((killed / "metrics.csv").read_text() + "0.5,4.")  # half a row
    truncate_logs(trainer, tmp_path / "another", {})
    truncate_logs(trainer, killed, length)
    log(trainer, 5, 9, accuracy=0.25)
    for logger in trainer.loggers:
        logger.finalize("success")
    trainer = loggers(whole)
    log(trainer, 0, 5)
    log(trainer, 5, 9, accuracy=0.25)
    for logger in trainer.loggers:
        logger.finalize("success")
    assert (killed / "config.yaml").read_text() == "seed: 0"
    assert read_rows(killed / "metrics.csv") == read_rows(whole / "metrics.csv")
    points = []
    for folder in (killed, whole):
        events = EventAccumulator(str(folder)).Reload()
        points.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert points[0] == points[1]
    assert len(points[0]["loss"]) == 9


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"no checkpoint at all", b"\x80\x02."])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"last.ckpt is damaged, or not a checkpoint"):
        load_checkpoint(tmp_path / "last.ckpt")


def test_other_peoples_files_are_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "theirs.pt")
    with pytest.raises(ConfigError, match=r"theirs.pt is not a checkpoint of a run"):
        load_checkpoint(tmp_path / "theirs.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "theirs.pt")
    with pytest.raises(ConfigError, match=r"theirs.pt holds more than numbers and text, .*: refused"):
        load_checkpoint(tmp_path / "theirs.pt")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    content = {"global_step": 3, "loops": {}, "state_dict": {"weight": torch.randn(300), "bias": torch.randn(7)}}
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(file: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_no_flipped_bit_changes_what_is_read(checkpoint: Path) -> None:
    """Each is refused, or lies where nothing is read from, between the entries of the archive."""
    whole, expected = checkpoint.read_bytes(), read_checkpoint(checkpoint, "cpu")
    refused = []
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        checkpoint.write_bytes(damaged)
        try:
            content = read_checkpoint(checkpoint, "cpu")
        except CheckpointError as error:
            refused.append(str(error))
        else:
            weights = content["state_dict"]
            assert all(torch.equal(weights[name], weight) for name, weight in expected["state_dict"].items())
    assert len(refused) > 100
    assert all(re.fullmatch(r".*last.ckpt (is damaged|would unpack|holds|has a tensor).*", said) for said in refused)


def test_a_damaged_entry_is_named(checkpoint: Path) -> None:
    whole = bytearray(checkpoint.read_bytes())
    whole[whole.index(entries(checkpoint)["last/data/0"]) + 5] ^= 1
    checkpoint.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged: the checksum of last/data/0 differs"):
        AtomicCheckpointIO().load_checkpoint(checkpoint, weights_only=True)  # as lightning does, in trainer.fit


def test_an_archive_that_unpacks_to_more_is_refused(checkpoint: Path) -> None:
    content = entries(checkpoint) | {"last/data/9": bytes(10_000_000)}
    write_archive(checkpoint, content, zipfile.ZIP_DEFLATED)
    assert checkpoint.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="would unpack to more than its size: refused"):
        read_checkpoint(checkpoint)


def test_no_entry_hides_another_ones_code(checkpoint: Path) -> None:
    code = pickle.dumps(bytearray(9), protocol=2)
    write_archive(checkpoint, {"last/x/data.pkl": b"N."} | entries(checkpoint) | {"last/data.pkl": code})
    with pytest.raises(CheckpointError, match="holds more than numbers, tensors and text: refused"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, device: str) -> None:
    torch.save({"weight": torch.zeros(1).expand(10**10)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(10000000000,\) that takes more memory than is st"):
        read_checkpoint(tmp_path / "x.ckpt", device)
    torch.save({"weight": torch.zeros(5).to_sparse()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="takes more memory than is stored"):
        read_checkpoint(tmp_path / "x.ckpt", device)


def test_a_number_that_would_become_an_array_of_bytes_is_refused(checkpoint: Path) -> None:
    code = b"\x80\x02cbuiltins\nbytearray\nJ" + (2**31 - 1).to_bytes(4, "little") + b"\x85R."
    write_archive(checkpoint, entries(checkpoint) | {"last/data.pkl": code})
    with pytest.raises(CheckpointError, match="holds more than numbers, tensors and text: refused"):
        read_checkpoint(checkpoint)


def test_a_bare_pickle_is_refused_in_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd) -> None:
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(CheckpointError, match=r"x\.ckpt is damaged, or not a checkpoint") as refused:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(refused.value)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


FULL_DISK = """
import resource, runpy, sys
size, script, *sys.argv[1:] = sys.argv[1:]
import language_model.runs.fit
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))  # as a disk without space, for larger files
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit for the size of files")
@pytest.mark.parametrize(
    ("size", "file"),
    [
        pytest.param(100, "overrides.yaml could not be written", marks=pytest.mark.slow),
        pytest.param(2_000, "config.yaml could not be written", marks=pytest.mark.slow),
        (6_000, "last.ckpt could not be written: file too large; the checkpoint before it is whole"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_in_one_line(
    corpora: str, tmp_path: Path, shared_run: Run, size: int, file: str
) -> None:
    assert shared_run  # the corpus is prepared
    command = [sys.executable, "-c", FULL_DISK, str(size), str(ROOT / "scripts" / "train.py"), *TINY, corpora]
    command.append(f"folder={tmp_path / 'run'}")
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # its file is large
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=unmeasured)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{file}.*\n", done.stderr), done.stderr
    assert "Traceback" not in done.stdout
    for left in (tmp_path / "run").rglob("*"):
        assert not left.name.endswith((".tmp", ".partial"))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refused_for_a_full_disk(train, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(*overrides)
    message = str(stopped.value)
    assert "the disk is full" in message
    assert "\n" not in message
    return message


def test_rows_that_cannot_be_written_leave_those_before(train, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train("total_steps=24")
    before = read_rows(first.folder / "metrics.csv")
    real = Path.open

    def open_on_a_full_disk(path: Path, mode: str = "r", *args: object, **more: object):
        opened = real(path, mode, *args, **more)
        if path.name == "metrics.csv" and mode == "a":
            opened.write("0.5,")  # half a row
            opened.flush()
            opened.write = full
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_a_full_disk)
        longer = ["total_steps=24", "trainer.max_epochs=3"]
        assert "metrics.csv could not be written" in refused_for_a_full_disk(train, *longer)
    assert read_rows(first.folder / "metrics.csv") == before
    assert len(train(*longer).losses) == 3


@pytest.mark.parametrize("what", ["result.json", "events", "checkpoint"])
def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(
    train, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole = train(name="whole")
    with monkeypatch.context() as patch:
        if what == "result.json":
            patch.setattr(fit, "write_json", full)
        elif what == "events":
            patch.setattr(RecordWriter, "write", full)
        else:
            patch.setattr(torch, "save", full)
        refused_for_a_full_disk(train)
    run = train()
    assert run.losses == whole.losses
    assert run.result["status"] == "finished"
