"""Tokens a second, and the share of the device's peak that is used."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from language_model.training.hardware import peak_flops
from language_model.training.module import is_asynchronous


class Throughput(Callback):
    """Logs ``train/tokens_per_sec``, over the steps since it was last logged, and keeps the mean over the run.

    Time is that of the steps and of loading their batches; validations and saves of checkpoints do not count.
    ``train/mfu`` is the share of the device's peak that is used, where that and the network's ``flops_per_token`` are
    known.
    """

    def __init__(self) -> None:
        self.tokens = 0  # that this run has trained on, over all devices
        self.seconds = 0.0
        self._last = (0, 0.0)  # tokens and seconds at the last log
        self._since: float | None = None  # when the clock was started; None while it stands
        self._device = torch.device("cpu")
        self._logged_step = 0
        self._peak_tokens: float | None = None  # tokens a second at the device's peak

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a resumed run; stops the clock, since a checkpoint is being saved."""
        self._stop()
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self._last = (self.tokens, self.seconds)

    @property
    def tokens_per_sec(self) -> float:
        """Mean over the run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Mean share of the devices' peak over the run; None if unknown."""
        return self.tokens_per_sec / self._peak_tokens if self._peak_tokens else None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note the first step and the device."""
        self._logged_step = trainer.global_step
        self._device = trainer.strategy.root_device

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, with its time; log every `log_every_n_steps` steps."""
        if self._since is None:  # the clock stood when the batch began
            self._since = pl_module.batch_started
            count = getattr(pl_module.network, "flops_per_token", None)
            peak = peak_flops(self._device, trainer.precision)
            self._peak_tokens = peak * trainer.world_size / count(batch[0].shape[1]) if count and peak else None
        self.tokens += batch[0].numel() * trainer.world_size
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            self._stop(restart=True)
            tokens, seconds = self.tokens - self._last[0], self.seconds - self._last[1]
            self._last = (self.tokens, self.seconds)
            pl_module.log("train/tokens_per_sec", tokens / seconds)
            if self._peak_tokens:
                pl_module.log("train/mfu", tokens / seconds / self._peak_tokens)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._stop()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self._stop()

    def _stop(self, restart: bool = False) -> None:
        if self._since is not None:
            wait_for(self._device)  # only what is done counts
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now if restart else None


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given to do."""
    if is_asynchronous(device):
        torch.accelerator.synchronize(device)
