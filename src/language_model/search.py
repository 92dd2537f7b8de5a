"""Search for good settings: Optuna proposes values, a sweep's jobs try them, hopeless ones are stopped early.

The study is a file in the sweep's folder. A process that searches holds the trials that it works on by locks, so that
several can work on one study, and the next one goes on with the trials of one that was killed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import lightning as L
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from lightning.pytorch.callbacks import Callback
from pydantic import PositiveInt

from language_model import run, summary
from language_model.config import ConfigError, blamed_on, quoted
from language_model.run import shown
from language_model.summary import job_of
from language_model.sweep import Job, Sweep, is_done, stopped_cleanly, without_hydra
from language_model.terminal import log

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


def search(
    sweep: Sweep,
    arguments: list[str],
    n_trials: PositiveInt,
    n_jobs: PositiveInt,
    params: dict[str, Any],
    sampler: dict[str, Any],
    pruner: dict[str, Any],
) -> None:
    """Try values from the spaces given.

    Args:
        sweep: what to work with.
        arguments: the overrides that were typed, some of them spaces.
        n_trials: how many trials there shall be, those of earlier sessions included.
        n_jobs: how many the launcher gets at a time.
        params: the experiment's own overrides.
        sampler: node of Optuna's sampler; its `seed` is that of the first trial.
        pruner: node of Optuna's pruner.
    """
    overrides = {o.get_key_element(): o for o in sweep.parse(params, arguments) if o.get_key_element() != "name"}
    fixed = {k: o.get_value_element_as_str() for k, o in overrides.items() if not o.is_sweep_override()}
    with blamed_on("hydra/sweeper=search"):
        spaces = {key: space(override) for key, override in overrides.items() if override.is_sweep_override()}
    if not spaces:
        raise ConfigError("hydra/sweeper=search: a space to search in is needed, as optimizer.lr=interval(1e-4,1e-2)")
    asked = sweep.check_same({key: [str(o.input_line).partition("=")[2]] for key, o in overrides.items()})
    middle = {key: ends(distribution)[0] for key, distribution in spaces.items()}
    for key, distribution in spaces.items():
        for value in ends(distribution):
            sweep.compose(trial_job(sweep, 0, fixed | middle | {key: value}))

    done = [
        file for file in sweep.folder.glob("trial-*/result.json") if run.result_of(file.parent)["status"] in run.DONE
    ]
    sweep.begin(asked, n_trials - len(done), pruner=pruner)
    with blamed_on("hydra.sweeper"):
        trials = Trials(sweep.folder, spaces, sampler)
    log.info(f"search   {shown(sweep.folder)}: {n_trials} trials, {len(done)} of them done")
    with stopped_cleanly(sweep.folder), trials:
        while batch := trials.next(n_jobs, n_trials):
            jobs = {number: trial_job(sweep, number, fixed | trials.values(number)) for number in batch}
            for number, job in jobs.items():
                label = f"[{number + 1}/{n_trials}] {summary.in_words(trials.values(number))}"
                values = trials.values(number)
                sweep.enter(job, {"trial": str(number), **values}, label, trial=number, swept=values)
            sweep.launch([job for job in jobs.values() if not is_done(job.folder, without_hydra(sweep.compose(job)))])
            for number, job in jobs.items():
                trials.tell(number, job.folder)
    folders = [file.parent for file in sweep.folder.glob("trial-*/job.json")]
    sweep.conclude([folder for folder in folders if not exploded(folder)])


def exploded(folder: Path) -> bool:
    """Whether a trial came to a gradient that is not finite: which says something of its values."""
    return "NonFiniteError" in run.result_of(folder).get("error", "")


def trial_job(sweep: Sweep, number: int, values: dict[str, str]) -> Job:
    """Return a trial's job."""
    return Job(sweep.folder / f"trial-{number:04}", [quoted(f"{key}={value}") for key, value in values.items()])


class Trials:
    """The trials of a search, in Optuna's study.

    Args:
        folder: the sweep's.
        spaces: the distribution of each key.
        sampler: node of Optuna's sampler.
    """

    def __init__(self, folder: Path, spaces: "dict[str, BaseDistribution]", sampler: dict[str, Any]) -> None:
        self.spaces = spaces
        self.sampler = sampler
        self.study = open_study(folder)
        self._folder = folder
        self._held: dict[int, FileLock] = {}
        self._tried: set[int] = set()

    def __enter__(self) -> None:
        """Work on trials."""

    def __exit__(self, *_: object) -> None:
        """Let go of those that were broken off."""
        for lock in self._held.values():
            lock.release()

    def count(self, *states: str) -> int:
        """Return how many trials there are, in these states of Optuna's."""
        return sum(trial.state.name in states for trial in self.study.get_trials(deepcopy=False))

    def next(self, n_jobs: int, n_trials: int) -> list[int]:
        """Return the next trials, at most `n_jobs`: those that were broken off, then new ones; none if all are done."""
        batch: list[int] = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and len(batch) < n_jobs and self._hold(trial.number):
                batch.append(trial.number)
        while (
            len(batch) < n_jobs
            and len(self._tried) < n_trials  # where all fail, too, there is an end
            and self.count("RUNNING", "COMPLETE", "PRUNED") < n_trials
        ):
            if self.sampler.get("seed") is not None:  # a trial's own, however often the search was stopped before it
                seed = self.sampler["seed"] + len(self.study.trials)
                self.study.sampler = hydra.utils.instantiate(self.sampler | {"seed": seed})
            number = self.study.ask(self.spaces).number
            if self._hold(number):  # or another process took it to be broken off
                batch.append(number)
        return batch

    def values(self, number: int) -> dict[str, str]:
        """Return a trial's values, as overrides have them."""
        return {key: str(value) for key, value in self.study.trials[number].params.items()}

    def tell(self, number: int, folder: Path) -> None:
        """Tell the study what a trial has come to, unless it was broken off."""
        result, error = run.result_of(folder), job_of(folder).get("error")
        if error is None and result.get("status") == "finished" and result.get("best") is not None:
            self.study.tell(number, result["best"], skip_if_finished=True)
        elif exploded(folder) or result.get("status") == "pruned":  # something to learn from
            self.study.tell(number, state=state("PRUNED"), skip_if_finished=True)
        elif error is not None:
            self.study.tell(number, state=state("FAIL"), skip_if_finished=True)
        self._held.pop(number).release()

    def _hold(self, number: int) -> bool:
        """Take a trial for this process, unless another one has it, or this one has tried it before."""
        lock = FileLock(self._folder / f".trial-{number:04}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        if number in self._tried or self.study.trials[number].state.is_finished():
            lock.release()
            return False
        self._tried.add(number)
        self._held[number] = lock
        return True


def open_study(folder: Path) -> "Study":
    """Return the study in a sweep's folder, with the pruner that its ``sweep.json`` names; made if there is none."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
    pruner = hydra.utils.instantiate(json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["pruner"])
    return optuna.create_study(storage=storage, study_name="search", pruner=pruner, load_if_exists=True)


def state(name: str) -> Any:
    """Return one of Optuna's states."""
    from optuna.trial import TrialState

    return TrialState[name]


def space(override: Override) -> "BaseDistribution":
    """Return the distribution that an override means; ValueError if it means none."""
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


def ends(distribution: "BaseDistribution") -> list[str]:
    """Return the values of a distribution that are to be checked before the first trial."""
    if hasattr(distribution, "choices"):
        return list(distribution.choices)
    return [str(distribution.low), str(distribution.high)]  # type: ignore[attr-defined]  # of numbers


class Pruning(Callback):
    """Reports a trial's metric to its search, and stops the run when others were better by far at that step.

    Does nothing in a run that is no trial.

    Args:
        folder: the run's.
        monitor: the metric.
    """

    def __init__(self, folder: str, monitor: str) -> None:
        self.folder = Path(folder)
        self.monitor = monitor
        self.pruned = False
        self._trial: Any = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Find the trial that this run is."""
        number = job_of(self.folder).get("trial")
        if number is not None and trainer.is_global_zero:
            from optuna.trial import Trial

            study = open_study(self.folder.parent)
            self._trial = Trial(study, study.trials[number]._trial_id)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report the epoch's mean, where there is no validation."""
        if self.monitor == "train/loss_epoch":
            self._report(trainer, float(pl_module.epoch_loss.value))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Report what the validation gave."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self._report(trainer, float(trainer.callback_metrics[self.monitor]))

    def _report(self, trainer: L.Trainer, value: float) -> None:
        if self._trial is not None:
            step = trainer.global_step
            if step not in self._trial.storage.get_trial(self._trial._trial_id).intermediate_values:
                self._trial.report(value, step)
            self.pruned = self._trial.should_prune()
        if trainer.world_size > 1:
            self.pruned = trainer.strategy.broadcast(self.pruned)
        trainer.should_stop = trainer.should_stop or self.pruned
