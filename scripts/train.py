"""Train a GPT: data, network, trainer, optimizer and schedule, fit, result.

`python scripts/train.py --help` shows all that can be set.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from language_model.config import JOB, ConfigError, blamed_on, build, check, entry_point, one_of


@entry_point("train")
def main(config: DictConfig) -> None:
    """Train, or with ``-m`` have one of a sweep's jobs do it in a process of its own."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from language_model.sweep import do_job

        do_job(config)
    else:
        train(config)


def train(config: DictConfig) -> None:
    """Do one run, as the config says."""
    import lightning as L  # here, so that --help and an unknown key need not wait for it
    from lightning.pytorch.callbacks import Checkpoint

    from language_model import hardware, report, run
    from language_model.checkpoint import rewind
    from language_model.module import LanguageModel, NonFiniteError
    from language_model.schedule import steps_in_run
    from language_model.sweep import end_with_sweep
    from language_model.terminal import log, speak

    speak()
    if JOB in os.environ:
        end_with_sweep()

    # Build everything, working out what was left open; nothing is written until all of it has proved good.
    config, overrides = run.continued(config)
    check(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    folder = run.folder_for(config)
    config.folder = str(folder)
    before, is_new = run.earlier(folder), not folder.exists()
    data = build(config, "data")
    config.vocab_size = config.vocab_size or data.tokenizer.vocab_size
    if config.vocab_size < data.tokenizer.vocab_size:
        raise ConfigError(f"vocab_size={config.vocab_size}: the tokenizer has {data.tokenizer.vocab_size} tokens")
    device = hardware.device_type(config.trainer.accelerator)
    precision = hardware.full_name(config.trainer.precision or hardware.best_precision(device))
    config.trainer.precision = precision
    if config.model.get("attention", "") is None:
        config.model.attention = hardware.best_attention(device, precision, config.model.get("dropout") or 0)
    if config.optimizer.get("fused", False) is None:
        config.optimizer.fused = hardware.can_fuse_optimizer(device, precision)
    if precision == "16-mixed" and config.optimizer.get("fused"):
        raise ConfigError("optimizer.fused=true: does not go with trainer.precision=16-mixed; set it to false")
    network = build(config, "model")
    validates = data.has_validation and config.trainer.limit_val_batches != 0
    monitored = ["val/loss", "val/perplexity", "val/bits_per_byte", "train/loss_epoch"][0 if validates else 3 :]
    config.monitor = config.monitor or monitored[0]
    one_of("monitor", config.monitor, monitored)
    callbacks = {name: callback for name, callback in build(config, "callbacks").items() if callback}
    loggers = [logger for logger in build(config, "logger").values() if logger]
    trainer = build(
        config,
        "trainer",
        callbacks=list(callbacks.values()),
        logger=loggers,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks.values()),  # or it adds one
        plugins=[build(config, "checkpoint_io")],
    )
    data.trainer = trainer  # the order of the windows depends on its devices
    limits = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches")
    steps = steps_in_run(len(data.order()), **{limit: config.trainer[limit] for limit in limits})
    config.total_steps = steps if config.total_steps is None else config.total_steps
    if config.total_steps is None and "total_steps" in config.schedule:
        raise ConfigError(
            "total_steps: the schedule needs an end; set trainer.max_epochs, trainer.max_steps or total_steps"
        )
    if config.compile is None:
        config.compile = hasattr(network, "compile_for_training") and hardware.worth_compiling(device, steps)
    if config.compile and not hasattr(network, "compile_for_training"):
        raise ConfigError(f"compile=true: {config.model._target_} has no compile_for_training; set it to false")
    if config.compile and (missing := hardware.missing_for_compiling(device)):
        raise ConfigError(f"compile=true: on this machine it needs {missing}; install that, or set it to false")
    how = build(config, "optimizer"), build(config, "schedule")
    module = LanguageModel(network, *how, data.tokenizer, compiled=config.compile)
    with blamed_on("schedule"):
        module.schedule(0)
    with blamed_on("optimizer"):
        module.configure_optimizers()
    if "sample" in callbacks:
        with blamed_on("callbacks.sample.prompt"):
            data.tokenizer.encode(callbacks["sample"].prompt or data.opening)

    # A run of that name goes on where it stopped, if it is the same run.
    checkpoint = Path(config.resume) if config.resume else None
    if before is not None:
        run.check_unchanged(folder, before.settings, config)
        if run.is_finished(before, config):
            report.conclude(config, before.result)
            report.do_exercise(config)
            return
        checkpoint = before.checkpoint
    if checkpoint is not None:
        run.check_resumable(checkpoint, module, steps)

    with run.kept(folder, config, overrides, data.tokenizer, trainer.is_global_zero):
        untrained_loss = report.announce(config, data, module, trainer, steps)
        if before is not None:
            log.info(f"goes on  from {run.shown(before.checkpoint)}")
        if trainer.is_global_zero and not is_new:
            rewind(trainer, folder, run.read(before.checkpoint).get("logs", {}) if before else {})
        result: dict[str, Any] = {
            "status": "failed",
            "guessing_loss": math.log(data.tokenizer.vocab_size),
            "untrained_loss": untrained_loss,
            "versions": run.versions(),
        }
        started = time.perf_counter() - (before.result.get("seconds", 0.0) if before else 0.0)
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
            pruned = "pruning" in callbacks and callbacks["pruning"].pruned
            result["status"] = "pruned" if pruned else "finished"
        except SystemExit:  # how lightning ends after SIGTERM and a second Ctrl-C, with statuses of its own
            result["status"] = "interrupted"
            report.interrupted(config, trainer.global_step)
            asked = callbacks["last"].signal if "last" in callbacks else None
            sys.exit(143 if trainer.received_sigterm or asked == signal.SIGTERM else 130)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {error}"
            report.failed(config, error, module)
            if isinstance(error, NonFiniteError | OSError):  # nothing in the code is wrong: no traceback
                raise ConfigError(str(error)) from error
            raise
        finally:
            result["seconds"] = time.perf_counter() - started
            if trainer.is_global_zero:
                result |= report.collect(module, trainer, config.monitor)
                run.save_result(folder, result)
        if trainer.is_global_zero:
            report.log_hyperparameters(config, result, trainer)
            report.conclude(config, result)
            report.do_exercise(config)


if __name__ == "__main__":
    main()
