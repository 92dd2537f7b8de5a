"""The plan of a run: everything that is decided before its first step, as one object.

No run folder is created while a plan is made, so a mistake in the settings leaves none behind. In a notebook:

    from language_model import fit, plan

    run = plan("model=small", "trainer.max_epochs=2", "name=first")
    run.steps, run.module.network, run.config.trainer.precision
    result = fit(run)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from omegaconf import DictConfig
from torch import nn

from language_model.data.datamodule import TokenData
from language_model.runs.config import ConfigError, build, check_choice, check_config, errors_for_key
from language_model.runs.folder import choose_folder
from language_model.runs.resume import (
    PreviousRun,
    check_checkpoint_fits,
    check_same_settings,
    compose,
    find_previous_run,
    is_finished,
    resolve_resume,
)
from language_model.terminal import setup_logging
from language_model.training import hardware
from language_model.training.module import LanguageModel
from language_model.training.schedule import steps_in_run

VALIDATION_METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte")
TRAINING_METRIC = "train/loss_epoch"


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a run's first step.

    Attributes:
        config: the settings, with every derived value filled in.
        overrides: what of them was typed.
        folder: where the run is written.
        data: the batches.
        module: the network with its loss, optimizer and schedule.
        callbacks: by their names in the config.
        trainer: Lightning's.
        steps: optimizer steps of the run; None for no limit.
        previous: what the folder already holds of this run; None for a new run.
    """

    config: DictConfig
    overrides: list[str]
    folder: Path
    data: TokenData
    module: LanguageModel
    callbacks: dict[str, Callback]
    trainer: L.Trainer
    steps: int | None
    previous: PreviousRun | None

    @property
    def is_finished(self) -> bool:
        """Whether the run has already reached the end that is asked for."""
        previous = self.previous
        return previous is not None and is_finished(previous.result, previous.settings, self.config)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that training continues from; None to start with new weights."""
        if self.previous is not None:
            return self.previous.checkpoint
        return Path(self.config.resume) if self.config.resume else None


def plan(*overrides: str) -> Plan:
    """Return the plan of the run that ``python scripts/train.py <overrides>`` would do; raises as `make_plan`."""
    setup_logging()
    return make_plan(compose(overrides), overrides)


def make_plan(config: DictConfig, typed: Sequence[str]) -> Plan:
    """Return the plan of a run.

    Args:
        config: the composed settings; null values that can be derived are filled in.
        typed: the overrides that were typed.

    Raises:
        ConfigError: a setting is wrong, or the run cannot resume with it.
    """
    config, overrides = resolve_resume(config, typed)
    check_config(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    folder = choose_folder(config)
    config.folder = str(folder)
    previous = find_previous_run(folder)

    data = build_data(config)
    choose_arithmetic(config)
    network = build(config, "model")
    choose_monitor(config, data)
    callbacks, trainer = build_trainer(config)
    data.trainer = trainer  # the order of the windows depends on its devices
    steps = choose_steps(config, data)
    choose_compile(config, network, steps)
    module = build_module(config, network, data)
    if "sample" in callbacks:
        with errors_for_key("callbacks.sample.prompt"):
            data.tokenizer.encode(callbacks["sample"].prompt or data.default_prompt)

    run = Plan(config, overrides, folder, data, module, callbacks, trainer, steps, previous)
    check_resume(run)
    return run


def build_data(config: DictConfig) -> TokenData:
    """Return the data; fills in ``vocab_size``."""
    data: TokenData = build(config, "data")
    config.vocab_size = config.vocab_size or data.tokenizer.vocab_size
    if config.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens")
    return data


def choose_arithmetic(config: DictConfig) -> None:
    """Fill in precision, attention and fused optimizer, where they are null, as suits the device."""
    device = hardware.device_type(config.trainer.accelerator)
    precision = hardware.full_precision_name(config.trainer.precision or hardware.best_precision(device))
    config.trainer.precision = precision
    if config.model.get("attention", "") is None:
        config.model.attention = hardware.best_attention(device, precision, config.model.get("dropout") or 0)
    if config.optimizer.get("fused", False) is None:
        config.optimizer.fused = hardware.can_fuse_optimizer(device, precision)
    if precision == "16-mixed" and config.optimizer.get("fused"):
        raise ConfigError("optimizer.fused=true: not possible with trainer.precision=16-mixed; set it to false")


def choose_monitor(config: DictConfig, data: TokenData) -> None:
    """Fill in the monitored metric: val/loss if the run validates, else train/loss_epoch."""
    validates = data.has_validation and config.trainer.limit_val_batches != 0
    metrics = [*VALIDATION_METRICS, TRAINING_METRIC] if validates else [TRAINING_METRIC]
    config.monitor = config.monitor or metrics[0]
    check_choice("monitor", config.monitor, metrics)


def build_trainer(config: DictConfig) -> tuple[dict[str, Callback], L.Trainer]:
    """Return the callbacks by name, and the trainer with them and the loggers."""
    callbacks = {name: callback for name, callback in build(config, "callbacks").items() if callback}
    trainer = build(
        config,
        "trainer",
        callbacks=list(callbacks.values()),
        logger=[logger for logger in build(config, "logger").values() if logger],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks.values()),  # or it adds one
        plugins=[build(config, "checkpoint_io")],
    )
    return callbacks, trainer


def choose_steps(config: DictConfig, data: TokenData) -> int | None:
    """Return the optimizer steps of the run (None: no limit); fills in ``total_steps``, which the schedule spans."""
    limits = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches")
    steps = steps_in_run(len(data.train_batch_sampler()), **{limit: config.trainer[limit] for limit in limits})
    config.total_steps = steps if config.total_steps is None else config.total_steps
    if config.total_steps is None and "total_steps" in config.schedule:
        raise ConfigError(
            "total_steps: the schedule needs an end; set trainer.max_epochs, trainer.max_steps or total_steps"
        )
    return steps


def choose_compile(config: DictConfig, network: nn.Module, steps: int | None) -> None:
    """Fill in whether the network is compiled: if it saves time; ConfigError if it is asked for and impossible."""
    device = hardware.device_type(config.trainer.accelerator)
    can_compile = hasattr(network, "compile_for_training")
    if config.compile is None:
        config.compile = can_compile and hardware.worth_compiling(device, steps)
    if config.compile and not can_compile:
        raise ConfigError(f"compile=true: {config.model._target_} has no compile_for_training; set it to false")
    if config.compile and (missing := hardware.missing_for_compiling(device)):
        raise ConfigError(f"compile=true: this machine lacks {missing}; install it, or set compile=false")


def build_module(config: DictConfig, network: nn.Module, data: TokenData) -> LanguageModel:
    """Return the LightningModule; the optimizer and the schedule are tried once, so that their errors come early."""
    optimizer, schedule = build(config, "optimizer"), build(config, "schedule")
    module = LanguageModel(network, optimizer, schedule, data.tokenizer, compiled=config.compile)
    with errors_for_key("schedule"):
        module.schedule(0)
    with errors_for_key("optimizer"):
        module.configure_optimizers()
    return module


def check_resume(run: Plan) -> None:
    """Raise ConfigError if the folder holds another run, or the checkpoint does not fit this one."""
    if run.previous is not None:
        check_same_settings(run.folder, run.previous.settings, run.config)
    if run.checkpoint is not None and not run.is_finished:
        check_checkpoint_fits(run.checkpoint, run.module, run.steps)
