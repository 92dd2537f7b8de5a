"""A run's folder: choosing, locking and finding it, and the files in it."""

import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasEvent, YAMLError

from language_model.files import ROOT, display_path, modified_time, write_text
from language_model.runs.config import (
    ConfigError,
    did_you_mean,
    errors_for_key,
    escape_interpolations,
    flatten,
    name_or_timestamp,
    one_line,
)
from language_model.runs.moved_names import with_current_names
from language_model.terminal import log

RUNS = ROOT / "outputs" / "runs"
SWEEPS = ROOT / "outputs" / "sweeps"

# Environment variable by which the first process tells those that lightning starts where the run is written.
RUN_FOLDER = "LANGUAGE_MODEL_RUN_FOLDER"

_locks: list[FileLock] = []  # held until this process ends


def all_runs() -> list[Path]:
    """Return the folders of all runs, jobs of sweeps included."""
    return [file.parent for file in (*RUNS.glob("*/config.yaml"), *SWEEPS.glob("*/*/config.yaml"))]


def find_run(key: str, run: str) -> Path:
    """Return the folder of a run, given as a folder, a name, or ``latest``; ConfigError (naming `key`) if none is."""
    runs = all_runs()
    if run == "latest" and runs:
        return max(runs, key=lambda folder: modified_time(folder / "config.yaml"))
    for folder in (Path(run), RUNS / run):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    names = dict.fromkeys(folder.name for folder in runs)
    raise ConfigError(f"{key}={run}: no such run; give a run's folder or name, or latest{did_you_mean(run, names)}")


def read_config(folder: Path) -> DictConfig:
    """Return a run's config, with the current names of everything; ConfigError if the file is damaged.

    To build something of it, check it first by `trust.check_offered`: the folder may be a stranger's.
    """
    return OmegaConf.create(escape_interpolations(read_saved_config(folder)))


def read_saved_config(folder: Path) -> dict[str, Any]:
    """Return what `read_config` does, as plain dicts and lists."""
    content = read_yaml(folder / "config.yaml")
    if not isinstance(content, dict) or not content.keys() & {"model", "data", "trainer", "optimizer"}:
        raise ConfigError(f"{display_path(folder / 'config.yaml')} is damaged, or not a run's config")
    return {"monitor_mode": "min"} | with_current_names(content)  # older runs have only this mode


def read_yaml(file: Path) -> Any:
    """Return what a YAML file holds; ConfigError if it is missing or damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        if any(isinstance(event, AliasEvent) for event in yaml.parse(text)):  # a few of them can unfold to gigabytes
            raise ConfigError(f"{display_path(file)} is damaged, or a stranger's: it has YAML aliases")
        return OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{display_path(file)} is damaged: {one_line(str(error))}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a run's config as a flat dict with dotted keys; empty if it was not saved yet."""
    saved = (folder / "config.yaml").is_file()
    return flatten(read_saved_config(folder)) if saved else {}


def choose_folder(config: DictConfig) -> Path:
    """Return the folder for this run, without creating it: ``folder`` if given, else ``outputs/runs/<name>``."""
    folder = Path(config.folder) if config.folder else RUNS / name_or_timestamp(config.name)
    if not (config.folder or config.name):  # the name has a random part: the first process's must be that of all
        if "TORCHELASTIC_RUN_ID" in os.environ or (rank_zero_only.rank and RUN_FOLDER not in os.environ):
            raise ConfigError("name: a run of processes that were started one by one (torchrun, srun) needs name=...")
        if rank_zero_only.rank:
            folder = Path(os.environ[RUN_FOLDER])
    if rank_zero_only.rank == 0:
        os.environ[RUN_FOLDER] = str(folder.resolve())
    return folder.resolve()


def safe_folder_name(name: str, distinguish: str = "", max_length: int = 120) -> str:
    """Return a name without characters that file systems refuse, of bounded length.

    Where that changes the name, or `distinguish` is given, a hash of both keeps it different from all others.
    """
    safe = re.sub(r"[^\w.=,+-]+", "_", name, flags=re.ASCII)[:max_length].lstrip(".") or "defaults"
    if safe == (name or safe) and not distinguish:
        return safe
    return f"{safe}-{hashlib.sha256((name + distinguish).encode()).hexdigest()[:8]}"


def lock_folder(folder: Path) -> None:
    """Create a folder and keep other processes from training in it until this one ends.

    ConfigError if another one already does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info(f"waiting  for the process that is training in {display_path(folder)}")
        try:
            lock.acquire(timeout=60)  # it may have been told to stop just now, and be saving
        except Timeout:
            raise ConfigError(f"name: another process is training in {display_path(folder)}") from None
    _locks.append(lock)


@contextmanager
def run_folder(folder: Path, config: DictConfig, overrides: list[str], tokenizer: Any) -> Iterator[None]:
    """Write a run's config and tokenizer to its folder, and copy the log inside to ``train.log``."""
    with errors_for_key("folder"):
        write_text(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        tokenizer.save(folder / "tokenizer.json")
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk, which others report
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()


def package_versions() -> dict[str, str | None]:
    """Return the versions that a result depends on, and the git commit of the code (None outside git)."""
    packages = ("torch", "lightning", "hydra-core", "omegaconf", "tensorboard", "numpy")
    versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in packages}
    return versions | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of the project's checkout, with ``-dirty`` if files differ from it; None outside git."""
    try:
        completed = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()
