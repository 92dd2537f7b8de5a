"""What TensorBoard shows of a run besides its metrics."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import PositiveInt

from language_model.training.callbacks.throughput import Throughput

# Charts for several runs: a line for each run. The names of the metrics are patterns.
LAYOUT = {
    "runs": {
        "training loss": ["Multiline", ["^train/loss$"]],
        "validation loss": ["Multiline", ["^val/loss$"]],
        "learning rate, planned and actual": ["Multiline", ["^watch/lr_planned$", "^watch/lr$"]],
        "gradient norm": ["Multiline", ["^watch/grad_norm$"]],
    }
}


class Dashboard(Callback):
    """Charts of several runs, the planned learning rate, losses by tokens seen, and histograms if asked for.

    Args:
        histograms_every_n_steps: optimizer steps from one histogram of every weight and gradient to the next; None
            for no histograms, which take time and much disk.
    """

    def __init__(self, histograms_every_n_steps: PositiveInt | None = None) -> None:
        self.histograms_every_n_steps = histograms_every_n_steps
        self._begun = False
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run need not draw again."""
        return {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._begun = state_dict["begun"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Lay out the charts, and draw the planned learning rates."""
        self._last_step = trainer.global_step
        if self._begun:
            return
        self._begun = True
        steps = trainer.estimated_stepping_batches
        for writer in writers(trainer):
            writer.add_custom_scalars(LAYOUT)
            if np.isfinite(steps):
                for step in np.unique(np.linspace(0, max(0, steps - 1), 200).astype(int)).tolist():
                    writer.add_scalar("watch/lr_planned", pl_module.schedule(step), step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the training loss, at the steps that are logged."""
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            self._over_tokens(trainer, "train/loss")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add the validation loss."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._over_tokens(trainer, "val/loss")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Add the histograms, if it is time."""
        step = trainer.global_step + 1
        if self.histograms_every_n_steps and step % self.histograms_every_n_steps == 0:
            for writer in writers(trainer):
                for name, weight in pl_module.network.named_parameters():
                    writer.add_histogram(f"weights/{name}", weight.detach().float(), step)
                    if weight.grad is not None:
                        writer.add_histogram(f"weights_grad/{name}", weight.grad.float(), step)

    def _over_tokens(self, trainer: L.Trainer, metric: str) -> None:
        counts = [callback.tokens for callback in trainer.callbacks if isinstance(callback, Throughput)]
        if counts and metric in trainer.callback_metrics:
            for writer in writers(trainer):
                writer.add_scalar(f"x_axis_tokens/{metric}", trainer.callback_metrics[metric], counts[0])


def writers(trainer: L.Trainer) -> Iterator[Any]:
    """Yield TensorBoard's writers: one, or none on all processes but the first."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            yield logger.experiment
