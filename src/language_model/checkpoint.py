"""Checkpoints that a run can go on from as if nothing had happened: written whole or not at all, exact, harmless."""

import csv
import os
import random
import secrets
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pydantic import PositiveInt

from language_model.module import NonFiniteError
from language_model.terminal import log


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that it is on the disk, and moves it there in one step.

    So whatever happens, a kill, a full disk, a power cut, what stands there is whole: the new one or the one before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; OSError names the file and leaves the one before."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
            raise OSError(f"{target} could not be written ({error}); the checkpoint before it is whole") from error
        finally:
            beside.unlink(missing_ok=True)


class Last(Checkpoint):
    """Keeps ``last.ckpt``, from which a resumed run comes to the same bits as one that was never stopped.

    It is saved between two optimizer steps, when all that belongs to a step is done, its validation and its lines in
    the metrics among it: after every so many steps, when the run is stopped or fails, and at its end.

    Every checkpoint of the run, whoever saves it, gets what this takes besides Lightning's own state: the random
    state of each process, the position within the epoch, the metrics' newest values, and their files' lengths.

    Args:
        dirpath: the run's folder for checkpoints.
        every_n_steps: optimizer steps from one save to the next; None for none but the last.
    """

    def __init__(self, dirpath: str, every_n_steps: PositiveInt | None = 500) -> None:
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.signal: int | None = None  # that asked the run to stop
        self._saved_step = -1
        self._between_steps = True
        self._random_state: RandomState | None = None  # when this step began
        self._to_restore: list[dict[str, Any]] | None = None
        self._metrics: dict[str, torch.Tensor] = {}

    def save(self, trainer: L.Trainer) -> None:
        """Save now."""
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.dirpath / "last.ckpt")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Go on with the random state of the checkpoint; from now on SIGTERM and Ctrl-C wait for the step to end."""
        if self._to_restore is not None:
            self._saved_step = trainer.global_step
            trainer.callback_metrics.update(self._metrics)
            if len(self._to_restore) == trainer.world_size:
                set_random_state(self._to_restore[trainer.global_rank])
            else:
                log.warning(
                    f"the checkpoint is one of {len(self._to_restore)} processes and this run has "
                    f"{trainer.world_size}: what is drawn at random differs from here on"
                )
        if trainer.world_size == 1 and not SLURMEnvironment.detect():  # there lightning's own handlers know more
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._asked_to_stop)

    def _asked_to_stop(self, signum: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt  # at once
        self.signal = signum

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save, if it is time, or stop, if that was asked for: all that belongs to the steps before is done."""
        if self._to_restore is not None:  # lightning counts a step more if it would have validated just now
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._to_restore = None
        self._between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        if not self._between_steps:
            return
        self._random_state = get_random_state()
        if self.signal is not None:
            raise SIGTERMException
        step = trainer.global_step
        if step > self._saved_step and (step == 0 or (self.every_n_steps and step % self.every_n_steps == 0)):
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save what the steps before have come to."""
        stopped_by_lightning = isinstance(exception, SIGTERMException) and self.signal is None
        if stopped_by_lightning:  # behind a batch, and before the next one
            done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
            self._between_steps = done % trainer.accumulate_grad_batches == 0
            self._random_state = get_random_state()
        told_late = isinstance(exception, NonFiniteError) and exception.step < trainer.global_step
        stopped_at_once = isinstance(exception, KeyboardInterrupt) or not self._between_steps
        if self._random_state is None or stopped_at_once or told_late:
            return  # the last checkpoint stays: there was no step yet, or one is half done, or counted and was left out
        try:
            self.save(trainer)
        except OSError as error:
            log.warning(str(error))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end."""
        self._random_state = None
        if not trainer.fast_dev_run:
            self.save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add to any checkpoint what makes going on from it exact."""
        settle(checkpoint["loops"]["fit_loop"], trainer.global_step)
        state = plain(self._random_state or get_random_state())
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_state"] = states
        checkpoint["logs"] = lengths(trainer) if trainer.is_global_zero else {}
        checkpoint["metrics"] = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the random state, and the metrics' newest values, until the training starts."""
        self._to_restore = checkpoint.get("random_state")
        self._metrics = checkpoint.get("metrics", {})


def settle(fit_loop: dict[str, Any], global_step: int) -> None:
    """Set the loops' counters to a moment between two batches, wherever in lightning's hooks they were saved.

    Lightning's own way on from within a hook leaves out the rest of that hook's work (a validation, an epoch's end)
    or does it twice. Between two batches nothing is left to do.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    for counted in (batches["total"], batches["current"]):
        counted.update(dict.fromkeys(("ready", "started", "completed"), counted["processed"]))
    batches["is_last_batch"] = False
    if epochs["current"]["processed"] == epochs["current"]["started"]:  # an epoch is over: the next one begins
        batches["current"].update(dict.fromkeys(batches["current"], 0))
        for counted in (epochs["total"], epochs["current"]):
            done = counted["processed"]
            counted.update(ready=done + 1, started=done + 1, completed=done)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step


RandomState = tuple[torch.Tensor, torch.Tensor | None, tuple, Any]


def get_random_state() -> RandomState:
    """Return the state of every generator that a model may draw from: torch's, this GPU's, Python's, numpy's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=True)


def plain(state: RandomState) -> dict[str, Any]:
    """Return a random state for a checkpoint, as tensors and plain values."""
    torch_state, cuda, (version, internal, gauss), (name, keys, *rest) = state
    return {
        "torch": torch_state,
        "cuda": cuda,
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Make every generator what it was."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))


def lengths(trainer: L.Trainer) -> dict[str, int]:
    """Flush the metrics files, and return how long each is: bytes of TensorBoard's, rows of metrics.csv."""
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


def rewind(trainer: L.Trainer, folder: Path, length: dict[str, int]) -> None:
    """Cut the metrics files to what they were at a checkpoint, so that a resumed run writes each point once.

    Files outside the run's folder, which other runs may write to as well, stay as they are.
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
