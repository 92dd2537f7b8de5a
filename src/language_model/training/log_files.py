"""The files that metrics are logged to: their lengths at a checkpoint, and cutting them back to these."""

import csv
import os
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def log_file_lengths(trainer: L.Trainer) -> dict[str, int]:
    """Flush the files that metrics are logged to; return the length of each: TensorBoard's in bytes, CSV in rows."""
    found = {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
            for file in Path(logger.log_dir).iterdir():
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
            for file in Path(logger.log_dir).glob("*"):
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
