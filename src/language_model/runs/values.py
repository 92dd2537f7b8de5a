"""Which values Lightning's parts may get: their own annotations accept some that fail late, or train wrongly."""

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Allowed(NamedTuple):
    """The values that a key may have: as an annotation, and in words."""

    annotation: Any
    words: str


def differ_from_last(name: str) -> str:
    """Return a checkpoint's name; ValueError if it is that of the checkpoint to resume from."""
    if name == "last":
        raise ValueError(name)
    return name


NO_LIMIT = Allowed(PositiveInt | Literal[-1], "1 and up; -1 for no limit")
POSITIVE = Allowed(PositiveInt, "1 and up")
WHOLE = Allowed(NonNegativeInt, "0 and up")
POSITIVE_OR_NULL = Allowed(PositiveInt | None, "1 and up, or null")
YES_OR_NO = Allowed(bool, "true, false")
DURATION = Allowed(
    Annotated[str, Field(pattern=r"^\d+:\d\d?:\d\d?:\d\d?$")] | None,
    "days:hours:minutes:seconds, as 00:01:30:00, or null",
)
SHARE = Annotated[float, Field(gt=0, le=1)]
SHARE_OR_ZERO = Annotated[float, Field(ge=0, le=1)]
FOLDER = Allowed(Annotated[str, Field(min_length=1)], "a folder")
FILE_NAME = Allowed(
    Annotated[str, Field(pattern=r"^[A-Za-z0-9_][^/\\]*$"), AfterValidator(differ_from_last)],
    "a file's name without its folder, and not last",
)
NOT_NEGATIVE = Allowed(NonNegativeFloat, "0 and up")
BETA = Annotated[float, Field(ge=0, lt=1)]
MODE = Allowed(Literal["min", "max"], "min, max")

# By target (a pattern) and key. A key that is not listed is checked against its annotation.
ALLOWED: dict[str, dict[str, Allowed]] = {
    "lightning.Trainer": {
        "accelerator": Allowed(Literal["auto", "cpu", "gpu", "cuda", "mps"], "auto, cpu, gpu, cuda, mps"),
        "devices": Allowed(
            Literal["auto", -1] | PositiveInt | Annotated[list[NonNegativeInt], Field(min_length=1)],
            "auto, a number of devices, or a list of their indices",
        ),
        "num_nodes": POSITIVE,
        "strategy": Allowed(Literal["auto", "ddp", "single_device"], "auto, ddp, single_device"),
        "precision": Allowed(
            Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true", "32", "bf16", "16", "64", 32, 16, 64]
            | None,
            "32-true, bf16-mixed, 16-mixed, bf16-true, 64-true, or null",
        ),
        "max_epochs": NO_LIMIT,
        "max_steps": NO_LIMIT,
        "max_time": DURATION,
        "gradient_clip_val": Allowed(NonNegativeFloat | None, "0 and up; null or 0 for no clipping"),
        "gradient_clip_algorithm": Allowed(Literal["norm", "value"], "norm, value"),
        "accumulate_grad_batches": POSITIVE,
        "log_every_n_steps": POSITIVE,
        "val_check_interval": Allowed(PositiveInt | SHARE, "a fraction of an epoch, or a whole number of batches"),
        "check_val_every_n_epoch": POSITIVE_OR_NULL,
        "limit_train_batches": Allowed(PositiveInt | SHARE, "a fraction of the batches, or a whole number of them"),
        "limit_val_batches": Allowed(NonNegativeInt | SHARE_OR_ZERO, "a fraction of the batches, or a whole number"),
        "num_sanity_val_steps": Allowed(NonNegativeInt | Literal[-1], "0 and up; -1 for the whole split"),
        "overfit_batches": Allowed(NonNegativeInt | SHARE_OR_ZERO, "a fraction of the batches, or a whole number"),
        "fast_dev_run": Allowed(bool | PositiveInt, "true, false, or a number of batches"),
        "deterministic": Allowed(bool | Literal["warn"], "true, false, warn"),
        "benchmark": Allowed(bool | None, "true, false, null"),
        "enable_model_summary": YES_OR_NO,
        "use_distributed_sampler": Allowed(Literal[False], "false: the data module divides the windows itself"),
        "default_root_dir": FOLDER,
    },
    "*.callbacks.*Checkpoint": {
        "dirpath": FOLDER,
        "filename": FILE_NAME,
        "mode": MODE,
        "save_top_k": Allowed(NonNegativeInt | Literal[-1], "0 and up; -1 for all"),
        "every_n_epochs": POSITIVE_OR_NULL,
        "every_n_train_steps": POSITIVE_OR_NULL,
        "save_on_train_epoch_end": Allowed(bool | None, "true, false, null"),
    },
    "lightning.pytorch.callbacks.EarlyStopping": {
        "mode": MODE,
        "patience": POSITIVE,
        "min_delta": NOT_NEGATIVE,
    },
    "language_model.training.checkpoint.LastCheckpoint": {"dirpath": FOLDER},
    "language_model.training.log_files.*": {"save_dir": FOLDER},
    "language_model.sweeps.pruning.Pruning": {"folder": FOLDER},
    "lightning.pytorch.loggers.*": {"save_dir": FOLDER, "flush_logs_every_n_steps": POSITIVE},
    "optuna.*": {
        "seed": Allowed(NonNegativeInt | None, "0 and up, or null"),
        "n_startup_trials": WHOLE,
        "n_warmup_steps": WHOLE,
        "interval_steps": POSITIVE,
        "n_min_trials": POSITIVE,
    },
    "torch.optim.*": {
        "lr": Allowed(PositiveFloat, "above 0"),
        "eps": NOT_NEGATIVE,
        "momentum": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
        "betas": Allowed(tuple[BETA, BETA], "two numbers from 0 to below 1"),
        "alpha": Allowed(BETA, "from 0 to below 1"),
    },
}


def allowed_values(target: str) -> dict[str, Allowed]:
    """Return the values that a target's keys may have, as far as `ALLOWED` lists them."""
    return next((keys for pattern, keys in ALLOWED.items() if fnmatch(target, pattern)), {})


def non_finite_numbers(value: Any) -> Iterator[float]:
    """Yield the NaNs and infinities in a value of any nesting."""
    if isinstance(value, float) and not math.isfinite(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from non_finite_numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from non_finite_numbers(inner)
