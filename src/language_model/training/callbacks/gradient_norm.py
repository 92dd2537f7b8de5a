"""Statistics of the gradient norm, and a warning when it stays far above the clip."""

from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from pydantic import Field, PositiveInt

from language_model.terminal import log


class GradientNorm(Callback):
    """Keeps statistics of the gradient norm before clipping, and warns once if it stays far above the clip value.

    A step whose norm is not finite changed no weights (float16 overflows at times): it is counted apart.

    Args:
        warn_factor: "far above" means more than this many times the clip value.
        warn_steps: number of such steps in a row before the warning.
    """

    def __init__(self, warn_factor: Annotated[float, Field(gt=0)] = 10.0, warn_steps: PositiveInt = 10) -> None:
        self.warn_factor = warn_factor
        self.warn_steps = warn_steps
        self.steps = 0
        # Sum, maximum, clipped steps, far steps in a row, longest such row, last norm, skipped steps.
        self._sums: torch.Tensor | None = None
        self._warned = False
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics, for a resumed run."""
        return {"steps": self.steps, "sums": self._sums, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics."""
        self.steps, self._sums, self._warned = state_dict["steps"], state_dict["sums"], state_dict["warned"]
        if self._sums is not None:  # of earlier versions: without the last two
            self._sums = torch.nn.functional.pad(self._sums, (0, 7 - len(self._sums)))

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
            self._sums = torch.zeros(7, device=norm.device)
        total, largest, clipped, row, longest, _, skipped = self._sums.unbind()
        row = (row + 1) * (norm > self.warn_factor * clip)
        taken = (total + norm, largest.maximum(norm), clipped + (norm > clip), row, longest.maximum(row), norm, skipped)
        left_out = torch.cat((self._sums[:-1], skipped[None] + 1))
        self._sums = torch.where(norm.isfinite(), torch.stack(taken), left_out)
        if step % trainer.log_every_n_steps == 0 and not self._warned and self._sums[4] >= self.warn_steps:
            self._warned = True
            log.warning(
                f"the gradient norm was above {self.warn_factor:g} times the clip of {clip:g} for "
                f"{self.warn_steps} steps in a row (now {norm:.3g}, step {step:,}): is the learning rate too high?"
            )

    def summary(self) -> dict[str, float]:
        """Return the largest, mean and last norm, the share of steps that were clipped, and the number of skipped ones.

        All but the last are of the steps that were taken.
        """
        if self._sums is None:
            return {}
        total, largest, clipped, _, _, last, skipped = self._sums.tolist()
        taken = self.steps - int(skipped)
        norms = {
            "grad_norm_max": largest,
            "grad_norm_mean": total / max(1, taken),
            "grad_norm_last": last,
            "clipped_share": clipped / max(1, taken),
        }
        return (norms if taken else {}) | {"skipped_steps": int(skipped)}
