"""A sweep: many runs that differ in some settings, each in a folder and in a process of its own.

Hydra's launchers (one after the other, several at once, on a cluster) say when and where; `do_job` is what they
call. ``outputs/sweeps/<name>`` holds all that is known of a sweep, so that the same command goes on after whatever
ended the one before: ``sweep.json`` what was asked for, ``<overrides>/job.json`` what a job is and why it failed,
beside what any run leaves, and the summary.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from pydantic import PositiveInt

from language_model import run, summary
from language_model.config import JOB, ROOT, ConfigError, blamed_on, build, check, quoted
from language_model.run import shown
from language_model.summary import duration, job_of, save_job
from language_model.terminal import log, speak

Values = dict[str, list[str]]  # of each key that was typed, or that the experiment sweeps over

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # what a run ends with when it was stopped from outside


class Job(NamedTuple):
    """One run of a sweep: its folder, and the overrides that make it."""

    folder: Path
    overrides: list[str]

    @property
    def launched_with(self) -> list[str]:
        """The overrides, and where to write."""
        return [*self.overrides, quoted(f"folder={self.folder}", ("folder",))]


class Sweep:
    """What the sweepers share: composing jobs, planning and launching them, and what is said at the end.

    Args:
        config: Hydra's, of the sweep as a whole.
        config_loader: composes the jobs' configs.
        launcher: Hydra's, which calls `do_job` for each job.
    """

    def __init__(self, config: DictConfig, config_loader: ConfigLoader, launcher: Launcher) -> None:
        speak()
        self.config = config
        self.config_loader = config_loader
        self.launcher = launcher
        self.folder = Path(config.hydra.sweep.dir).resolve()
        self.done, self.ahead, self.began = 0, 0, 0.0

    def parse(self, params: dict[str, str], arguments: list[str]) -> list[Override]:
        """Return the overrides, typed ones over the sweeper's own; ConfigError for one that a sweep cannot have."""
        parser = OverridesParser.create(config_loader=self.config_loader)
        typed = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *arguments])
        overrides = {override.get_key_element(): override for override in typed}
        for key in {"folder", "resume"} & overrides.keys():
            raise ConfigError(f"{key}: a sweep goes on by its own command, and its jobs have folders of their own")
        if "name" in overrides and overrides["name"].is_sweep_override():
            raise ConfigError(f"{overrides['name'].input_line}: a sweep has one name")
        return list(overrides.values())

    def check_same(self, asked: Values) -> Values:
        """Return all that was asked for under this name, before and now; ConfigError if that was another sweep."""
        if not self.folder.exists():
            return asked
        file = self.folder / "sweep.json"
        if not file.is_file():
            raise ConfigError(f"name: {shown(self.folder)} is there already, and is no sweep; choose another name")
        before: Values = json.loads(file.read_text(encoding="utf-8"))["asked"]
        for key in dict.fromkeys((*before, *asked)):
            then, now = before.get(key, []), asked.get(key, [])
            same = then and now and (len(then) > 1 or then[0] in now)
            new = not then and len(now) > 1
            free = run.may_change(key) and max(len(then), len(now)) < 2
            if not (same or new or free):
                raise ConfigError(
                    f"{shown(self.folder)} is another sweep: {key}={','.join(then) or '(not set)'} then, "
                    f"{','.join(now) or '(not set)'} now; choose another name"
                )
        return {key: list(dict.fromkeys((*before.get(key, []), *asked.get(key, [])))) for key in {**before, **asked}}

    def jobs(self, combinations: list[dict[str, str]], asked: Values) -> list[Job]:
        """Return a job for each combination of values: in the folder it had, or in one named by what is swept over."""
        # What may change while a run goes on makes no other job of it, unless it is swept over.
        aside = {key for key, values in asked.items() if len(values) == 1 and run.may_change(key)}
        swept = [key for key, values in asked.items() if len(values) > 1] or list(asked.keys() - aside)

        def identity(overrides: list[str]) -> frozenset[str]:
            return frozenset(override for override in overrides if override.partition("=")[0] not in aside)

        there = {identity(job_of(file.parent)["overrides"]): file.parent for file in self.folder.glob("*/job.json")}
        jobs = []
        for values in combinations:
            overrides = [f"{key}={value}" for key, value in values.items()]
            name = run.safe_name(",".join(f"{key}={values[key]}" for key in swept if key in values))
            same = there.get(identity(overrides))
            if same is None and (self.folder / name).exists():  # another job's
                name = run.safe_name(name, ",".join(overrides))
            jobs.append(Job(same or self.folder / name, overrides))
        return jobs

    def compose(self, job: Job) -> DictConfig:
        """Return a job's config, with Hydra's part; ConfigError if a key or a value is wrong."""
        config = self.config_loader.load_sweep_config(self.config, job.launched_with)
        check(without_hydra(config))
        return config

    def begin(self, asked: Values, number: int, **facts: Any) -> None:
        """Make the sweep's folder, and write down what was asked for; `number` of jobs are ahead."""
        self.ahead, self.began = number, time.time()
        with blamed_on("hydra.sweep.dir"):
            self.folder.mkdir(parents=True, exist_ok=True)
            run.save_json(self.folder / "sweep.json", {"asked": asked, **facts})

    def enter(self, job: Job, values: dict[str, str], label: str, **facts: Any) -> None:
        """Make a job's folder, and write down what it is; `label` is what its bar says."""
        job.folder.mkdir(exist_ok=True)
        save_job(job.folder, overrides=job.overrides, values=values, label=label, **facts)

    def launch(self, jobs: list[Job]) -> None:
        """Do the jobs, as Hydra's launcher does, and say what each has come to."""
        if jobs:
            with self.watching([job.folder for job in jobs]):
                for done in self.launcher.launch([job.launched_with for job in jobs], initial_job_idx=0):
                    _ = done.return_value  # raises what went wrong around a job; what went wrong in it is in job.json

    @contextmanager
    def watching(self, folders: list[Path]) -> Iterator[None]:
        """Say a line for each job that ends, wherever it runs, with the time left."""
        before = {folder: job_of(folder).get("ended") for folder in folders}
        over = threading.Event()

        def watch() -> None:
            while before:
                last_look = over.wait(0.5)
                for folder in [folder for folder in before if job_of(folder).get("ended") != before[folder]]:
                    del before[folder]
                    self.done += 1
                    left = (time.time() - self.began) / self.done * (self.ahead - self.done)
                    line = f"[{self.done}/{self.ahead}] {summary.outcome(folder)}"
                    level = logging.WARNING if job_of(folder)["error"] else logging.INFO
                    log.log(level, f"{line}; {duration(left)} left" if left > 0 else line)
                if last_look:
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def conclude(self, jobs: list[Path]) -> None:
        """Say what the sweep has come to; ConfigError if some of its `jobs` did not finish."""
        rows = summary.update(self.folder)
        summary.show(self.folder, rows)
        if exercise := build(without_hydra(self.config), "exercise"):
            exercise(self.folder, [row.folder for row in rows])
        unfinished = [row for row in rows if row.folder in jobs and row.status not in run.DONE]
        if unfinished:
            raise ConfigError(
                f"{len(unfinished)} of {len(jobs)} jobs did not finish; the same command tries them again"
            )


def grid(sweep: Sweep, arguments: list[str], max_jobs: PositiveInt, params: dict[str, Any]) -> None:
    """Run every combination of the values given.

    Args:
        sweep: what to work with.
        arguments: the overrides that were typed.
        max_jobs: how many there may be.
        params: the experiment's own overrides.
    """
    asked: Values = {}
    for override in sweep.parse(params, arguments):
        key = override.get_key_element()
        if not override.is_sweep_override():
            asked[key] = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            asked[key] = list(dict.fromkeys(islice(override.sweep_string_iterator(), max_jobs + 1)))
        else:
            raise ConfigError(f"{override.input_line}: a space to search in needs hydra/sweeper=search")
    number = math.prod(len(values) for values in asked.values())
    if number > max_jobs:
        raise ConfigError(
            f"hydra.sweeper.max_jobs={max_jobs}: these are {number} jobs or more; set it to as many as meant"
        )
    asked.pop("name", None)
    everything = sweep.check_same(asked)
    jobs = sweep.jobs([dict(zip(asked, values, strict=True)) for values in product(*asked.values())], everything)
    configs = {job.folder: sweep.compose(job) for job in jobs}  # all of them, before the first one starts
    todo = [job for job in jobs if not is_done(job.folder, without_hydra(configs[job.folder]))]
    sweep.begin(everything, len(todo))
    for job in jobs:
        label = f"[{todo.index(job) + 1}/{len(todo)}] {job.folder.name}" if job in todo else ""
        values = {key: value_in(configs[job.folder], key) for key in everything}
        sweep.enter(job, values, label, swept={key: values[key] for key in values if len(everything[key]) > 1})
    log.info(f"sweep    {shown(sweep.folder)}: {len(jobs)} jobs, {len(jobs) - len(todo)} of them finished")
    with stopped_cleanly(sweep.folder):
        sweep.launch(todo)
    sweep.conclude(list(configs))


def without_hydra(config: DictConfig) -> DictConfig:
    """Return the config that a job sees."""
    own = config.copy()
    with read_write(own), open_dict(own):
        del own["hydra"]
    return own


def is_done(folder: Path, config: DictConfig) -> bool:
    """Whether a job has come to its end; ConfigError if its settings were others then."""
    before = run.settings_of(folder)
    if not before:
        return False
    run.check_unchanged(folder, before, config, derived=False)
    return run.result_of(folder).get("status") in run.DONE and not run.end_moved(before, config)


def value_in(config: DictConfig, key: str) -> str:
    """Return what a job has for a key that was typed: its choice from ``conf/<key>``, or its value."""
    choices = config.hydra.runtime.choices
    return str(choices[key] if key in choices else OmegaConf.select(config, key.lstrip("+~")))


@contextmanager
def stopped_cleanly(folder: Path) -> Iterator[None]:
    """Let SIGTERM end a sweep as Ctrl-C does: the jobs save and end, and a line says that it can go on."""

    def stop(signum: int, frame: Any) -> None:
        sys.exit(143)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stopped:
        log.warning(f"the sweep in {shown(folder)} was stopped; the same command goes on with it")
        sys.exit(stopped.code if isinstance(stopped, SystemExit) else 130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def do_job(config: DictConfig) -> None:
    """Do one job of a sweep, and bring the summary up to date.

    The run is a process of its own: nothing of one job is there for the next one, a crash ends no other job, and
    data-parallel jobs can start their processes.
    """
    folder = Path(config.folder)
    save_job(folder, error=None)
    beside_others = HydraConfig.get().launcher._target_.endswith("JoblibLauncher")
    wants_one = beside_others and config.trainer.devices == "auto"
    slot: AbstractContextManager[dict[str, str]] = own_gpu(folder.parent) if wants_one else nullcontext({})
    with slot as gpu:
        error = alone(folder, job_of(folder)["label"], gpu)
    save_job(folder, error=error, ended=time.time())
    summary.update(folder.parent)


@contextmanager
def own_gpu(folder: Path) -> Iterator[dict[str, str]]:
    """Give a job beside others a GPU to itself, by its environment: one that is free, or for want of one, any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    for gpu in visible if len(visible) > 1 else ():
        with suppress(Timeout), FileLock(folder / f".gpu-{gpu}.lock", timeout=0):
            yield {"CUDA_VISIBLE_DEVICES": gpu}
            return
    yield {"CUDA_VISIBLE_DEVICES": visible[os.getpid() % len(visible)]} if len(visible) > 1 else {}


def end_with_sweep() -> None:
    """In a job's process: stop, as SIGTERM does, when the process that started it has ended, in whatever way."""

    def wait() -> None:
        os.read(0, 1)  # the pipe from there: nothing is ever written to it, so this ends when it closes
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def alone(folder: Path, label: str, environment: dict[str, str]) -> str | None:
    """Run a job in a process of its own; return why it failed, None if it finished or was stopped from outside.

    Args:
        folder: the job's.
        label: what its bar says.
        environment: what its process has in it besides this one's.
    """
    launcher = HydraConfig.get().launcher._target_.rpartition(".")[2]
    starter = os.getppid()
    environment = {**os.environ, **environment, JOB: label}
    environment.pop("HYDRA_FULL_ERROR", None)  # set while Hydra runs, to get its errors whole
    script = str(ROOT / "scripts" / "train.py")
    override = quoted(f"folder={folder}", ("folder",))
    command = [sys.executable, script, *job_of(folder)["overrides"], override, "hydra.mode=RUN"]
    log_of_errors = folder / "stderr.txt"
    with (
        log_of_errors.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,  # closes with this process, whatever ends it, and the job then stops
            stdout=None if launcher == "BasicLauncher" else subprocess.DEVNULL,  # a terminal has room for one bar
            stderr=stderr,
            start_new_session=True,  # so that Ctrl-C comes to it from here, and once
        ) as process,
    ):
        try:
            while process.poll() is None:
                if launcher == "JoblibLauncher" and os.getppid() != starter:  # its workers outlive it
                    process.terminate()
                    process.wait()
                    os._exit(1)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    said = log_of_errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if not said:
        log_of_errors.unlink()
    if process.returncode in (0, *STOPPED):
        return None
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    reason = said[-1] if said else f"ended with status {process.returncode}"
    return reason.removeprefix("error: ")
