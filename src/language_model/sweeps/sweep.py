"""A sweep: many runs that differ in some settings, each in a folder and a process of its own.

Hydra's launchers (one after the other, several at once, on a cluster) decide when and where a job runs, and call
`job.run_job`. ``outputs/sweeps/<name>`` holds everything about a sweep, so that the same command resumes it, however it
ended: ``sweep.json`` (what was asked for), ``<overrides>/job.json`` (what a job is, and why it failed) beside the files
of any run, and the summary.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from language_model.files import display_path, write_json
from language_model.runs.command_line import quote_override
from language_model.runs.config import ConfigError, build, check_config, errors_for_key
from language_model.runs.folder import read_settings, safe_folder_name
from language_model.runs.plan import rehearse
from language_model.runs.records import read_job, read_result, read_sweep, update_job
from language_model.runs.resume import COMPLETED, can_change_on_resume, check_same_settings, is_finished
from language_model.sweeps import summary
from language_model.sweeps.summary import format_duration
from language_model.terminal import log, setup_logging

Values = dict[str, list[str]]  # the values of each key that was typed, or that the experiment sweeps over


class Job(NamedTuple):
    """One run of a sweep: its folder, and its overrides."""

    folder: Path
    overrides: list[str]

    @property
    def launch_overrides(self) -> list[str]:
        """The overrides, with the folder among them."""
        return [*self.overrides, quote_override(f"folder={self.folder}", ("folder",))]


class Sweep:
    """What grid and search have in common: composing, naming and launching jobs, and reporting.

    Args:
        config: Hydra's config of the sweep as a whole.
        config_loader: composes the jobs' configs.
        launcher: Hydra's; calls `run_job` for each job.
    """

    def __init__(self, config: DictConfig, config_loader: ConfigLoader, launcher: Launcher) -> None:
        setup_logging()
        self.config = config
        self.config_loader = config_loader
        self.launcher = launcher
        self.folder = Path(config.hydra.sweep.dir).resolve()
        self._num_done, self._num_jobs, self._started = 0, 0, 0.0

    def parse(self, params: dict[str, str], arguments: list[str]) -> list[Override]:
        """Return the overrides: the typed `arguments`, and the sweeper's `params` for keys that were not typed.

        ConfigError for an override that a sweep cannot have.
        """
        parser = OverridesParser.create(config_loader=self.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *arguments])
        overrides = {override.get_key_element(): override for override in parsed}
        for key in {"folder", "resume"} & overrides.keys():
            raise ConfigError(f"{key}: not for a sweep; the same command resumes it, and each job has its own folder")
        for key in {"name", "monitor", "monitor_mode"} & overrides.keys():
            if overrides[key].is_sweep_override():
                raise ConfigError(f"{overrides[key].input_line}: a sweep has one {key}")
        return list(overrides.values())

    def check_same(self, asked: Values) -> Values:
        """Return the values asked for now and before under this name; ConfigError if that was another sweep."""
        if not self.folder.exists():
            return asked
        if not (self.folder / "sweep.json").is_file():
            raise ConfigError(f"name: {display_path(self.folder)} exists and is not a sweep; choose another name")
        before: Values = read_sweep(self.folder)["asked"]
        for key in dict.fromkeys((*before, *asked)):
            then, now = before.get(key, []), asked.get(key, [])
            same = then and now and (len(then) > 1 or then[0] in now)
            newly_swept = not then and len(now) > 1
            free = can_change_on_resume(key) and max(len(then), len(now)) < 2
            if not (same or newly_swept or free):
                raise ConfigError(
                    f"{display_path(self.folder)} is another sweep: {key}={','.join(then) or '(not set)'} then, "
                    f"{','.join(now) or '(not set)'} now; choose another name"
                )
        return {key: list(dict.fromkeys((*before.get(key, []), *asked.get(key, [])))) for key in {**before, **asked}}

    def jobs(self, combinations: list[dict[str, str]], asked: Values) -> list[Job]:
        """Return a job for each combination of values: in its folder if it has one, else in one named by its values."""
        # A setting that can change on resume does not make another job, unless it is swept over.
        ignored = {key for key, values in asked.items() if len(values) == 1 and can_change_on_resume(key)}
        swept = [key for key, values in asked.items() if len(values) > 1] or [
            key for key in asked if key not in ignored
        ]

        def identity(overrides: list[str]) -> frozenset[str]:
            return frozenset(override for override in overrides if override.partition("=")[0] not in ignored)

        known = {identity(read_job(file.parent)["overrides"]): file.parent for file in self.folder.glob("*/job.json")}
        jobs = []
        for values in combinations:
            overrides = [f"{key}={value}" for key, value in values.items()]
            name = safe_folder_name(",".join(f"{key}={values[key]}" for key in swept if key in values))
            folder = known.get(identity(overrides))
            if folder is None and (self.folder / name).exists():  # another job's
                name = safe_folder_name(name, ",".join(overrides))
            jobs.append(Job(folder or self.folder / name, overrides))
        return jobs

    def compose(self, job: Job) -> DictConfig:
        """Return a job's config, Hydra's node included; ConfigError if a key or a value is wrong."""
        config = self.config_loader.load_sweep_config(self.config, job.launch_overrides)
        check_config(without_hydra(config))
        return config

    def rehearse(self, job: Job) -> None:
        """Raise ConfigError, naming the job, if it could not start: before the first job of the sweep does."""
        try:
            rehearse(without_hydra(self.compose(job)), job.overrides)
        except ConfigError as error:
            raise ConfigError(f"{error} (in the job {job.folder.name})") from error

    def create_folder(self, asked: Values, num_jobs: int, **facts: Any) -> None:
        """Create the sweep's folder with ``sweep.json``; `num_jobs` jobs will be launched."""
        self._num_jobs, self._started = num_jobs, time.time()
        with errors_for_key("hydra.sweep.dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "sweep.json", {"asked": asked, **facts})

    def create_job(self, job: Job, values: dict[str, str], label: str, **facts: Any) -> None:
        """Create a job's folder with ``job.json``; `label` stands beside its progress bar."""
        job.folder.mkdir(exist_ok=True)
        update_job(job.folder, overrides=job.overrides, values=values, label=label, **facts)

    def launch(self, jobs: list[Job]) -> None:
        """Have Hydra's launcher do the jobs; log the outcome of each."""
        if jobs:
            with no_slurm(), self.log_outcomes([job.folder for job in jobs]):
                for done in self.launcher.launch([job.launch_overrides for job in jobs], initial_job_idx=0):
                    _ = done.return_value  # raises an error around a job; an error in a job is in its job.json

    @contextmanager
    def log_outcomes(self, folders: list[Path]) -> Iterator[None]:
        """Log a line for each job that ends meanwhile, wherever it runs, with an estimate of the time left."""
        waiting = {folder: read_job(folder).get("ended") for folder in folders}
        finished = threading.Event()

        def watch() -> None:
            while waiting:
                is_last_look = finished.wait(0.5)
                for folder in [folder for folder in waiting if read_job(folder).get("ended") != waiting[folder]]:
                    del waiting[folder]
                    self._num_done += 1
                    self._log_outcome(folder)
                if is_last_look:
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()

    def _log_outcome(self, folder: Path) -> None:
        left = (time.time() - self._started) / self._num_done * (self._num_jobs - self._num_done)
        line = f"[{self._num_done}/{self._num_jobs}] {summary.outcome(folder)}"
        level = logging.WARNING if read_job(folder)["error"] else logging.INFO
        log.log(level, f"{line}; {format_duration(left)} left" if left > 0 else line)

    def log_summary(self, jobs: list[Path]) -> None:
        """Log the summary, and do the exercise; ConfigError if some of the `jobs` did not finish."""
        rows = summary.update(self.folder)
        summary.show(self.folder, rows)
        if exercise := build(without_hydra(self.config), "exercise"):
            exercise(self.folder, [row.folder for row in rows])
        unfinished = [row for row in rows if row.folder in jobs and row.status not in COMPLETED]
        if unfinished:
            raise ConfigError(
                f"{len(unfinished)} of {len(jobs)} jobs did not finish; the same command tries them again"
            )


@contextmanager
def no_slurm() -> Iterator[None]:
    """Turn submitit's error where there is no SLURM into a ConfigError."""
    try:
        yield
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise ConfigError("hydra/launcher=slurm: this machine has no SLURM (no srun); allowed: parallel") from error


def without_hydra(config: DictConfig) -> DictConfig:
    """Return the config that a job sees: without Hydra's node."""
    own = config.copy()
    with read_write(own), open_dict(own):
        del own["hydra"]
    return own


def job_is_finished(folder: Path, config: DictConfig) -> bool:
    """Whether a job has reached its end; ConfigError if it had other settings then."""
    settings = read_settings(folder)
    if not settings:
        return False
    check_same_settings(folder, settings, config, derived=False)
    return is_finished(read_result(folder), settings, config)


def value_of(config: DictConfig, key: str) -> str:
    """Return a job's value for a key that was typed: its choice from ``conf/<key>``, or its setting."""
    choices = config.hydra.runtime.choices
    return str(choices[key] if key in choices else OmegaConf.select(config, key.lstrip("+~")))


@contextmanager
def handle_interruption(folder: Path) -> Iterator[None]:
    """Make SIGTERM end a sweep as Ctrl-C does: the jobs save and stop, and a line says how to resume."""

    def stop(signum: int, frame: Any) -> None:
        sys.exit(143)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it otherwise
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        log.warning(f"the sweep in {display_path(folder)} was interrupted; the same command resumes it")
        sys.exit(stopped.code if isinstance(stopped, SystemExit) else 130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
