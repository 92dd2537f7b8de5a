"""What a run writes to the terminal while it trains."""

import math
import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from pydantic import PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from language_model.terminal import JOB_LABEL, log, terminal
from language_model.training.final_validation import ends_with_this_batch


class Console(ProgressBar):
    """Shows one progress bar over all steps, and logs a line every few epochs.

    Args:
        log_interval: epochs between lines; a validation inside an epoch gets a line of its own.
    """

    def __init__(self, log_interval: PositiveInt = 5) -> None:
        super().__init__()
        self.log_interval = log_interval
        self._bar: Progress | None = None
        self._enabled = True
        self._started = 0.0
        self._logged_epoch = -1

    def disable(self) -> None:
        """Show nothing, on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar and the lines."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what the lines hold, and show the bar, if the output is a terminal."""
        self._started = time.perf_counter()
        if self._enabled:
            log.info("lines    Loss: mean of the epoch so far | LR: of the last step | Time: since this start")
        if self._enabled and terminal.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=terminal,
                transient=True,
                refresh_per_second=4,
            )
            total = trainer.estimated_stepping_batches
            self._bar.add_task(
                os.environ.get(JOB_LABEL, "step"),
                total=None if math.isinf(total) else total,
                completed=trainer.global_step,
                values="",
            )
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the bar every `log_every_n_steps` steps."""
        if self._bar is None or trainer.global_step % trainer.log_every_n_steps:
            return
        values = trainer.callback_metrics
        shown = f"loss {values['train/loss']:.4f} · lr {values['lr']:.2e}" if "train/loss" in values else ""
        if "train/tokens_per_sec" in values:
            shown += f" · {values['train/tokens_per_sec']:,.0f} tokens/s"
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, values=shown)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the epoch's line, if it is due."""
        if trainer.current_epoch % self.log_interval == 0:
            self._log_epoch(trainer, pl_module, trainer.current_epoch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log a line for a validation inside an epoch."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and not trainer.is_last_batch and not ends_with_this_batch(trainer):  # else the epoch's line follows
            self._log(trainer, pl_module, f"Step {trainer.global_step:,}")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the last epoch's line, and remove the bar."""
        self._close()
        self._log_epoch(trainer, pl_module, trainer.current_epoch - 1)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _log_epoch(self, trainer: L.Trainer, pl_module: Any, epoch: int) -> None:
        if epoch > self._logged_epoch:
            self._logged_epoch = epoch
            unfinished = "" if pl_module.epoch_is_complete else f" until step {trainer.global_step:,}"
            self._log(trainer, pl_module, f"Epoch {epoch:3d}{unfinished}")

    def _log(self, trainer: L.Trainer, pl_module: Any, when: str) -> None:
        loss = pl_module.mean_epoch_loss()  # by all processes together
        if not self._enabled:
            return
        parts = [when, f"Loss: {loss:.4f}"]
        if "val/loss" in trainer.callback_metrics:
            earlier = pl_module.validated_step != trainer.global_step
            of = f" (step {pl_module.validated_step:,})" if earlier and pl_module.validated_step is not None else ""
            parts.append(f"Val loss: {trainer.callback_metrics['val/loss']:.4f}{of}")
        parts += [f"LR: {pl_module.last_lr:.6f}", f"Time: {time.perf_counter() - self._started:.1f}s"]
        log.info(" | ".join(parts))
