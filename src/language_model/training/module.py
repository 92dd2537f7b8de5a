"""The training step, its metrics, and the optimizer with its schedule."""

import math
import time
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from language_model.data.tokenizer import Tokenizer
from language_model.data.windows import IGNORE_INDEX
from language_model.training.final_validation import ends_with_this_batch, validate_after_this_batch
from language_model.training.mean import Mean, accumulation_dtype

CHECKPOINT_FORMAT = 1  # to be raised when checkpoints change so that `load_run` must distinguish them
LAST_FIGURES = ("validated_step", "validated_share", "unfinished_epoch")  # what the last figures are of
Batch = tuple[Tensor, Tensor]


class LanguageModel(L.LightningModule):
    """A network that learns to predict the next token.

    What is logged, and when:

    - every `log_every_n_steps` optimizer steps, of that step alone: ``train/loss`` (mean over its batches, in nats a
      token), ``lr``, and ``train/grad_norm`` (before clipping)
    - at the end of an epoch, if it has all its batches: ``train/loss_epoch``, the mean over them
    - after a validation, of which the last is after the run's last step: over all tokens of the split: ``val/loss``,
      ``val/perplexity`` = exp(val/loss), and ``val/bits_per_byte``, the summed loss in bits divided by the bytes of the
      predicted tokens, which can be compared between tokenizers

    Args:
        network: tokens (B, T) int64 -> logits (B, T, V).
        optimizer: named parameters -> optimizer.
        schedule: step -> learning rate of the first parameter group; the other groups' rates move in proportion.
        tokenizer: the one that made the tokens; checkpoints hold its fingerprint.
        compiled: compile the network, by its ``compile_for_training``, and the cross-entropy.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
        schedule: Callable[[int], float],
        tokenizer: Tokenizer,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self._train_loss = F.cross_entropy
        if compiled:
            # Draw the same random numbers as an uncompiled network; on a CPU that is also faster.
            options: dict[str, Any] = {"fallback_random": True}
            network.compile_for_training(options=options)  # type: ignore[operator]
            self._train_loss = torch.compile(F.cross_entropy, options=options)
        self.tokenizer = tokenizer
        self.token_bytes: Tensor | None
        sizes = None if tokenizer.token_bytes is None else torch.from_numpy(tokenizer.token_bytes)
        self.register_buffer("token_bytes", sizes, persistent=False)
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.grad_norm = torch.zeros(())  # of the last step, before clipping
        self.last_lr = 0.0  # of the last step
        self._step_loss = Mean()
        self._step_batches: list[Batch] = []
        self._unchecked_step: Step | None = None  # the last step, if its gradient was not checked yet
        self._last_loss = torch.zeros(())
        self.epoch_loss = Mean()  # of the training batches
        self._epoch_loss_before = Mean()  # of those before this step
        self.unfinished_epoch: dict[str, float] | None = None  # mean loss and steps, where a run ends inside an epoch
        self._val_loss = Mean()
        self._val_bytes: Tensor | int = 0
        self.validated_step: int | None = None  # optimizer steps before the last validation
        self.validated_share: float | None = None  # of the split's batches
        self.batch_started = 0.0  # seconds, by time.perf_counter

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        return self.network(tokens)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch, in nats a token."""
        inputs, targets = batch
        return self.cross_entropy(self(inputs), targets)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits (B, T, V) for targets (B, T), in nats a token."""
        cross_entropy = self._train_loss if self.training else F.cross_entropy
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, scaled so that a step's gradient is the mean over the batches that it has."""
        loss = self.loss(batch)
        self._last_loss = loss.detach()
        self._step_loss.add(self._last_loss)
        self._step_batches.append(batch)
        # Lightning divides by accumulate_grad_batches, though an epoch's last step may have fewer batches.
        full = self.trainer.accumulate_grad_batches
        present = min(full, self.trainer.num_training_batches - batch_idx // full * full)
        return loss if present == full else loss * (full / present)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's settings, and keep the norm before clipping, which clipping computes anyway."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if gradient_clip_val and gradient_clip_algorithm != "value":
            self.grad_norm = clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
            if gradient_clip_val:
                clip_grad_value_(parameters, gradient_clip_val)
        self.last_lr = optimizer.param_groups[0]["lr"]
        if self.trainer.precision != "16-mixed":  # whose scaler skips such steps
            self._check_gradient(optimizer)
        # self.log takes longer than a small model's step: call it only for steps that are logged.
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", self._step_loss.value, sync_dist=True)
            self.log_dict({"lr": self.last_lr, "train/grad_norm": self.grad_norm})
        self._step_loss, self._step_batches = Mean(), []

    def _check_gradient(self, optimizer: Optimizer) -> None:
        """Raise NonFiniteError for a gradient that is not finite, before it changes the weights.

        On a GPU, reading the norm would wait for the step to finish. There the optimizer's kernels leave the weights
        unchanged if the norm is not finite, and the error is raised at the next step, validation or save.
        """
        step: Step | None = Step(self)
        if is_asynchronous(self.device) and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]
            step, self._unchecked_step = self._unchecked_step, step
        self._raise_if_non_finite(step)

    def _raise_if_non_finite(self, step: "Step | None") -> None:
        if step is None or math.isfinite(norm := step.norm.value()):
            return
        losses = [float(self.loss(batch).detach()) for batch in step.batches]
        culprit = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), -1)
        raise NonFiniteError(step.number, step.lr, float(step.loss), norm, step.batches[culprit][0])

    def on_train_start(self) -> None:
        """Set the first step's rate by the schedule: a checkpoint has that of the schedule with which it was saved."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            groups = scheduler.optimizer.param_groups
            for group, base, rate in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                group["lr"] = base * rate(scheduler.last_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reset the epoch's mean loss at its first batch, and keep what it is at the start of a step.

        Note the time, after all that callbacks do before.
        """
        if batch_idx == 0:
            self.epoch_loss = Mean()
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._epoch_loss_before = copy(self.epoch_loss)
        self.batch_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the epoch's mean loss, after its step; see to it that the run's last step is validated."""
        self.epoch_loss.add(self._last_loss)
        if ends_with_this_batch(self.trainer):
            validate_after_this_batch(self.trainer)

    @property
    def epoch_is_complete(self) -> bool:
        """Whether the last batch was the last of its epoch."""
        return self.trainer.is_last_batch

    def mean_epoch_loss(self) -> Tensor:
        """Return the mean loss of the epoch's batches so far, of all processes; all of them must call this."""
        total, weight = self._sum_over_processes(self.epoch_loss.total, self.epoch_loss.weight)
        return total / weight

    def _sum_over_processes(self, *sums: Tensor | float) -> Tensor:
        exact = [torch.as_tensor(each, dtype=accumulation_dtype(self.device), device=self.device) for each in sums]
        return self.trainer.strategy.reduce(torch.stack(exact), reduce_op="sum")

    def on_train_epoch_end(self) -> None:
        """Log the epoch's mean loss, unless the run ends before the end of the epoch."""
        self._raise_if_non_finite(self._unchecked_step)
        mean = self.mean_epoch_loss()
        self.unfinished_epoch = None
        if self.epoch_is_complete:
            self.log("train/loss_epoch", mean, sync_dist=True)
        else:
            steps = math.ceil(float(self.epoch_loss.weight) / self.trainer.accumulate_grad_batches)
            self.unfinished_epoch = {"loss": float(mean), "steps": steps}

    def on_validation_epoch_start(self) -> None:
        """Reset the split's mean loss."""
        self._raise_if_non_finite(self._unchecked_step)
        self._val_loss = Mean()
        self._val_bytes = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the split's mean loss, weighted by its tokens.

        Returns:
            "loss" and "logits" (B, T, V), for callbacks: they are `outputs` of ``on_validation_batch_end``.
        """
        inputs, targets = batch
        logits = self(inputs)
        loss = self.cross_entropy(logits, targets)
        predicted = targets[targets != IGNORE_INDEX]
        self._val_loss.add(loss, predicted.numel())
        if self.token_bytes is not None:
            self._val_bytes = self._val_bytes + self.token_bytes[predicted].sum()
        return {"loss": loss, "logits": logits}

    @property
    def num_validated_tokens(self) -> int:
        """Number of tokens that the last validation predicted, in this process."""
        return int(self._val_loss.weight)

    def on_validation_epoch_end(self) -> None:
        """Log the loss over the whole split, all processes together."""
        mean = self._val_loss
        nats, num_tokens, num_bytes = self._sum_over_processes(mean.total, mean.weight, self._val_bytes)
        loss = nats / num_tokens
        # They are those of all processes already: with sync_dist Lightning does not warn that they might not be.
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp()}, sync_dist=True)
        if self.token_bytes is not None:
            self.log("val/bits_per_byte", nats / math.log(2) / num_bytes, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.validated_step = self.trainer.global_step
            self.validated_share = sum(self.trainer.num_val_batches) / len(self.trainer.val_dataloaders)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epoch's mean so far, what the last figures are of, and the tokenizer's fingerprint.

        NonFiniteError if the last step was not finite.
        """
        self._raise_if_non_finite(self._unchecked_step)
        mean = self._epoch_loss_before if batches_of_unfinished_step(self.trainer) else self.epoch_loss
        own = [float(mean.total), float(mean.weight)]
        checkpoint["epoch_loss"] = [own] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(checkpoint["epoch_loss"], own)
        checkpoint |= {name: getattr(self, name) for name in LAST_FIGURES}
        checkpoint["tokenizer"] = self.tokenizer.fingerprint
        checkpoint["format"] = CHECKPOINT_FORMAT

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added; the optimizer's settings stay as they are set now."""
        groups = self.make_optimizer(self.network.named_parameters()).param_groups
        for state in checkpoint.get("optimizer_states", []):
            for saved_group, group in zip(state["param_groups"], groups, strict=False):
                saved_group.update({key: group[key] for key in group if key != "params"}, initial_lr=group["lr"])
        for state in checkpoint.get("lr_schedulers", []):
            state["base_lrs"] = [group["lr"] for group in groups]
        for name in LAST_FIGURES:
            setattr(self, name, checkpoint.get(name))  # not in those of earlier versions
        saved = checkpoint.get("epoch_loss", [])
        if len(saved) == self.trainer.world_size:
            self.epoch_loss.total, self.epoch_loss.weight = saved[self.trainer.global_rank]

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer, and a LambdaLR that sets the schedule's rate before each step."""
        optimizer = self.make_optimizer(self.network.named_parameters())
        peak, schedule = optimizer.param_groups[0]["lr"], self.schedule
        # A function, not an object: LambdaLR restores an object's attributes from a checkpoint.
        scheduler = LambdaLR(optimizer, lambda step: schedule(step) / peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches_of_unfinished_step(trainer: L.Trainer) -> int:
    """Return how many batches are done of a step that accumulates more; 0 between two steps."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
    return done % trainer.accumulate_grad_batches if done < trainer.num_training_batches else 0


def is_asynchronous(device: torch.device) -> bool:
    """Whether a device computes in the background, so that reading a number from it waits."""
    return device.type == "cuda"


class AsyncScalar:
    """A number being copied from a device; only `value` waits for it."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.detach().to("cpu", non_blocking=number.is_cuda)
        self._event = torch.cuda.Event() if number.is_cuda else None
        if self._event:
            self._event.record()

    def value(self) -> float:
        """Return the number, once it has arrived."""
        if self._event:
            self._event.synchronize()
        return float(self._number)


class Step:
    """What an error message needs to know about an optimizer step."""

    def __init__(self, module: LanguageModel) -> None:
        self.number = module.trainer.global_step
        self.lr = module.last_lr
        self.loss = module._step_loss.value
        self.norm = AsyncScalar(module.grad_norm)
        self.batches = module._step_batches


class NonFiniteError(ArithmeticError):
    """A gradient that is not finite, found before it changed the weights.

    Attributes:
        step: optimizer steps taken before.
        lr, loss, grad_norm: of the step that was not taken.
        tokens: its input tokens, (B, T) int64; with accumulation, the first batch whose loss is not finite.
    """

    def __init__(self, step: int, lr: float, loss: float, grad_norm: float, tokens: Tensor) -> None:
        super().__init__(f"the gradient of step {step:,} is not finite: loss {loss:g}, norm {grad_norm:g}, lr {lr:g}")
        self.step, self.lr, self.loss, self.grad_norm, self.tokens = step, lr, loss, grad_norm, tokens
