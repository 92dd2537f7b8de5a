"""The best weights, restored after early stopping."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from language_model.terminal import log
from language_model.training.checkpoint_file import read_checkpoint


class RestoreBest(Callback):
    """Restores the best weights at the end of a run that stopped early, and logs it."""

    def __init__(self) -> None:
        self.restored_step: int | None = None  # after which the weights were the best

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Forget that a run which now goes on stopped early before."""
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping):
                callback.stopped_epoch, callback.stopping_reason_message = 0, None

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore them, after the last weights were saved."""
        stopped = any(isinstance(c, EarlyStopping) and c.stopping_reason_message for c in trainer.callbacks)
        kept = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = next((c.best_model_path for c in kept if c.best_model_path), "")
        if stopped and best:
            content = read_checkpoint(Path(best), "cpu")
            pl_module.load_state_dict(content["state_dict"])
            self.restored_step = content["global_step"]
            log.info(f"restored the best weights, those after step {self.restored_step:,}")
