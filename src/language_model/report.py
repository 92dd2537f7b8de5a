"""What a run says before its first step and after its last, and the result it leaves."""

import json
import math
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig

from language_model.config import JOB, ROOT, build, flat, one_line, plain
from language_model.data import TokenData
from language_model.hardware import describe
from language_model.module import LanguageModel, NonFiniteError
from language_model.run import finite, may_change, shown
from language_model.summary import job_of
from language_model.terminal import log


@torch.no_grad()
def untrained_loss(module: LanguageModel, data: TokenData, device: torch.device) -> float:
    """Return the loss (nats a token) of a network that has not learned yet, on a few windows of the corpus."""
    some = np.linspace(0, len(data.train_windows) - 1, max(1, 2048 // data.seq_len)).astype(np.int64)
    training = module.training
    module.eval().to(device)
    inputs, targets = data.train_windows.__getitems__(some)
    loss = module.loss((inputs.to(device), targets.to(device)))
    module.train(training)
    return float(loss)


def announce(
    config: DictConfig, data: TokenData, module: LanguageModel, trainer: L.Trainer, steps: int | None
) -> float:
    """Say what will happen, with a warning if the untrained loss is far from guessing; return that loss."""
    batches = len(data.train_dataloader())
    tokens = data.batch_size * data.seq_len * trainer.world_size * trainer.accumulate_grad_batches
    device = trainer.strategy.root_device
    guessing = math.log(data.tokenizer.vocab_size)
    untrained = untrained_loss(module, data, device)
    many = f" × {trainer.world_size}" if trainer.world_size > 1 else ""
    epochs = f", {trainer.max_epochs} epochs" if (trainer.max_epochs or -1) > 0 else ""
    total = f"{steps:,} in all" if steps else "without end"
    split = f" and {data.num_val_tokens:,} for validation" if data.has_validation else ""
    parameters = sum(p.numel() for p in module.network.parameters())
    lines = {
        "device": f"{describe(device)}{many}, {', '.join(chosen(config))}",
        "corpus": f"{data.name}: {data.num_train_tokens:,} tokens{split}, vocabulary {data.tokenizer.vocab_size:,}",
        "windows": f"{data.order().num_windows:,} of {data.seq_len} tokens, stride {data.stride}",
        "steps": f"{batches:,} batches an epoch, {total}{epochs}, {tokens:,} tokens a step",
        "model": f"{parameters:,} parameters",
        "loss": f"guessing ln {data.tokenizer.vocab_size} = {guessing:.4f}, untrained {untrained:.4f}",
        "folder": shown(Path(config.folder)),
    }
    for name, line in lines.items():
        log.info(f"{name:8} {line}")
    log.info("")
    if abs(untrained - guessing) > 0.1 * guessing + 0.1 and not config.resume:
        log.warning(
            f"the untrained loss {untrained:.2f} is far from guessing, {guessing:.2f}: "
            "is something wrong with the network or its initial weights?"
        )
    return untrained


def chosen(config: DictConfig) -> list[str]:
    """Return in words how the run does its arithmetic: what the hardware decided, or the settings said."""
    words = [f"precision {config.trainer.precision}"]
    if config.model.get("attention"):
        words.append(f"attention {config.model.attention}")
    if config.optimizer.get("fused") is not None:
        words.append(f"optimizer {'fused' if config.optimizer.fused else 'not fused'}")
    return [*words, "compiled" if config.compile else "not compiled"]


def collect(module: LanguageModel, trainer: L.Trainer, monitor: str) -> dict[str, Any]:
    """Return what a run has come to: its metrics, steps, time, and gradient norms."""
    callbacks = {type(c).__name__: c for c in trainer.callbacks}
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k}
    result: dict[str, Any] = {
        "metrics": metrics,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
    }
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "monitor", None) == monitor and checkpoint.best_model_score is not None:
            result |= {"monitor": monitor, "best": float(checkpoint.best_model_score)}
            result |= {"best_checkpoint": checkpoint.best_model_path}
    if (throughput := callbacks.get("Throughput")) is not None:
        result |= {"tokens": throughput.tokens, "tokens_per_sec": throughput.tokens_per_sec, "mfu": throughput.mfu}
    if (norms := callbacks.get("GradientNorm")) is not None:
        result |= norms.summary(module.grad_norm)
    if (stopping := callbacks.get("EarlyStopping")) is not None and stopping.stopping_reason_message:
        result["stopped_early"] = stopping.stopping_reason_message
    if (restoring := callbacks.get("RestoreBest")) is not None and restoring.done:
        result["restored_best"] = True
    if (sample := callbacks.get("Sample")) is not None:
        result["sample"] = sample.text
    return result


def log_hyperparameters(config: DictConfig, result: dict[str, Any], trainer: L.Trainer) -> None:
    """Write a flat record of what was set, and the best value it gave, to TensorBoard: once, at the end.

    What a sweep varies comes a second time as ``(swept) <key>``: TensorBoard sorts by name, and shows the first few.
    """
    sections = ("model", "data", "optimizer", "schedule", "trainer", "seed")
    settings = {
        key: value
        for key, value in flat(plain(config)).items()
        if key.split(".")[0] in sections and value is not None and not key.endswith("_") and not may_change(key)
    }
    for key, value in job_of(Path(config.folder)).get("swept", {}).items():
        with suppress(ValueError):
            value = float(value)
        settings[f"(swept) {key}"] = value
    metrics = {f"best/{result['monitor']}": result["best"]} if "best" in result else {}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(settings, metrics, step=trainer.global_step)
            logger.save()


def conclude(config: DictConfig, result: dict[str, Any]) -> None:
    """Say what a finished run has come to, and what can be done next."""
    metrics = result["metrics"]
    last = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("train/loss_epoch", "val/loss") if name in metrics)
    log.info("")
    if "stopped_early" in result:
        log.info(f"stopped  after epoch {result['epochs'] - 1}: {result['stopped_early']}")
    if "best" in result:
        log.info(f"best     {result['monitor']} {result['best']:.4f}, kept in {shown(Path(result['best_checkpoint']))}")
    log.info(f"final    {last or 'no epoch was finished'}; guessing is {result['guessing_loss']:.4f}")
    speed = f", {result['tokens_per_sec']:,.0f} tokens/s" if "tokens_per_sec" in result else ""
    speed += f", {result['mfu']:.1%} of the device's peak" if result.get("mfu") else ""
    log.info(f"time     {result['seconds']:.1f} s for {result['steps']:,} steps{speed}")
    if "grad_norm_max" in result:
        clip = config.trainer.gradient_clip_val
        clipped = f"{result['clipped_share']:.1%} of the steps clipped to {clip:g}" if clip else "not clipped"
        log.info(
            f"gradient norm largest {result['grad_norm_max']:.2f}, mean {result['grad_norm_mean']:.2f}, "
            f"last {result['grad_norm_last']:.2f}; {clipped}"
        )
    if result.get("sample"):
        log.info("\n" + result["sample"].strip("\n"))
    folder = Path(config.folder)
    log.info("")
    log.info(f"look     tensorboard --logdir {shlex.quote(shown(folder.parent))}")
    if config.trainer.max_epochs > 0:
        log.info(f"go on    {command_to_resume(folder, f'trainer.max_epochs={2 * config.trainer.max_epochs}')}")


def do_exercise(config: DictConfig) -> None:
    """Print and draw what an experiment that is an exercise asks for; of a sweep's, the sweep does it for all jobs."""
    if JOB not in os.environ and (exercise := build(config, "exercise")):
        exercise(Path(config.folder), [Path(config.folder)])


def interrupted(config: DictConfig, step: int) -> None:
    """Say how a run that was stopped from outside can go on."""
    log.warning(f"stopped at step {step:,}; go on with: {command_to_resume(Path(config.folder))}")


def failed(config: DictConfig, error: Exception, module: LanguageModel) -> None:
    """Say why a run failed and how it can go on; keep the batch whose gradient was not finite."""
    if isinstance(error, NonFiniteError):
        file = Path(config.folder) / "nonfinite.json"
        texts = [module.tokenizer.decode(row) for row in error.tokens.tolist()]
        facts = {"step": error.step, "lr": error.lr, "loss": error.loss, "grad_norm": error.grad_norm, "texts": texts}
        file.write_text(json.dumps(finite(facts), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        log.warning(f"the batch begins with {texts[0][:60]!r}; all of it is in {shown(file)}")
    else:
        log.warning(f"{type(error).__name__}: {one_line(str(error))}")
    if (Path(config.folder) / "checkpoints" / "last.ckpt").exists():
        log.warning(f"once that is mended, go on with: {command_to_resume(Path(config.folder))}")


def command_to_resume(folder: Path, *further: str) -> str:
    """Return the command that goes on with a run."""
    return shlex.join(["python", shown(ROOT / "scripts" / "train.py"), f"resume={shown(folder)}", *further])
