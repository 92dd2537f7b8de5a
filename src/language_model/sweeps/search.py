"""Search for good settings: Optuna proposes values, a sweep's jobs try them, hopeless ones stop early."""

from typing import Any

from pydantic import PositiveInt

from language_model.files import display_path
from language_model.runs.command_line import quote_override
from language_model.runs.config import ConfigError, errors_for_key
from language_model.runs.monitor import TRAINING_METRIC, Mode, choose_mode
from language_model.runs.records import read_result
from language_model.runs.resume import COMPLETED
from language_model.sweeps.study import Trials, distribution_of, end_values, was_non_finite
from language_model.sweeps.summary import format_setting
from language_model.sweeps.sweep import Job, Sweep, handle_interruption, job_is_finished, without_hydra
from language_model.terminal import log


def search(
    sweep: Sweep,
    arguments: list[str],
    n_trials: PositiveInt,
    n_jobs: PositiveInt,
    params: dict[str, Any],
    sampler: dict[str, Any],
    pruner: dict[str, Any],
) -> None:
    """Try values from the search spaces given.

    Args:
        sweep: composes and launches the jobs.
        arguments: the typed overrides, some of them search spaces.
        n_trials: trials in all, those of earlier sessions included.
        n_jobs: trials that the launcher gets at a time.
        params: the experiment's own overrides.
        sampler: node of Optuna's sampler; its `seed` is that of the first trial.
        pruner: node of Optuna's pruner.

    Raises:
        ConfigError: there is no search space, a value is wrong, or some trials did not finish.
    """
    overrides = {o.get_key_element(): o for o in sweep.parse(params, arguments) if o.get_key_element() != "name"}
    fixed = {k: o.get_value_element_as_str() for k, o in overrides.items() if not o.is_sweep_override()}
    with errors_for_key("hydra/sweeper=search"):
        spaces = {key: distribution_of(override) for key, override in overrides.items() if override.is_sweep_override()}
    if not spaces:
        raise ConfigError("hydra/sweeper=search: needs a search space, such as optimizer.lr=interval(1e-4,1e-2)")
    asked = sweep.check_same({key: [str(o.input_line).partition("=")[2]] for key, o in overrides.items()})
    mode = check_ends(sweep, fixed, spaces)
    results = [read_result(file.parent).get("status") for file in sweep.folder.glob("trial-*/result.json")]
    num_done = sum(status in COMPLETED for status in results)
    sweep.create_folder(asked, n_trials - num_done, pruner=pruner)
    with errors_for_key("hydra.sweeper"):
        trials = Trials(sweep.folder, spaces, sampler, mode)
    log.info(f"search   {display_path(sweep.folder)}: {n_trials} trials, {num_done} of them done")
    with handle_interruption(sweep.folder), trials:
        while batch := trials.next(n_jobs, n_trials):
            do_trials(sweep, trials, batch, fixed, n_trials)
    folders = [file.parent for file in sweep.folder.glob("trial-*/job.json")]
    sweep.log_summary([folder for folder in folders if not was_non_finite(folder)])


def check_ends(sweep: Sweep, fixed: dict[str, str], spaces: dict[str, Any]) -> Mode:
    """Return whether a lower (min) or a higher (max) metric is searched for.

    ConfigError if a value at the end of a search space is wrong, before the first trial.
    """
    typical = {key: end_values(distribution)[0] for key, distribution in spaces.items()}
    for key, distribution in spaces.items():
        for value in end_values(distribution):
            config = sweep.compose(trial_job(sweep, 0, fixed | typical | {key: value}))
    return choose_mode("monitor_mode", config.monitor or TRAINING_METRIC, config.monitor_mode)


def do_trials(sweep: Sweep, trials: Trials, batch: list[int], fixed: dict[str, str], n_trials: int) -> None:
    """Do a batch of trials, and report their outcomes to the study."""
    jobs = {number: trial_job(sweep, number, fixed | trials.values(number)) for number in batch}
    for number, job in jobs.items():
        values = trials.values(number)
        label = f"[{number + 1}/{n_trials}] {format_setting(values)}"
        sweep.create_job(job, {"trial": str(number), **values}, label, trial=number, swept=values)
    unfinished = [job for job in jobs.values() if not job_is_finished(job.folder, without_hydra(sweep.compose(job)))]
    sweep.launch(unfinished)
    for number, job in jobs.items():
        trials.tell(number, job.folder)


def trial_job(sweep: Sweep, number: int, values: dict[str, str]) -> Job:
    """Return a trial's job."""
    return Job(sweep.folder / f"trial-{number:04}", [quote_override(f"{key}={value}") for key, value in values.items()])
