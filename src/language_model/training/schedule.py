"""Learning rate schedules: functions from the step (0 for the first update) to the learning rate.

The step is the first argument; ``conf/schedule`` sets the others.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


def constant(step: int, lr: PositiveFloat) -> float:
    """Return `lr` at every step, as in the chapter's exercises."""
    return lr


def warmup_cosine(
    step: int,
    lr: PositiveFloat,
    total_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    min_lr: NonNegativeFloat = 0.0,
) -> float:
    """Return the rate of a linear warmup to `lr`, then half a cosine to `min_lr` at `total_steps` (the chapter's).

    ValueError if the warmup is longer than the run.
    """
    check_warmup(warmup_steps, total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * decay_progress(step, warmup_steps, total_steps)))


def warmup_linear(
    step: int,
    lr: PositiveFloat,
    total_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    min_lr: NonNegativeFloat = 0.0,
) -> float:
    """Return the rate of a linear warmup to `lr`, then a straight line to `min_lr` at `total_steps` (arXiv:2502.15938).

    ValueError if the warmup is longer than the run.
    """
    check_warmup(warmup_steps, total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return min_lr + (lr - min_lr) * (1 - decay_progress(step, warmup_steps, total_steps))


def with_cooldown(schedule: Callable[[int], float], start: int, end: int | None) -> Callable[[int], float]:
    """Return a schedule that falls from step `start` on, in a straight line from its rate there to 0 at step `end`.

    ValueError unless the run ends after `start`.
    """
    if end is None or end <= start:
        ends = "has no end" if end is None else f"ends at step {end}"
        raise ValueError(f"the run {ends}; a later end is needed, by trainer.max_epochs or trainer.max_steps")

    def rate(step: int) -> float:
        return schedule(step) if step <= start else schedule(start) * max(0.0, (end - step) / (end - start))

    return rate


def steps_in_run(
    batches: int,
    max_epochs: int | None,
    max_steps: int = -1,
    limit_train_batches: float | None = 1.0,
    accumulate_grad_batches: int = 1,
) -> int | None:
    """Return the optimizer steps of a run with `batches` an epoch, by the trainer's settings; None for no limit.

    max_epochs and max_steps of -1 mean no limit; limit_train_batches is a share (float) or a number (int). The last
    accumulation of an epoch is a step even if it is smaller.
    """
    ends = [max_steps] if max_steps >= 0 else []
    if max_epochs is not None and max_epochs >= 0:
        ends.append(max_epochs * math.ceil(limited(batches, limit_train_batches) / accumulate_grad_batches))
    return min(ends, default=None)


def limit_that_counts(trainer: Mapping[str, Any], split: Literal["train", "val"]) -> tuple[str, float]:
    """Return the key and the value of the trainer's setting that limits an epoch's batches: overfit_batches, if set."""
    key = "overfit_batches" if trainer["overfit_batches"] else f"limit_{split}_batches"
    return key, trainer[key]


def limited(batches: int, limit: float | None) -> int:
    """Return how many of `batches` are used, by one of Lightning's limits: a share (float), a number (int), or None."""
    if isinstance(limit, float):
        return int(batches * limit)
    return batches if limit is None else min(batches, limit)


def decay_progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the completed share of the decay: 0 at the end of the warmup, 1 from `total_steps` on."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raise ValueError for a warmup that would never reach the peak."""
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is longer than the run of total_steps={total_steps}; "
            f"allowed: 0 to {total_steps}; set schedule.warmup_steps, or train longer"
        )
