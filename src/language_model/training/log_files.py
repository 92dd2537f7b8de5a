"""The files that metrics are logged to, and cutting them back to their lengths at a checkpoint."""

import csv
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from language_model.files import write_errors, write_text

EVENT_FILES = "events.out.tfevents.*"

# TensorBoard sorts the groups by name and opens the first two: these metrics get one after train and val.
WATCHED = ("lr", "train/grad_norm", "train/mfu", "train/tokens_per_sec")


class EventLogger(TensorBoardLogger):
    """Writes event files and no other file; in TensorBoard the losses come first.

    Args:
        save_dir: the run's folder; its name is the run's name in TensorBoard.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False)
        threading.excepthook = print_traceback_unless_of_event_writer

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add metrics; those in `WATCHED` as ``watch/<name>``, the number of the epoch not at all."""
        tags = {name: f"watch/{name.removeprefix('train/')}" if name in WATCHED else name for name in metrics}
        super().log_metrics({tags[name]: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Add a row to HPARAMS; its columns are left to TensorBoard, which puts those first that differ."""
        self.log_metrics(metrics or {}, step)
        self.experiment._get_file_writer().add_summary(hparams(params, {})[1], step)

    def save(self) -> None:
        """Write what is still in memory."""
        self.experiment.flush()


def print_traceback_unless_of_event_writer(failed: threading.ExceptHookArgs) -> None:
    """Do as Python does, but for TensorBoard's thread: what it failed to write, it says to the main thread."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


class TableLogger(Logger):
    """Writes ``metrics.csv``, a row for each call. Where a row cannot be written, those before it stay.

    Args:
        save_dir: the run's folder.
        flush_logs_every_n_steps: steps between two writes.
    """

    name = version = save_dir = log_dir = ""

    def __init__(self, save_dir: str, flush_logs_every_n_steps: PositiveInt = 100) -> None:
        super().__init__()
        self.save_dir = self.log_dir = save_dir
        self.file = Path(save_dir) / "metrics.csv"
        self.flush_logs_every_n_steps = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.append(values | {"step": step})
        if step is not None and (step + 1) % self.flush_logs_every_n_steps == 0:
            self.save()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are still in memory; OSError if they cannot be written."""
        if not self._rows:
            return
        before = columns_of(self.file)
        columns = sorted({*before, *(name for row in self._rows for name in row)})
        if columns == before:
            append(self.file, table(columns, self._rows, header=False))
        else:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, table(columns, [*read_rows(self.file), *self._rows]))
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is still in memory."""
        self.save()


def columns_of(file: Path) -> list[str]:
    """Return the columns of a CSV file; none if there is no file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as opened:
        return next(csv.reader(opened), [])


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file by column; none if there is no file."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines() if file.exists() else []))


def table(columns: list[str], rows: list[dict[str, Any]], header: bool = True) -> str:
    """Return rows as CSV, empty where a row lacks a column."""
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def append(file: Path, text: str) -> None:
    """Add text to a file; if that fails, OSError, and the file is as it was."""
    length = file.stat().st_size
    with write_errors(file, "; the rows before are whole"):
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(text)
        except OSError:
            os.truncate(file, length)
            raise


def log_file_lengths(trainer: L.Trainer, folder: Path) -> dict[str, int]:
    """Flush the files in a run's folder that metrics are logged to; return the length of each.

    That is TensorBoard's in bytes and the tables' in rows, by the path within the folder.
    """
    found = {}
    for logger, place in loggers_in(trainer, folder):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            for file in place.glob(EVENT_FILES):
                found[path_within(folder, file)] = file.stat().st_size
        elif isinstance(logger, TableLogger):
            logger.save()
            found[path_within(folder, logger.file)] = len(read_rows(logger.file))
    return found


def truncate_logs(trainer: L.Trainer, folder: Path, length: dict[str, int]) -> None:
    """Cut the files back to their lengths at a checkpoint, so that a resumed run logs each step once.

    Args:
        trainer: its loggers write the files.
        folder: the run's; files outside it, which other runs may write to, are left alone.
        length: as `log_file_lengths` returns; files that are not listed are removed.
    """
    for logger, place in loggers_in(trainer, folder):
        if isinstance(logger, TensorBoardLogger):
            for file in (folder / "tensorboard").glob(EVENT_FILES):  # where earlier versions wrote them
                file.replace(place / file.name)
            for file in place.glob(EVENT_FILES):
                if path_within(folder, file) in length:
                    os.truncate(file, length[path_within(folder, file)])
                else:
                    file.unlink()
        elif isinstance(logger, TableLogger):
            rows = read_rows(logger.file)[: length.get(path_within(folder, logger.file), 0)]
            if rows:
                write_text(logger.file, table(list(rows[0]), rows))
            else:
                logger.file.unlink(missing_ok=True)


def loggers_in(trainer: L.Trainer, folder: Path) -> Iterator[tuple[Logger, Path]]:
    """Yield the loggers that write inside a folder, each with the place where."""
    for logger in trainer.loggers:
        place = Path(logger.log_dir or "").resolve()
        if place.is_relative_to(folder.resolve()):
            yield logger, place


def path_within(folder: Path, file: Path) -> str:
    """Return a file's path from the folder that it is in."""
    return file.resolve().relative_to(folder.resolve()).as_posix()
