"""Learning-rate schedules: pure functions from the step (0 for the first update) to the learning rate.

Each takes the step first; the rest comes from its file in ``conf/schedule``.
"""

import math
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def constant(step: int, lr: PositiveFloat) -> float:
    """Return `lr` at every step, as the chapter's exercises use it."""
    return lr


def warmup_cosine(
    step: int,
    lr: PositiveFloat,
    total_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    min_lr: NonNegativeFloat = 0.0,
) -> float:
    """Linear warmup to `lr`, then half a cosine to `min_lr` at `total_steps`: the chapter's get_lr, to the last bit.

    ValueError if the warmup is longer than the run.
    """
    check_warmup(warmup_steps, total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * decayed(step, warmup_steps, total_steps)))


def warmup_linear(
    step: int,
    lr: PositiveFloat,
    total_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    min_lr: NonNegativeFloat = 0.0,
) -> float:
    """Linear warmup to `lr`, then a straight line to `min_lr` at `total_steps` (arXiv:2502.15938 for why to zero).

    ValueError if the warmup is longer than the run.
    """
    check_warmup(warmup_steps, total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return min_lr + (lr - min_lr) * (1 - decayed(step, warmup_steps, total_steps))


def steps_in_run(batches_per_epoch: int, trainer: Any) -> int | None:
    """Return the optimizer steps of a run that ends at the trainer's max_epochs or max_steps; None without either.

    The last, smaller accumulation of an epoch is a step too.
    """
    limit = trainer.limit_train_batches
    batches = int(batches_per_epoch * limit) if isinstance(limit, float) else min(batches_per_epoch, limit)
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(ends, default=None)


def decayed(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return how much of the decay lies behind: 0 at the end of the warmup, 1 from `total_steps` on."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Refuse a warmup that would never reach the peak."""
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is longer than the run of total_steps={total_steps}; "
            f"allowed: 0 to {total_steps}"
        )
