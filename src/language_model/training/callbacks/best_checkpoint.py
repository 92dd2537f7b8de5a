"""The checkpoint with the best value of a metric."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves nothing while its metric was not logged.

    Lightning's own warns or fails then: in a run that ends inside its first epoch, for a metric of epochs.
    """

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints, as earlier versions have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
