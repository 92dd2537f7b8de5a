"""What a run logs before its first step and when it ends."""

import math
import os
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig

from language_model.data.datamodule import TokenData
from language_model.files import ROOT, display_path, write_json
from language_model.runs.config import ConfigError, as_dict, flatten, one_line
from language_model.runs.plan import Plan
from language_model.runs.records import read_job
from language_model.terminal import JOB_LABEL, log
from language_model.training.hardware import describe_device
from language_model.training.module import LanguageModel, NonFiniteError
from language_model.training.schedule import limit_that_counts, limited

# Settings that TensorBoard's HPARAMS lists, besides those that a sweep varies, and the exceptions.
TUNED = (
    "model.*", "optimizer.*", "schedule.*", "seed", "data.batch_size", "data.seq_len", "data.stride",
    "data.val_fraction", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.max_epochs",
)  # fmt: skip
NOT_TUNED = ("*_", "*.vocab_size", "*.attention", "*.fused", "schedule.lr", "schedule.total_steps")


def log_start(run: Plan) -> float:
    """Log what will be trained, on what, and where it is written; return the loss before training.

    A warning says if that loss is far from ln V, the loss of equal probabilities for all V tokens.
    """
    config, data, trainer, device = run.config, run.data, run.trainer, run.trainer.strategy.root_device
    uniform = math.log(data.tokenizer.vocab_size)
    untrained = untrained_loss(run.module, data, device)
    devices = f" × {trainer.world_size}" if trainer.world_size > 1 else ""
    batches = limited(len(data.train_batch_sampler()), limit_that_counts(config.trainer, "train")[1])
    if trainer.fast_dev_run:
        total = f"{int(config.trainer.fast_dev_run)} in all, as trainer.fast_dev_run says"
    elif run.steps:
        epochs = run.steps / math.ceil(batches / trainer.accumulate_grad_batches)
        total = f"{run.steps:,} in all ({epochs:.3g} epochs)"
    else:
        total = "no limit"
    whole = len(data.train_batch_sampler())
    in_epoch = f"{batches:,} batches an epoch" if batches == whole else f"{batches:,} of {whole:,} batches an epoch"
    tokens = data.batch_size * data.seq_len * trainer.world_size * trainer.accumulate_grad_batches
    split = f" and {data.num_val_tokens:,} for validation" if data.has_validation else ""
    lines = {
        "device": f"{describe_device(device)}{devices}, {', '.join(describe_arithmetic(config))}",
        "corpus": f"{data.name}: {data.num_train_tokens:,} tokens{split}, vocabulary {data.tokenizer.vocab_size:,}",
        "windows": f"{data.train_batch_sampler().num_windows:,} of {data.seq_len} tokens, stride {data.stride}",
        "steps": f"{in_epoch}, {total}, {tokens:,} tokens a step",
        "model": f"{sum(p.numel() for p in run.module.network.parameters()):,} parameters",
        "loss": f"uniform baseline ln {data.tokenizer.vocab_size} = {uniform:.4f}, untrained {untrained:.4f}",
        "folder": "none, as trainer.fast_dev_run says" if trainer.fast_dev_run else display_path(run.folder),
    }
    for name, line in lines.items():
        log.info(f"{name:8} {line}")
    log.info("")
    if abs(untrained - uniform) > 0.1 * uniform + 0.1 and not config.resume:
        log.warning(
            f"the untrained loss {untrained:.2f} is far from the uniform baseline {uniform:.2f}: "
            "is something wrong with the network or its initial weights?"
        )
    if run.previous is not None:
        left = "; it is trained: what comes after the training is left" if run.is_trained else ""
        at = f"step {run.previous.content['global_step']:,}"
        log.info(f"resuming from {display_path(run.previous.checkpoint)}, {at}{left}")
    elif run.checkpoint is not None:
        log.info(f"starting from {display_path(run.checkpoint)}")
    return untrained


@torch.no_grad()
def untrained_loss(module: LanguageModel, data: TokenData, device: torch.device) -> float:
    """Return the loss (nats a token) of the network before training, on about 2,048 tokens spread over the corpus."""
    indices = np.linspace(0, len(data.train_windows) - 1, max(1, 2048 // data.seq_len)).astype(np.int64)
    training = module.training
    module.eval().to(device)
    inputs, targets = data.train_windows.__getitems__(indices)
    loss = module.loss((inputs.to(device), targets.to(device)))
    module.train(training)
    return float(loss)


def describe_arithmetic(config: DictConfig) -> list[str]:
    """Return how the run computes: precision, attention, optimizer, compiled or not."""
    words = [f"precision {config.trainer.precision}"]
    if config.model.get("attention"):
        words.append(f"attention {config.model.attention}")
    if config.optimizer.get("fused") is not None:
        words.append(f"optimizer {'fused' if config.optimizer.fused else 'not fused'}")
    return [*words, "compiled" if config.compile else "not compiled"]


def log_hyperparameters(run: Plan, result: dict[str, Any]) -> None:
    """Add the run to TensorBoard's HPARAMS: its settings, its status and its best metric.

    The best metric is a column like the settings: as a metric it would also be a chart with one point.
    """
    settings = {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in flatten(as_dict(run.config)).items()
        if value is not None
        and any(fnmatch(key, pattern) for pattern in TUNED)
        and not any(fnmatch(key, pattern) for pattern in NOT_TUNED)
    }
    swept = read_job(run.folder).get("swept", {})
    settings = swept | settings | {"data": run.data.name, "Status": result["status"]}  # capitals are sorted first
    if "best" in result:
        settings[f"Best {result['monitor']}"] = result["best"]
    for logger in run.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings, step=run.trainer.global_step)
            logger.save()


def log_end(config: DictConfig, result: dict[str, Any]) -> None:
    """Log what a finished run has reached, and what can be done next."""
    metrics, folder = result["metrics"], Path(config.folder)
    log.info("")
    if "stopped_early" in result:
        inside = result.get("unfinished_epoch")
        when = f"in epoch {result['epochs']}" if inside else f"after epoch {result['epochs'] - 1}"
        log.info(f"stopped  {when}: {result['stopped_early']}")
    if "best" in result:
        saved = display_path(folder / "checkpoints" / Path(result["best_checkpoint"]).name)
        log.info(f"best     {result['monitor']} {result['best']:.4f}, saved in {saved}")
    elif config.callbacks.get("best") and config.monitor not in metrics:
        log.info(f"best     none is saved: {config.monitor} was not logged; last.ckpt holds the last weights")
    log.info(f"final    {describe_final(result)}; uniform baseline {result['uniform_baseline']:.4f}")
    speed = f"; {result['tokens_per_sec']:,.0f} tokens/s" if result.get("tokens_per_sec") else ""
    speed += f", {result['mfu']:.1%} of the device's peak" if result.get("mfu") else ""
    speed += ", without validations and saves" if speed else ""
    log.info(f"time     {result['seconds']:.1f} s to step {result['steps']:,}, all starts of this run together{speed}")
    if "grad_norm_max" in result:
        clip, number = config.trainer.gradient_clip_val, result.get("skipped_steps")
        skipped = f"; {number:,} steps skipped, whose gradient overflowed" if number else ""
        clipped = f"{result['clipped_share']:.1%} of the steps clipped to {clip:g}" if clip else "not clipped"
        log.info(
            f"gradient norm before clipping: largest {result['grad_norm_max']:.2f}, "
            f"mean {result['grad_norm_mean']:.2f}, last {result['grad_norm_last']:.2f}; {clipped}{skipped}"
        )
    if result.get("sample"):
        log.info(f"sample   {result.get('sample_description') or 'of the last weights'}:")
        log.info("\n" + result["sample"].strip("\n"))
    if config.trainer.fast_dev_run:
        return
    if "undecayed" in result:
        log_undecayed(config, result)
    log.info("")
    log.info(f"look     tensorboard --logdir {shlex.quote(display_path(folder.parent))}")
    reached = {"max_steps": result["steps"], "max_epochs": result["epochs"]}
    ended = [limit for limit, number in reached.items() if 0 < config.trainer[limit] <= number]
    if ended:
        twice = [f"trainer.{limit}={2 * config.trainer[limit]}" for limit in ended]
        log.info(f"longer   {resume_command(folder, *twice)}")


def log_undecayed(config: DictConfig, result: dict[str, Any]) -> None:
    """Log that a run ended before its learning rate had fallen, and the command that lets it fall."""
    steps, rate, total = result["steps"], result["undecayed"]["lr"], result["undecayed"]["total_steps"]
    more = max(2, steps // 8)
    overrides = [f"trainer.max_steps={steps + more}", f"total_steps={total}", f"cooldown_start={steps}"]
    overrides += ["trainer.max_epochs=-1"] if config.trainer.max_epochs > 0 else []
    overrides += ["callbacks.early_stopping=null"] if "stopped_early" in result else []
    overrides += ["trainer.max_time=null"] if config.trainer.max_time else []
    log.info("")
    log.info(f"rate     {rate:.1e} at the end, step {steps:,} of the schedule's {total:,}: it has not decayed")
    log.info(f"         {more:,} more steps let it fall to 0: {resume_command(Path(config.folder), *overrides)}")


def describe_final(result: dict[str, Any]) -> str:
    """Return the last training and validation loss, each with the steps that it is of, and the monitored metric."""
    metrics, parts = result["metrics"], []
    if unfinished := result.get("unfinished_epoch"):
        over = f"mean over the last {unfinished['steps']:,} steps of an unfinished epoch"
        parts.append(f"training loss {unfinished['loss']:.4f} ({over})")
    elif "train/loss_epoch" in metrics:
        parts.append(f"train/loss_epoch {metrics['train/loss_epoch']:.4f} (mean of the last epoch)")
    if "val/loss" in metrics:
        step, share = result.get("validated_step"), result.get("validated_share") or 1
        of = [f"step {step:,}"] if step is not None else []
        of += [f"{100 * share:.3g}% of the split"] if share < 1 else []
        parts.append(f"val/loss {metrics['val/loss']:.4f}" + (f" ({', '.join(of)})" if of else ""))
    if (monitor := result.get("monitor")) in metrics and monitor not in ("train/loss_epoch", "val/loss"):
        parts.append(f"{monitor} {metrics[monitor]:.4f}")
    return ", ".join(parts) or "no loss was logged"


def log_interrupted(run: Plan) -> None:
    """Log how an interrupted run can be resumed."""
    if JOB_LABEL in os.environ:
        return  # the sweep says how it resumes
    log.warning(f"interrupted at step {run.trainer.global_step:,}; resume with: {resume_command(run.folder)}")


def log_failure(run: Plan, error: Exception) -> None:
    """Log why a run failed and how to resume it; save the batch if its gradient was not finite."""
    if isinstance(error, NonFiniteError):
        file = run.folder / "nonfinite.json"
        texts = [run.module.tokenizer.decode(row) for row in error.tokens.tolist()]
        facts = {"step": error.step, "lr": error.lr, "loss": error.loss, "grad_norm": error.grad_norm, "texts": texts}
        where = ""
        if run.trainer.is_global_zero and not run.trainer.fast_dev_run:
            write_json(file, facts)
            where = f"; all of it is in {display_path(file)}"
        log.warning(f"the batch begins with {texts[0][:60]!r}{where}")
    elif not isinstance(error, OSError | ConfigError):  # which is said at the end
        log.warning(f"{type(error).__name__}: {one_line(str(error))}")
    if (run.folder / "checkpoints" / "last.ckpt").exists():
        log.warning(f"once the cause is removed, resume with: {resume_command(run.folder)}")


def resume_command(folder: Path, *overrides: str) -> str:
    """Return the command that resumes a run."""
    return shlex.join(
        ["python", display_path(ROOT / "scripts" / "train.py"), f"resume={display_path(folder)}", *overrides]
    )
