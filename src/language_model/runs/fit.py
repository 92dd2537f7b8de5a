"""Carrying out a plan: training, and writing the result however it ends."""

import math
import signal
import sys
import time
from typing import Any

from language_model.files import describe_os_error, display_path, write_json
from language_model.runs import announce
from language_model.runs.config import ConfigError, errors_for_key
from language_model.runs.folder import lock_folder, package_versions, run_folder
from language_model.runs.plan import Plan, look_again
from language_model.runs.resume import COMPLETED, limits
from language_model.terminal import log
from language_model.training.checkpoint import LastCheckpoint
from language_model.training.checkpoint_file import CheckpointError
from language_model.training.log_files import truncate_logs
from language_model.training.module import NonFiniteError


def fit(run: Plan) -> dict[str, Any]:
    """Train as planned, in the run's folder; return the result, which ``result.json`` also gets.

    A run that is finished already only returns its result. One that was trained, but has no result yet, gets that.
    With ``trainer.fast_dev_run``, nothing is written.

    Of several processes only the first writes to the folder, besides checkpoints.

    Raises:
        SystemExit: the run was interrupted; its status is 143 after SIGTERM and 130 after Ctrl-C.
        ConfigError: a gradient was not finite, a file could not be written, or the plan was carried out before.
    """
    if run.trainer.state.fn is not None:
        raise ConfigError("this plan has been carried out already: make a new one, with the same overrides, to resume")
    if run.trainer.fast_dev_run:
        return train(run)
    if run.trainer.is_global_zero and not run.is_finished:
        with errors_for_key("folder"):
            lock_folder(run.folder)
            run = look_again(run)
    if run.previous is not None and run.is_finished:
        log.info(f"finished {display_path(run.folder)}: nothing is left to train")
        return run.previous.result
    if not run.trainer.is_global_zero:
        return train(run)
    with run_folder(run.folder, run.config, run.overrides, run.data.tokenizer):
        return train(run)


def train(run: Plan) -> dict[str, Any]:
    """Log the start, train, and write the result."""
    result: dict[str, Any] = {
        "status": "failed",
        "uniform_baseline": math.log(run.data.tokenizer.vocab_size),
        "untrained_loss": announce.log_start(run),
        "versions": package_versions(),
    }
    saved = run.previous.content if run.previous else {}
    writes = run.trainer.is_global_zero and not run.trainer.fast_dev_run
    if writes:
        with errors_for_key("folder"):
            truncate_logs(run.trainer, run.folder, saved.get("logs", {}))
    seconds_before = run.previous.result.get("seconds", 0.0) if run.previous else 0.0
    started = time.perf_counter() - max(seconds_before, saved.get("seconds", 0.0))
    for checkpoint in run.trainer.checkpoint_callbacks:
        if isinstance(checkpoint, LastCheckpoint):
            checkpoint.limits, checkpoint.started = limits(run.config), started
    try:
        result["status"] = run_trainer(run)
    except SystemExit:
        result["status"] = "interrupted"
        raise
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        announce.log_failure(run, error)
        if isinstance(error, NonFiniteError | OSError | CheckpointError):  # no mistake in the code: no traceback
            message = describe_os_error(error, run.folder) if isinstance(error, OSError) else str(error)
            raise ConfigError(message) from error
        raise
    finally:
        result["seconds"] = time.perf_counter() - started
        if run.trainer.is_global_zero:
            result |= collect_result(run)
        if writes:
            write_result(run, result)
    return result


def write_result(run: Plan, result: dict[str, Any]) -> None:
    """Add the run to TensorBoard's HPARAMS, and only then write ``result.json``, so that no finished run lacks either.

    ConfigError if a file could not be written, unless the run was interrupted or failed: that is said instead.
    """
    try:
        announce.log_hyperparameters(run, result)
        write_json(run.folder / "result.json", result)
    except OSError as error:
        problem = describe_os_error(error, run.folder)
        if result["status"] in COMPLETED:
            raise ConfigError(f"folder: {problem}; the same command writes what is missing") from error
        if result["status"] == "interrupted":
            log.warning(problem)


def run_trainer(run: Plan) -> str:
    """Run Lightning's trainer; return the status, finished or pruned. SystemExit if the run was interrupted."""
    if run.is_trained:
        run.trainer.limit_train_batches = 0  # lightning then does only what comes after the training
    try:
        run.trainer.fit(run.module, run.data, ckpt_path=run.checkpoint, weights_only=True)
    except SystemExit:  # lightning's, after SIGTERM and Ctrl-C, with other statuses
        announce.log_interrupted(run)
        received = getattr(run.callbacks.get("last"), "signal", None)
        sys.exit(143 if run.trainer.received_sigterm or received == signal.SIGTERM else 130)
    pruning = run.callbacks.get("pruning")
    return "pruned" if pruning is not None and pruning.pruned else "finished"


def undecayed(run: Plan) -> int | None:
    """Return the steps of the schedule if the run ended before them, at a rate that was still to fall; else None."""
    total, done, rate = run.config.total_steps, run.trainer.global_step, run.module.schedule
    return total if total is not None and done < total and rate(done) > 1.05 * rate(total) else None


def collect_result(run: Plan) -> dict[str, Any]:
    """Return what a run has reached: metrics, steps, speed, gradient norms, the best checkpoint, the last sample."""
    trainer = run.trainer
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    result: dict[str, Any] = {
        "monitor": run.config.monitor,
        "monitor_mode": run.config.monitor_mode,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name},
        "limits": limits(run.config),
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
    }
    if total := undecayed(run):
        result["undecayed"] = {"lr": run.module.schedule(trainer.global_step), "total_steps": total}
    if run.module.validated_step is not None:
        result |= {"validated_step": run.module.validated_step, "validated_share": run.module.validated_share}
    if run.module.unfinished_epoch is not None:
        result["unfinished_epoch"] = run.module.unfinished_epoch
    for checkpoint in trainer.checkpoint_callbacks:
        if getattr(checkpoint, "best_model_path", "") and checkpoint.monitor == run.config.monitor:
            result["best"] = float(checkpoint.best_model_score)
            result["best_checkpoint"] = checkpoint.best_model_path
    if (throughput := callbacks.get("Throughput")) is not None:
        result |= {"tokens": throughput.tokens, "tokens_per_sec": throughput.tokens_per_sec, "mfu": throughput.mfu}
    if (norms := callbacks.get("GradientNorm")) is not None:
        result |= norms.summary()
    if (stopping := callbacks.get("EarlyStopping")) is not None and stopping.stopping_reason_message:
        result["stopped_early"] = stopping.stopping_reason_message
    if (restoring := callbacks.get("RestoreBest")) is not None and restoring.restored_step is not None:
        result["restored_best"] = True
    if (sample := callbacks.get("Sample")) is not None:
        result |= {"sample": sample.text, "sample_description": sample.description}
    return result
