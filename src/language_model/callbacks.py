"""What watches a run: the terminal, the throughput, the gradient norm, and the samples."""

import math
import os
import time
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from pydantic import Field, NonNegativeFloat, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from language_model.config import JOB
from language_model.generate import generate
from language_model.hardware import peak_flops
from language_model.terminal import log, terminal


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


class GradientNorm(Callback):
    """Sums up the gradient norms before clipping, and warns once when they stay far above the clip.

    Args:
        warn_factor: how many times the clip value is far.
        warn_steps: after how many steps in a row above it to warn.
    """

    def __init__(self, warn_factor: Annotated[float, Field(gt=0)] = 10.0, warn_steps: PositiveInt = 10) -> None:
        self.warn_factor = warn_factor
        self.warn_steps = warn_steps
        self.steps = 0
        self._sums: torch.Tensor | None = None  # sum, maximum, clipped steps, far steps in a row, longest such row
        self._warned = False
        self._last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run counts on from."""
        return {"steps": self.steps, "sums": self._sums, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.steps, self._sums, self._warned = state_dict["steps"], state_dict["sums"], state_dict["warned"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note where the run starts."""
        self._last_step = trainer.global_step
        if self._sums is not None:
            self._sums = self._sums.to(pl_module.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add a step's norm; all on its device, so nothing waits but the steps that are logged."""
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
        """Return the largest, mean and last norm and the share of steps that were clipped."""
        if self._sums is None:
            return {}
        total, largest, clipped, _, _ = self._sums.tolist()
        return {
            "grad_norm_max": largest,
            "grad_norm_mean": total / self.steps,
            "grad_norm_last": float(last),
            "clipped_share": clipped / self.steps,
        }


class RestoreBest(Callback):
    """Gives the network its best weights back at the end of a run that was stopped early, and says so."""

    def __init__(self) -> None:
        self.done = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Restore them: here, behind the save of the last weights."""
        stopped = any(isinstance(c, EarlyStopping) and c.stopped_epoch for c in trainer.callbacks)
        best = next((c.best_model_path for c in trainer.callbacks if getattr(c, "best_model_path", "")), "")
        if stopped and best:
            content = torch.load(best, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(content["state_dict"])
            self.done = True
            log.info(f"restored the best weights, those after step {content['global_step']:,}")


class Sample(Callback):
    """Lets the model speak: a text after a prompt, to TensorBoard at each validation, and everywhere at the end.

    Args:
        prompt: what the model goes on from; null for the first words of the corpus.
        max_new_tokens: how much it says.
        temperature: 0 for the likeliest token, 1 for the model's own probabilities.
        top_k: draw from the k likeliest tokens only; null for all.
        seed: of the draw.
    """

    def __init__(
        self,
        prompt: Annotated[str, Field(min_length=1)] | None = None,
        max_new_tokens: PositiveInt = 200,
        temperature: NonNegativeFloat = 0.8,
        top_k: PositiveInt | None = None,
        seed: int = 0,
    ) -> None:
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.seed = seed
        self.text = ""

    def speak(self, network: Any, tokenizer: Any, prompt: str) -> str:
        """Return the prompt and what the network says after it."""
        device = next(network.parameters()).device
        tokens = torch.tensor(tokenizer.encode(prompt), dtype=torch.int64, device=device)
        training = network.training
        network.eval()
        sampling = (self.temperature, self.top_k, None, self.seed)
        new = generate(network, tokens, self.max_new_tokens, *sampling, tokenizer.vocab_size, tokenizer.end_of_text)
        ids = list(new)
        network.train(training)
        return prompt + tokenizer.decode(ids)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw a sample for TensorBoard."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.loggers:
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the last sample."""
        pl_module.to(trainer.strategy.root_device)  # lightning has taken it to the CPU
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule
        self.text = self.speak(pl_module.network, data.tokenizer, self.prompt or data.opening)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_text("sample", f"```\n{self.text}\n```", trainer.global_step)


class Console(ProgressBar):
    """All that a run says in the terminal while it trains: one bar over all steps, and a line every few epochs.

    Args:
        log_interval: epochs between lines; validations inside an epoch get a line of their own.
    """

    def __init__(self, log_interval: PositiveInt = 5) -> None:
        super().__init__()
        self.log_interval = log_interval
        self._bar: Progress | None = None
        self._enabled = True
        self._started = 0.0
        self._said_epoch = -1

    def disable(self) -> None:
        """Say nothing: on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Show the bar, where there is a terminal to show it."""
        self._started = time.perf_counter()
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
                os.environ.get(JOB, "step"),
                total=None if math.isinf(total) else total,
                completed=trainer.global_step,
                values="",
            )
            self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, at the steps that are logged."""
        if self._bar is None or trainer.global_step % trainer.log_every_n_steps:
            return
        values = trainer.callback_metrics
        shown = f"loss {values['train/loss']:.4f} · lr {values['lr']:.2e}" if "train/loss" in values else ""
        if "train/tokens_per_sec" in values:
            shown += f" · {values['train/tokens_per_sec']:,.0f} tokens/s"
        self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, values=shown)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say the epoch's line, if it is its turn."""
        if trainer.current_epoch % self.log_interval == 0:
            self._say_epoch(trainer, pl_module, trainer.current_epoch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say a line for a validation inside an epoch."""
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._say(trainer, pl_module, f"Step {trainer.global_step:,}")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say the last epoch's line, and take the bar away."""
        self._close()
        self._say_epoch(trainer, pl_module, trainer.current_epoch - 1)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Take the bar away."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say_epoch(self, trainer: L.Trainer, pl_module: Any, epoch: int) -> None:
        if epoch > self._said_epoch:
            self._said_epoch = epoch
            self._say(trainer, pl_module, f"Epoch {epoch:3d}")

    def _say(self, trainer: L.Trainer, pl_module: Any, when: str) -> None:
        if not self._enabled:
            return
        parts = [when, f"Loss: {pl_module.epoch_loss.value:.4f}"]
        if "val/loss" in trainer.callback_metrics:
            parts.append(f"Val loss: {trainer.callback_metrics['val/loss']:.4f}")
        parts += [f"LR: {pl_module.last_lr:.6f}", f"Time: {time.perf_counter() - self._started:.1f}s"]
        log.info(" | ".join(parts))
