"""A grid: a sweep over every combination of the values given."""

import math
from itertools import islice, product
from typing import Any

from pydantic import PositiveInt

from language_model.files import display_path
from language_model.runs.config import ConfigError
from language_model.sweeps.sweep import Sweep, Values, handle_interruption, job_is_finished, value_of, without_hydra
from language_model.terminal import log


def grid(sweep: Sweep, arguments: list[str], max_jobs: PositiveInt, params: dict[str, Any]) -> None:
    """Run every combination of the values given.

    Args:
        sweep: composes and launches the jobs.
        arguments: the typed overrides.
        max_jobs: the largest number of jobs allowed.
        params: the experiment's own overrides.

    Raises:
        ConfigError: an override is wrong, the folder holds another sweep, or some jobs did not finish.
    """
    asked = values_asked(sweep, arguments, max_jobs, params)
    all_asked = sweep.check_same(asked)
    jobs = sweep.jobs([dict(zip(asked, values, strict=True)) for values in product(*asked.values())], all_asked)
    configs = {job.folder: sweep.compose(job) for job in jobs}  # checks them all before the first one starts
    for job in jobs:
        sweep.rehearse(job)
    todo = [job for job in jobs if not job_is_finished(job.folder, without_hydra(configs[job.folder]))]
    sweep.create_folder(all_asked, len(todo))
    for job in jobs:
        label = f"[{todo.index(job) + 1}/{len(todo)}] {job.folder.name}" if job in todo else ""
        values = {key: value_of(configs[job.folder], key) for key in all_asked}
        sweep.create_job(job, values, label, swept={key: values[key] for key in values if len(all_asked[key]) > 1})
    log.info(f"sweep    {display_path(sweep.folder)}: {len(jobs)} jobs, {len(jobs) - len(todo)} of them finished")
    with handle_interruption(sweep.folder):
        sweep.launch(todo)
    sweep.log_summary(list(configs))


def values_asked(sweep: Sweep, arguments: list[str], max_jobs: int, params: dict[str, Any]) -> Values:
    """Return the values of each key; ConfigError for a search space, or more than `max_jobs` combinations."""
    asked: Values = {}
    for override in sweep.parse(params, arguments):
        key = override.get_key_element()
        if not override.is_sweep_override():
            asked[key] = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            asked[key] = list(dict.fromkeys(islice(override.sweep_string_iterator(), max_jobs + 1)))
        else:
            raise ConfigError(f"{override.input_line}: a search space needs hydra/sweeper=search")
    number = math.prod(len(values) for values in asked.values())
    if number > max_jobs:
        raise ConfigError(
            f"hydra.sweeper.max_jobs={max_jobs}: these are {number} jobs or more; raise it if that is meant"
        )
    asked.pop("name", None)
    return asked
