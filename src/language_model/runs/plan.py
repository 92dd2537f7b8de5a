"""The plan of a run: everything that is decided before its first step, as one object.

No run folder is created while a plan is made, so a mistake in the settings leaves none behind. In a notebook:

    from language_model import fit, plan

    run = plan("model=small", "trainer.max_epochs=2", "name=first")
    run.steps, run.module.network, run.config.trainer.precision
    result = fit(run)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from language_model.data.datamodule import TokenData
from language_model.runs.choices import (
    build_data,
    build_module,
    build_trainer,
    check_network,
    check_validation_interval,
    choose_arithmetic,
    choose_compile,
    choose_steps,
    choose_warmup,
)
from language_model.runs.command_line import override_key
from language_model.runs.config import SETTINGS, as_dict, build, check_config, check_value, errors_for_key
from language_model.runs.folder import RUNS, choose_folder
from language_model.runs.load import load_checkpoint
from language_model.runs.monitor import choose_monitor
from language_model.runs.records import read_result
from language_model.runs.resume import (
    PreviousRun,
    check_checkpoint_fits,
    check_same_settings,
    compose,
    find_previous_run,
    is_finished,
    limits,
    resolve_resume,
)
from language_model.terminal import log, setup_logging
from language_model.training.module import LanguageModel


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
    def is_trained(self) -> bool:
        """Whether the training has already reached the end that is asked for, whatever else is left to do."""
        return self.previous is not None and self.previous.content.get("limits") == limits(self.config)

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
    check_value("resume", as_dict(config)["resume"], SETTINGS["resume"])
    config, overrides = resolve_resume(config, typed)
    check_config(config)
    warn_of_sonnets(overrides)
    folder = choose_folder(config)
    config.folder = str(folder)
    previous = None if config.trainer.fast_dev_run else find_previous_run(folder)
    parts = build_parts(config, overrides, previous.settings if previous else {})
    run = Plan(config, overrides, folder, *parts, previous)
    check_resume(run)
    return run


def warn_of_sonnets(overrides: Sequence[str]) -> None:
    """Warn if another text was typed with the settings of the chapter's short one."""
    keys = {override_key(override) for override in overrides}
    if "data.path" in keys and not keys & {"data", "experiment", "data.stride", "data.val_fraction"}:
        log.warning(
            "data.path without data=text: the settings are those of data=sonnets, for a short text (every window, no "
            "validation split); for a text of your own: data=text data.path=..."
        )


def rehearse(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a run with these settings could not start, as far as that can be known on this machine.

    Nothing is kept. A job of a sweep may run on another machine, so devices and precision are not tried.
    """
    config = config.copy()
    check_config(config)
    config.trainer.update(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32-true")
    config.compile, config.folder = False, str(RUNS / "rehearsed")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            build_parts(config, overrides, {})
    finally:
        log.setLevel(level)


def build_parts(
    config: DictConfig, overrides: Sequence[str], before: dict[str, Any]
) -> tuple[TokenData, LanguageModel, dict[str, Callback], L.Trainer, int | None]:
    """Return data, module, callbacks, trainer and the number of steps; fills in what is null in `config`.

    Args:
        config: the settings.
        overrides: what of them was typed.
        before: the settings of the run that is resumed.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config)
    choose_arithmetic(config)
    network = build(config, "model")
    check_network(network, config, data)
    choose_monitor(config, data)
    callbacks, trainer = build_trainer(config)
    data.trainer = trainer  # the order of the windows depends on its devices
    steps = choose_steps(config, data)
    check_validation_interval(config, data)
    choose_warmup(config, overrides, before)
    choose_compile(config, network, steps)
    module = build_module(config, network, data, steps)
    if "sample" in callbacks:
        with errors_for_key("callbacks.sample.prompt"):
            data.tokenizer.encode(callbacks["sample"].prompt or data.default_prompt)
    return data, module, callbacks, trainer, steps


def check_resume(run: Plan) -> None:
    """Raise ConfigError if the folder holds another run, or the checkpoint does not fit this one."""
    if run.previous is not None:
        check_same_settings(run.folder, run.previous.settings, run.config)
    if run.checkpoint is not None and not run.is_finished:
        content = run.previous.content if run.previous else load_checkpoint(run.checkpoint, key="resume")
        done = check_checkpoint_fits(run.checkpoint, content, run.module, run.steps, is_own=run.previous is not None)
        before = run.previous.settings.get("total_steps") if run.previous is not None else None
        warn_of_rising_rate(run, content, done, before)


def look_again(run: Plan) -> Plan:
    """Return the plan with what its folder holds now, which is locked; another process may have trained there since.

    ConfigError if that was another run.
    """
    if run.previous is not None and run.previous.result == read_result(run.folder):
        return run
    now = replace(run, previous=find_previous_run(run.folder))
    check_resume(now)
    return now


def warn_of_rising_rate(run: Plan, content: dict[str, Any], done: int, total_before: int | None) -> None:
    """Warn if the first step has a higher learning rate than it would have had when the checkpoint was saved.

    Args:
        run: the plan.
        content: of the checkpoint that training continues from.
        done: the steps in it.
        total_before: steps that the schedule spanned so far; None if it was without end, or is not known.
    """
    before, now = content["optimizer_states"][0]["param_groups"][0]["lr"], run.module.schedule(done)
    if now > 1.05 * before:
        total = run.config.total_steps
        why = f": the schedule is stretched from {total_before:,} to {total:,} steps" if total_before != total else ""
        keep = total_before or done
        log.warning(
            f"at step {done:,} the learning rate rises from {before:.2g} to {now:.2g}{why if total_before else ''}. "
            f"To keep it at {before:.2g}: total_steps={keep}; to let it fall from there to 0: total_steps={keep} "
            f"cooldown_start={done}"
        )
