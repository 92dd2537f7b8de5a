import errno
import os
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from language_model.runs.config import ConfigError
from language_model.runs.load import load_checkpoint
from language_model.training.checkpoint import (
    AtomicCheckpointIO,
)
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
