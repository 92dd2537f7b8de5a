"""The files that metrics are logged to, and cutting them back to their lengths at a checkpoint."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

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


def log_file_lengths(trainer: L.Trainer) -> dict[str, int]:
    """Flush the files that metrics are logged to; return the length of each: TensorBoard's in bytes, CSV in rows."""
    found = {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            for file in Path(logger.log_dir).glob(EVENT_FILES):
                found[file.name] = file.stat().st_size
        elif isinstance(logger, CSVLogger):
            logger.save()
            file = Path(logger.log_dir) / "metrics.csv"
            found[file.name] = len(file.read_text().splitlines()) - 1 if file.exists() else 0
    return found


def truncate_logs(trainer: L.Trainer, folder: Path, length: dict[str, int]) -> None:
    """Cut the files back to their lengths at a checkpoint, so that a resumed run logs each step once.

    Args:
        trainer: its loggers write the files.
        folder: the run's; files outside it, which other runs may write to, are left alone.
        length: by file name, as `log_file_lengths` returns; files that are not listed are removed.
    """
    for logger in trainer.loggers:
        if not Path(logger.log_dir or "").resolve().is_relative_to(folder):
            continue
        if isinstance(logger, TensorBoardLogger):
            for file in (folder / "tensorboard").glob(EVENT_FILES):  # where earlier versions wrote them
                file.replace(Path(logger.log_dir) / file.name)
            for file in Path(logger.log_dir).glob(EVENT_FILES):
                if file.name in length:
                    os.truncate(file, length[file.name])
                else:
                    file.unlink()
        elif isinstance(logger, CSVLogger):
            file = Path(logger.log_dir) / "metrics.csv"
            reader = csv.DictReader(file.read_text().splitlines() if file.exists() else [])
            rows = list(reader)[: length.get(file.name, 0)]
            writer = logger.experiment  # which removes the file
            if rows:
                writer.metrics_keys = list(rows[0])
                with file.open("w", newline="") as opened:
                    table = csv.DictWriter(opened, writer.metrics_keys)
                    table.writeheader()
                    table.writerows(rows)
