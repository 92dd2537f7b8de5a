"""A search's trials: Optuna's study in the sweep's folder, and which process works on which trial.

A process holds the trials that it works on by file locks. So several processes can share a study, and the next one
continues the trials of one that was killed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from language_model.files import display_path
from language_model.runs.config import ConfigError, one_line
from language_model.runs.records import final_value, read_job, read_result, read_sweep
from language_model.runs.trust import targets

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


class Trials:
    """The trials of a search.

    Args:
        folder: the sweep's.
        spaces: the distribution of each key.
        sampler: node of Optuna's sampler.
        mode: whether a lower (min) or a higher (max) value of the metric is better.
    """

    def __init__(self, folder: Path, spaces: "dict[str, BaseDistribution]", sampler: dict[str, Any], mode: str) -> None:
        self.spaces = spaces
        self.sampler = sampler
        self.study = open_study(folder, mode)
        self._folder = folder
        self._locks: dict[int, FileLock] = {}
        self._tried: set[int] = set()

    def __enter__(self) -> None:
        """Start working on trials."""

    def __exit__(self, *_: object) -> None:
        """Release the trials that were interrupted."""
        for lock in self._locks.values():
            lock.release()

    def count(self, *states: str) -> int:
        """Return the number of trials in these states of Optuna's."""
        return sum(trial.state.name in states for trial in self.study.get_trials(deepcopy=False))

    def next(self, n_jobs: int, n_trials: int) -> list[int]:
        """Return up to `n_jobs` trials to do next: interrupted ones, then new ones; none when `n_trials` are done."""
        batch: list[int] = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and len(batch) < n_jobs and self._lock(trial.number):
                batch.append(trial.number)
        while (
            len(batch) < n_jobs
            and len(self._tried) < n_trials  # ends even if all trials fail
            and self.count("RUNNING", "COMPLETE", "PRUNED") < n_trials
        ):
            if self.sampler.get("seed") is not None:  # each trial has its own, however often the search is resumed
                seed = self.sampler["seed"] + len(self.study.trials)
                self.study.sampler = hydra.utils.instantiate(self.sampler | {"seed": seed})
            number = self.study.ask(self.spaces).number
            if self._lock(number):  # unless another process took it for an interrupted one
                batch.append(number)
        return batch

    def values(self, number: int) -> dict[str, str]:
        """Return a trial's values as text, as in overrides; ConfigError if they are not those of the spaces."""
        values = self.study.trials[number].params
        if values.keys() != self.spaces.keys():  # a stranger's study could set any key
            raise ConfigError(f"{display_path(self._folder / 'study.log')} is damaged: trial {number} has other keys")
        return {key: str(value) for key, value in values.items()}

    def tell(self, number: int, folder: Path) -> None:
        """Report a trial's final value, or how it ended, to the study, unless it was interrupted."""
        result, error = read_result(folder), read_job(folder).get("error")
        value = final_value(result)
        if error is None and result.get("status") == "finished" and value is not None:
            self.study.tell(number, value, skip_if_finished=True)
        elif was_non_finite(folder) or result.get("status") == "pruned":  # the sampler learns from these
            self.study.tell(number, state=trial_state("PRUNED"), skip_if_finished=True)
        elif error is not None or result.get("status") == "finished":
            self.study.tell(number, state=trial_state("FAIL"), skip_if_finished=True)
        self._locks.pop(number).release()

    def _lock(self, number: int) -> bool:
        """Lock a trial for this process; False if another process has it, or it is finished or was tried here."""
        lock = FileLock(self._folder / f".trial-{number:04}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        if number in self._tried or self.study.trials[number].state.is_finished():
            lock.release()
            return False
        self._tried.add(number)
        self._locks[number] = lock
        return True


def open_study(folder: Path, mode: str) -> "Study":
    """Return the study in a sweep's folder, created if there is none, with the pruner in ``sweep.json``.

    ConfigError if a file is damaged, or the study is one of the other `mode`.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner, direction = read_pruner(folder), StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE
    with damage_named(folder / "study.log"):
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
        study = optuna.create_study(
            storage=storage, study_name="search", direction=direction, pruner=pruner, load_if_exists=True
        )
        study.get_trials(deepcopy=False)
    if study.direction != direction:
        raise ConfigError(
            f"monitor_mode={mode}: the search in {display_path(folder)} is to {study.direction.name.lower()}; "
            "choose another name"
        )
    return study


def read_pruner(folder: Path) -> Any:
    """Return the pruner in ``sweep.json``, which may be a stranger's; ConfigError if it is none of Optuna's."""
    import optuna

    file, node = folder / "sweep.json", read_sweep(folder).get("pruner", {})
    for _, target in targets(node):
        module, _, name = target.rpartition(".")
        pruner = getattr(optuna.pruners, name, None)
        if module != "optuna.pruners" or not (
            isinstance(pruner, type) and issubclass(pruner, optuna.pruners.BasePruner)
        ):
            raise ConfigError(f"{display_path(file)}: pruner: {target} is not one of optuna.pruners: refused")
    with damage_named(file):
        return hydra.utils.instantiate(node)


@contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Turn any exception inside into a ConfigError that names the file: Optuna raises many kinds for damaged ones."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{display_path(file)} cannot be read: {type(error).__name__}: {one_line(str(error))}"
        ) from error


def trial_state(name: str) -> Any:
    """Return Optuna's trial state of a name."""
    from optuna.trial import TrialState

    return TrialState[name]


def was_non_finite(folder: Path) -> bool:
    """Whether a trial ended with a gradient that was not finite, so that its values are unsuitable."""
    return "NonFiniteError" in read_result(folder).get("error", "")


def distribution_of(override: Override) -> "BaseDistribution":
    """Return the distribution of an override's search space; ValueError if it is none."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep, log_scale = override.value(), "log" in getattr(override.value(), "tags", ())
    if isinstance(sweep, IntervalSweep) and sweep.start is not None and sweep.end is not None:
        if isinstance(sweep.start, int) and isinstance(sweep.end, int):
            return IntDistribution(sweep.start, sweep.end, log=log_scale)
        return FloatDistribution(float(sweep.start), float(sweep.end), log=log_scale)
    values = list(override.sweep_string_iterator())
    if isinstance(sweep, RangeSweep) and all(float(value).is_integer() for value in values):
        numbers = sorted(int(float(value)) for value in values)
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
        return IntDistribution(numbers[0], numbers[-1], log=log_scale, step=step)
    return CategoricalDistribution(values)


def end_values(distribution: "BaseDistribution") -> list[str]:
    """Return the values at the ends of a distribution (all choices of a categorical one), as text."""
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    return [str(distribution.low), str(distribution.high)]  # type: ignore[attr-defined]  # of numbers
