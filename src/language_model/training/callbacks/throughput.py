"""Tokens a second, and the share of the device's peak that is used."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from language_model.training.hardware import peak_flops


class Throughput(Callback):
    """Logs ``train/tokens_per_sec`` over the steps since the last time it was logged, and keeps the run's total.

    The time counts from the start of a batch to the start of the next; validation is left out. Where the network knows
    its operations (``flops_per_token``) and the device's peak is known, ``train/mfu`` is the share of it that is used.
    """

    def __init__(self) -> None:
        self.tokens = 0  # this run has trained on, all devices together
        self.seconds = 0.0
        self._last = (0, 0.0)  # tokens and seconds at the last log
        self._since: float | None = None
        self._logged_step = 0
        self._peak_tokens: float | None = None  # a second, if every operation counted

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run counts on from."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.tokens, self.seconds = state_dict["tokens"], state_dict["seconds"]
        self._last = (self.tokens, self.seconds)

    @property
    def tokens_per_sec(self) -> float:
        """The mean over the run."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """The mean over the run of the share of the devices' peak; None where that is not known."""
        return self.tokens_per_sec / self._peak_tokens if self._peak_tokens else None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note where the run starts."""
        self._logged_step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs."""
        if self._since is None:
            count = getattr(pl_module.network, "flops_per_token", None)
            peak = peak_flops(trainer.strategy.root_device, trainer.precision)
            self._peak_tokens = peak * trainer.world_size / count(batch[0].shape[1]) if count and peak else None
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch's tokens, and log at the steps that are logged."""
        self.tokens += batch[0].numel() * trainer.world_size
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            pl_module.grad_norm.item()  # waits for the device, so that the time is that of finished steps
            self._stop(go_on=True)
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

    def _stop(self, go_on: bool = False) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self.seconds += now - self._since
            self._since = now if go_on else None
