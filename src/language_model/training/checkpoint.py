"""Checkpoints: written whole or not at all, and complete enough to resume to the same bits."""

import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pydantic import PositiveInt

from language_model.files import write_errors
from language_model.terminal import log
from language_model.training.checkpoint_file import read_checkpoint, with_paths_in
from language_model.training.log_files import log_file_lengths
from language_model.training.module import NonFiniteError, batches_of_unfinished_step
from language_model.training.random_state import RandomState, get_random_state, set_random_state, to_plain_values


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, syncs it to disk, and renames it.

    After a kill, a full disk or a power cut, the file at the path is whole: the new checkpoint or the one before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; OSError names the file, and the checkpoint before it is kept."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with write_errors(target, "; the checkpoint before it is whole"), temporary.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's writer, where the file's own error is
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what a checkpoint holds, on the CPU; raises as `read_checkpoint`."""
        return with_paths_in(read_checkpoint(Path(path), "cpu"), Path(path).resolve().parent)


class LastCheckpoint(Checkpoint):
    """Saves ``last.ckpt``, from which a run resumes to the same bits as if it had never stopped.

    It is saved between two optimizer steps, when everything that belongs to the step before is done (its validation
    and its logged metrics included): every `every_n_steps` steps, when the run is interrupted or a step fails, and at
    the end. A run that fails in what comes after a step (its validation, say) goes on from the one before.

    This callback also adds to every checkpoint of the run, whoever saves it, what exact resuming needs besides
    Lightning's own state: each process's random state, the position in the epoch, the latest values of the metrics,
    and the lengths of the files that these are logged to. And it adds `limits` to the one that is saved at the end, by
    which a run that was killed after it is known to be trained.

    Several processes tell each other of signals at the steps that are logged, and all stop at the same step: telling
    waits for the devices.

    Args:
        dirpath: the run's folder for checkpoints.
        every_n_steps: optimizer steps between two saves; None to save only when the run stops.
    """

    def __init__(self, dirpath: str, every_n_steps: PositiveInt | None = 500) -> None:
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.signal: int | None = None  # the signal that asked the run to stop
        self.limits: dict[str, Any] = {}  # that end the run; set by runs.fit
        self.started = time.perf_counter()  # seconds; as if the run had never been interrupted; set by runs.fit
        self._is_trained = False
        self._saved_step = -1
        self._start = (-1, -1)  # of this step, as `position`
        self._random_state: RandomState | None = None  # there
        self._to_restore: list[dict[str, Any]] | None = None
        self._metrics: dict[str, torch.Tensor] = {}

    def save(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt`` now."""
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.dirpath / "last.ckpt")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore the checkpoint's random state; from now on SIGTERM and Ctrl-C take effect when the step is done."""
        if self._to_restore is not None:
            self._saved_step = trainer.global_step
            trainer.callback_metrics.update(self._metrics)
            if len(self._to_restore) == trainer.world_size:
                set_random_state(self._to_restore[trainer.global_rank])
            else:
                warn_of_world_size(trainer, len(self._to_restore))
        if not SLURMEnvironment.detect():  # lightning's handlers requeue the job
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt  # a second signal stops at once
        self.signal = signum

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop if a signal asked for it, or save if it is time: everything of the steps before is done."""
        if self._to_restore is not None:  # lightning adds one where a validation was due
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._to_restore = None
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._random_state, self._start = get_random_state(), position(trainer)
        if trainer.world_size == 1 or trainer.global_step % trainer.log_every_n_steps == 0:
            self._share_signal(trainer)
            if self.signal is not None:
                raise SIGTERMException
        step = trainer.global_step
        if step > self._saved_step and (step == 0 or (self.every_n_steps and step % self.every_n_steps == 0)):
            self.save(trainer)

    def _share_signal(self, trainer: L.Trainer) -> None:
        """Of several processes, tell each of a signal that any of them got: one alone cannot stop or save."""
        if trainer.world_size > 1:
            number = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
            self.signal = int(trainer.strategy.reduce(number, reduce_op="max")) or None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the state after the last complete step, if nothing came after it and all processes are here."""
        stopped_by_lightning = isinstance(exception, SIGTERMException) and self.signal is None  # between two batches
        if stopped_by_lightning and not batches_of_unfinished_step(trainer):
            self._random_state, self._start = get_random_state(), position(trainer)
        found_late = isinstance(exception, NonFiniteError) and exception.step < trainer.global_step
        stopped_at_once = isinstance(exception, KeyboardInterrupt) or self._start != position(trainer)
        alone = trainer.world_size > 1 and not isinstance(exception, SIGTERMException | NonFiniteError)
        if stopped_at_once or found_late or alone:
            return  # keep the one before: of what comes with a step only a part is done, or it was not taken
        try:
            self.save(trainer)
        except OSError as error:
            if not isinstance(exception, OSError):
                log.warning(str(error))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the final state."""
        self._is_trained = True
        progress, done = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if 0 < done < trainer.num_training_batches:  # a run that goes on takes the rest of this epoch
            for counted in (progress.total, progress.current):
                counted.processed -= 1
                counted.completed -= 1
        self.save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore the metrics of a run that was trained already, so that `on_train_start` was not called."""
        if self._to_restore is not None:
            trainer.callback_metrics.update(self._metrics)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what exact resuming needs to any checkpoint."""
        begun = batches_of_unfinished_step(trainer)  # whose gradient is not saved: they are taken again
        set_counters_between_batches(checkpoint["loops"]["fit_loop"], trainer.global_step, begun)
        at_start = self._random_state if begun or self._start == position(trainer) else None
        state = to_plain_values(at_start or get_random_state())
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_state"] = states
        checkpoint["limits"] = self.limits if self._is_trained else None
        checkpoint["seconds"] = time.perf_counter() - self.started
        checkpoint["logs"] = log_file_lengths(trainer, self.dirpath.parent) if trainer.is_global_zero else {}
        checkpoint["metrics"] = {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the random state and the latest metrics until training starts."""
        self._to_restore = checkpoint.get("random_state")
        self._metrics = checkpoint.get("metrics", {})


def warn_of_world_size(trainer: L.Trainer, saved_by: int) -> None:
    """Warn that a checkpoint was saved by another number of processes, which changes the batch of a step."""
    data: Any = trainer.datamodule
    tokens = data.batch_size * data.seq_len * trainer.accumulate_grad_batches
    log.warning(
        f"the checkpoint was saved by {saved_by} processes and this run has {trainer.world_size}: from here on a step "
        f"takes {tokens * trainer.world_size:,} tokens instead of {tokens * saved_by:,}, and random numbers and the "
        f"order of the windows differ; to keep them: trainer.devices={saved_by}"
    )


def position(trainer: L.Trainer) -> tuple[int, int]:
    """Return the number of optimizer steps and of batches that a run has taken."""
    return trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.total.processed


def set_counters_between_batches(fit_loop: dict[str, Any], global_step: int, begun: int) -> None:
    """Set the saved loop counters to the moment between two steps, whichever hook the save happened in.

    The `begun` batches of a step that is not complete do not count.

    A checkpoint saved inside a hook makes Lightning skip or repeat the rest of that hook's work (a validation, the end
    of an epoch) when it resumes. Between two batches no such work is left.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    for counted in (batches["total"], batches["current"]):
        counted.update(dict.fromkeys(counted, counted["processed"] - begun))
    batches["is_last_batch"] = False
    if epochs["current"]["processed"] == epochs["current"]["started"]:  # the epoch is complete: the next one starts
        batches["current"].update(dict.fromkeys(batches["current"], 0))
        for counted in (epochs["total"], epochs["current"]):
            done = counted["processed"]
            counted.update(ready=done + 1, started=done + 1, completed=done)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step
