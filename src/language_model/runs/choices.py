"""What is decided before a run's first step: the settings that were left null, and whether the parts fit together."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from omegaconf import DictConfig, OmegaConf
from torch import nn

from language_model.data.datamodule import TokenData
from language_model.runs.command_line import override_key
from language_model.runs.config import ConfigError, build, errors_for_key, one_line
from language_model.runs.monitor import MonitorCheck, monitored
from language_model.terminal import log
from language_model.training import hardware
from language_model.training.final_validation import FinalValidation
from language_model.training.module import LanguageModel
from language_model.training.schedule import limit_that_counts, limited, steps_in_run, with_cooldown


def build_data(config: DictConfig) -> TokenData:
    """Return the data; fills in ``vocab_size``."""
    data: TokenData = build(config, "data")
    config.vocab_size = config.vocab_size or data.tokenizer.vocab_size
    if config.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens")
    return data


def check_devices(config: DictConfig) -> str:
    """Return the type of the device that is meant; ConfigError if this machine does not have it, or not so many."""
    settings = config.trainer
    with errors_for_key(f"trainer.accelerator={settings.accelerator}"):
        device = hardware.find_device(settings.accelerator).type
    wanted, is_list = settings.devices, OmegaConf.is_list(settings.devices)
    if device == "cpu" and (is_list or wanted == -1):
        raise ConfigError(f"trainer.devices={wanted}: on a CPU, allowed: auto, or a number of processes")
    largest = max(wanted) + 1 if is_list else wanted if isinstance(wanted, int) else 1
    if device != "cpu" and largest > torch.accelerator.device_count():
        raise ConfigError(f"trainer.devices={wanted}: this machine has {torch.accelerator.device_count()} of them")
    return device


def choose_arithmetic(config: DictConfig) -> None:
    """Fill in precision, attention and fused optimizer, where they are null, as suits the device."""
    device = check_devices(config)
    precision = hardware.full_precision_name(config.trainer.precision or hardware.best_precision(device))
    config.trainer.precision = precision
    if config.model.get("attention", "") is None:
        config.model.attention = hardware.best_attention(device, precision, config.model.get("dropout") or 0)
    if config.optimizer.get("fused", False) is None:
        config.optimizer.fused = hardware.can_fuse_optimizer(device, precision)
    if precision == "16-mixed" and config.optimizer.get("fused"):
        raise ConfigError("optimizer.fused=true: not possible with trainer.precision=16-mixed; set it to false")
    if precision == "16-mixed" and device == "cpu":
        raise ConfigError("trainer.precision=16-mixed: not on a CPU; allowed: bf16-mixed, 32-true, bf16-true, 64-true")


def build_trainer(config: DictConfig) -> tuple[dict[str, Callback], L.Trainer]:
    """Return the callbacks by name, and the trainer with them and the loggers."""
    settings = config.trainer
    if settings.check_val_every_n_epoch is None and isinstance(settings.val_check_interval, float):
        raise ConfigError(
            f"trainer.val_check_interval={settings.val_check_interval}: with trainer.check_val_every_n_epoch=null, a "
            "whole number of batches is needed"
        )
    callbacks = {name: callback for name, callback in build(config, "callbacks").items() if callback}
    if settings.fast_dev_run:  # which writes nothing
        callbacks = {name: callback for name, callback in callbacks.items() if not isinstance(callback, Checkpoint)}
    trainer = build(
        config,
        "trainer",
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks.values()),  # or it adds one
        callbacks=[FinalValidation(), MonitorCheck(monitored(config)), *callbacks.values()],
        logger=[logger for logger in build(config, "logger").values() if logger],
        plugins=[build(config, "checkpoint_io")],
    )
    return callbacks, trainer


def choose_steps(config: DictConfig, data: TokenData) -> int | None:
    """Return the optimizer steps of the run (None: no limit); fills in ``total_steps``, which the schedule spans."""
    settings = config.trainer
    key, limit = limit_that_counts(settings, "train")
    with errors_for_key("data", parameters=config.data):
        batches = len(data.train_batch_sampler())
    if limited(batches, limit) < 1:
        raise ConfigError(f"trainer.{key}={limit}: leaves none of an epoch's {batches:,} batches")
    steps = steps_in_run(batches, settings.max_epochs, settings.max_steps, limit, settings.accumulate_grad_batches)
    config.total_steps = steps if config.total_steps is None else config.total_steps
    if config.total_steps is None and "total_steps" in config.schedule:
        raise ConfigError(
            "total_steps: the schedule needs an end; set trainer.max_epochs, trainer.max_steps or total_steps"
        )
    if steps is not None and steps < settings.max_steps:
        log.warning(
            f"trainer.max_steps={settings.max_steps}: the run ends before, at step {steps:,}, by "
            f"trainer.max_epochs={settings.max_epochs}; to lift that: trainer.max_epochs=-1"
        )
    return steps


def choose_warmup(config: DictConfig, overrides: Sequence[str], before: dict[str, Any]) -> None:
    """Shorten a warmup that was not typed and is longer than the schedule, to a tenth of it; log a line that says so.

    A resumed run keeps its own; `before` are its settings.
    """
    key, total = "schedule.warmup_steps", config.total_steps
    if "warmup_steps" not in config.schedule or total is None or key in map(override_key, overrides):
        return
    config.schedule.warmup_steps = before.get(key, config.schedule.warmup_steps)
    if config.schedule.warmup_steps > total:
        shorter = max(1, total // 10)
        longer = f"{config.schedule.warmup_steps} would be more than its {total}"
        log.info(f"warmup   {shorter} steps, a tenth of the schedule: {longer}")
        config.schedule.warmup_steps = shorter


def check_validation_interval(config: DictConfig, data: TokenData) -> None:
    """Raise ConfigError for a share or an interval of less than a batch, or an interval longer than an epoch.

    Across epochs it may be longer than the run, which validates after its last step in any case.
    """
    settings = config.trainer
    key, limit = limit_that_counts(settings, "val")
    if not data.has_validation or limit == 0:
        return
    if limited(len(data.val_dataloader()), limit) < 1:
        raise ConfigError(
            f"trainer.{key}={limit}: leaves none of the {len(data.val_dataloader()):,} validation batches"
        )
    batches = limited(len(data.train_batch_sampler()), limit_that_counts(settings, "train")[1])
    interval, epochs = settings.val_check_interval, settings.check_val_every_n_epoch
    if epochs is None:
        return
    if isinstance(interval, float) and int(interval * batches) < 1:
        raise ConfigError(f"trainer.val_check_interval={interval}: less than one of an epoch's {batches:,} batches")
    if isinstance(interval, int) and interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval={interval}: an epoch has {batches:,} batches; allowed: 1 to {batches:,}, "
            "or more with trainer.check_val_every_n_epoch=null, which counts across epochs"
        )


def check_network(network: nn.Module, config: DictConfig, data: TokenData) -> None:
    """Raise ConfigError unless the network maps tokens (B, T) to logits (B, T, V or more), in floating point.

    It is tried on two windows, on the meta device if it can be: without computing.
    """
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model: {config.model._target_} gives no torch.nn.Module but {type(network).__name__}")
    B, T, V = 2, config.data.seq_len, data.tokenizer.vocab_size
    needed = f"(B, T, V) = ({B}, {T}, {V} or more) of floating-point numbers are needed for tokens ({B}, {T})"
    tokens, training = torch.zeros(B, T, dtype=torch.int64), network.training
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    network.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            try:
                meta = {name: weight.to("meta") for name, weight in weights.items()}
                logits = torch.func.functional_call(network, meta, (tokens.to("meta"),))
            except Exception:  # not every network can, or there is a mistake: its message is clearer with numbers
                logits = network(tokens)
        except Exception as error:
            words = f"the network fails on tokens ({B}, {T}): {one_line(str(error)) or type(error).__name__}"
            raise ConfigError(f"model, with data.seq_len={T}: {words}") from error
        finally:
            network.train(training)
    if not isinstance(logits, torch.Tensor):
        raise ConfigError(f"model: the network returns {type(logits).__name__}; logits {needed}")
    if "vocab_size" in config.model and logits.shape[-1] < V:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size}: the tokenizer has {V} tokens")
    fits = logits.is_floating_point() and logits.ndim == 3 and logits.shape[:2] == (B, T) and logits.shape[2] >= V
    if not fits:
        raise ConfigError(f"model: the network returns {tuple(logits.shape)} of {logits.dtype}; logits {needed}")


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


def build_module(config: DictConfig, network: nn.Module, data: TokenData, steps: int | None) -> LanguageModel:
    """Return the LightningModule; the optimizer and the schedule are tried once, so that their errors come early."""
    optimizer, schedule = build(config, "optimizer"), build(config, "schedule")
    if config.cooldown_start is not None:
        with errors_for_key(f"cooldown_start={config.cooldown_start}"):
            schedule = with_cooldown(schedule, config.cooldown_start, steps)
    module = LanguageModel(network, optimizer, schedule, data.tokenizer, compiled=config.compile)
    with errors_for_key("schedule", parameters=config.schedule):
        module.schedule(0)
    with errors_for_key("optimizer"):
        module.configure_optimizers()
    return module
