"""Statistics of the gradient norm, and a warning when it stays far above the clip."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from pydantic import Field, PositiveInt

from language_model.terminal import log


class GradientNorm(Callback):
    """Keeps statistics of the gradient norm before clipping, and warns once if it stays far above the clip value.

    Args:
        warn_factor: "far above" means more than this many times the clip value.
        warn_steps: number of such steps in a row before the warning.
    """

    def __init__(self, warn_factor: Annotated[float, Field(gt=0)] = 10.0, warn_steps: PositiveInt = 10) -> None:
        self.warn_factor = warn_factor
        self.warn_steps = warn_steps
        self.steps = 0
        self._sums: torch.Tensor | None = None  # sum, maximum, clipped steps, far steps in a row, longest such row
        self._warned = False
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, for a resumed run."""
        return {"steps": self.steps, "sums": self._sums, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics."""
        self.steps, self._sums, self._warned = state_dict["steps"], state_dict["sums"], state_dict["warned"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note the first step."""
        self._last_step = trainer.global_step
        if self._sums is not None:
            self._sums = self._sums.to(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a step's norm, on its device: only logged steps wait for it."""
        step = trainer.global_step
        if step == self._last_step:
            return  # inside an accumulation
        self._last_step = step
        self.steps += 1
        norm = pl_module.grad_norm
        clip = trainer.gradient_clip_val or float("inf")
        if self._sums is None:
            self._sums = torch.zeros(5, device=norm.device)
        total, largest, clipped, row, longest = self._sums.unbind()
        row = (row + 1) * (norm > self.warn_factor * clip)
        self._sums = torch.stack(
            (total + norm, largest.maximum(norm), clipped + (norm > clip), row, longest.maximum(row))
        )
        if step % trainer.log_every_n_steps == 0 and not self._warned and self._sums[4] >= self.warn_steps:
            self._warned = True
            log.warning(
                f"the gradient norm was above {self.warn_factor:g} times the clip of {clip:g} for "
                f"{self.warn_steps} steps in a row (now {norm:.3g}, step {step:,}): is the learning rate too high?"
            )

    def summary(self, last: torch.Tensor) -> dict[str, float]:
        """Return the largest, mean and last norm, and the share of steps that were clipped."""
        if self._sums is None:
            return {}
        total, largest, clipped, _, _ = self._sums.tolist()
        return {
            "grad_norm_max": largest,
            "grad_norm_mean": total / self.steps,
            "grad_norm_last": float(last),
            "clipped_share": clipped / self.steps,
        }
