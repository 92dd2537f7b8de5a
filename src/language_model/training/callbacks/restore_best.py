"""The best weights, restored after early stopping."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from language_model.terminal import log


class RestoreBest(Callback):
    """Restores the best weights at the end of a run that stopped early, and logs it."""

    def __init__(self) -> None:
        self.done = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore them, after the last weights were saved."""
        stopped = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)
        best = next((c.best_model_path for c in trainer.callbacks if getattr(c, "best_model_path", "")), "")
        if stopped and best:
            content = torch.load(best, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(content["state_dict"])
            self.done = True
            log.info(f"restored the best weights, those after step {content['global_step']:,}")
