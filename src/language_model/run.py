"""A run on disk: its folder, what is kept of how it was made, and its result."""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pickle
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from language_model.config import ROOT, ConfigError, blamed_on, flat, name_or_time, near, one_line, plain
from language_model.module import LanguageModel
from language_model.terminal import log

RUNS = ROOT / "outputs" / "runs"
SWEEPS = ROOT / "outputs" / "sweeps"
FOLDER = "LANGUAGE_MODEL_RUN_FOLDER"  # tells the processes that lightning starts where the first one writes


# What may be other when a run goes on: how it is done and watched, and how far it goes, but not what it is.
MAY_CHANGE = (
    "name", "folder", "resume", "compile", "model.attention", "optimizer.fused", "total_steps", "schedule.total_steps",
    "trainer.max_epochs", "trainer.max_steps", "trainer.max_time", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.log_every_n_steps", "trainer.enable_*", "trainer.detect_anomaly",
    "trainer.benchmark", "trainer.default_root_dir", "data.num_workers", "data.cache", "logger.*",
    "callbacks.last.*", "callbacks.every.*", "callbacks.*.dirpath", "callbacks.console.*", "callbacks.sample.*",
    "callbacks.dashboard.*", "callbacks.pruning.*",
    "callbacks.throughput.*", "callbacks.gradient_norm.*",
)  # fmt: skip

DONE = ("finished", "pruned")  # the ends of a run that it is not to go on from

# What is worked out from the rest while it is null.
DERIVED = (
    "vocab_size",
    "*.vocab_size",
    "monitor",
    "*.monitor",
    "trainer.precision",
    "model.attention",
    "optimizer.fused",
    "compile",
)

_held: list[FileLock] = []  # of the folders that this process writes to, until it ends


def find(key: str, run: str) -> Path:
    """Return the folder of the run that is meant: a folder, a name, or ``latest``; ConfigError if there is none."""
    runs = {folder.name: folder for folder in all_runs()}
    if run == "latest" and runs:
        return max(runs.values(), key=lambda folder: modified(folder / "config.yaml"))
    for folder in (Path(run), RUNS / run):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    raise ConfigError(
        f"{key}={run}: there is no such run; a run's folder or name is needed, or latest{near(run, runs)}"
    )


def all_runs() -> list[Path]:
    """Return the folders of all runs and of all jobs of sweeps."""
    return [file.parent for file in (*RUNS.glob("*/config.yaml"), *SWEEPS.glob("*/*/config.yaml"))]


def result_of(folder: Path) -> dict[str, Any]:
    """Return a run's result; nothing if it has none yet."""
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def continued(config: DictConfig) -> tuple[DictConfig, list[str]]:
    """Return the config that is meant, and the overrides that make it.

    With ``resume=<a run>`` it is that run's own, with what was typed on top.
    """
    typed = [str(o) for o in HydraConfig.get().overrides.task if key_of(str(o)) != "folder"]
    if not config.resume or Path(config.resume).is_file():
        return config, typed
    folder = find("resume", config.resume)
    typed = [override for override in typed if key_of(override) not in ("resume", "name")]
    before = [str(override) for override in OmegaConf.load(folder / "overrides.yaml")]
    overrides = [old for old in before if key_of(old) not in map(key_of, typed)] + typed
    config = hydra.compose(HydraConfig.get().job.config_name, overrides)
    config.folder = str(folder)
    return config, overrides


def key_of(override: str) -> str:
    """Return the key that an override sets."""
    return override.split("=")[0].lstrip("+~")


def folder_for(config: DictConfig) -> Path:
    """Return the folder for this run, not made yet: ``outputs/runs/<name>``, unless one is given."""
    folder = Path(config.folder) if config.folder else RUNS / name_or_time(config.name)
    if rank_zero_only.rank == 0:
        os.environ[FOLDER] = str(folder.resolve())
    elif not (config.folder or config.name):  # a process that the first one started: they share a folder
        folder = Path(os.environ[FOLDER])
    return folder.resolve()


def safe_name(overrides: str, further: str = "", longest: int = 120) -> str:
    """Return a folder name for a job's overrides: no character that a file system minds, bounded, none alike.

    `further` is what tells it from another job of that name.
    """
    name = re.sub(r"[^\w.=,+-]+", "_", overrides, flags=re.ASCII)[:longest].lstrip(".") or "defaults"
    if name == (overrides or name) and not further:
        return name
    return f"{name}-{hashlib.sha256((overrides + further).encode()).hexdigest()[:8]}"


def shown(path: Path) -> str:
    """Return a path as a user would type it: relative to the working directory if it is below that."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def modified(file: Path) -> float:
    """Return when a file was last written."""
    return file.stat().st_mtime


def hold(folder: Path) -> None:
    """Keep other processes from training in a folder, until this one ends; ConfigError if one does already."""
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info(f"waits    for the process that trains in {shown(folder)}")
        try:
            lock.acquire(timeout=60)  # for one that was asked to stop a moment ago, and saves
        except Timeout:
            raise ConfigError(f"name: another process is training in {shown(folder)}") from None
    _held.append(lock)


def settings_of(folder: Path) -> dict[str, Any]:
    """Return a run's settings, with dotted keys; none if it has not come so far."""
    file = folder / "config.yaml"
    return flat(OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else {}


class Earlier(NamedTuple):
    """What a run's folder has of it: its settings with dotted keys, its result so far, and where to go on from."""

    settings: dict[str, Any]
    result: dict[str, Any]
    checkpoint: Path


def earlier(folder: Path) -> Earlier | None:
    """Return what there is of a run; None if it is new. ConfigError if its folder has nothing to go on from."""
    checkpoints = folder / "checkpoints"
    if not folder.exists() or (rank_zero_only.rank and not (checkpoints / "last.ckpt").exists()):
        return None
    begun, ours = (folder / "config.yaml").is_file(), (folder / "job.json").is_file()
    if (begun or ours) and rank_zero_only.rank == 0:
        with blamed_on("folder"):
            hold(folder)
    if ours and not begun:
        return None  # a sweep has made it ready
    if not begun:
        raise ConfigError(f"name: {shown(folder)} is there already, and is no run's folder; choose another name")
    last = checkpoints / "last.ckpt"
    if rank_zero_only.rank == 0:
        tidy(folder, last)
    if not list(checkpoints.glob("*.ckpt")) and not any((folder / f).exists() for f in ("metrics.csv", "result.json")):
        log.info(f"{shown(folder)} was broken off before its first step: it starts anew")
        return None
    settings = settings_of(folder)
    complaints = []
    others = sorted(checkpoints.glob("*.ckpt"), key=modified, reverse=True)
    for file in (last, *(file for file in others if file != last)):
        try:
            read(file)
        except ConfigError as error:
            complaints.append(str(error))
            continue
        for complaint in complaints:
            log.warning(f"{complaint}; going on from {shown(file)}")
        return Earlier(settings, result_of(folder), file)
    raise ConfigError(f"{'; '.join(complaints)}: nothing to go on from; remove {shown(folder)} to start again")


def tidy(folder: Path, last: Path) -> None:
    """Remove what a killed save left, and put the checkpoint that lightning saved at SLURM's signal in its place."""
    for partial in last.parent.glob("*.partial"):
        partial.unlink()
    for requeued in sorted(folder.glob("hpc_ckpt_*.ckpt"), key=modified):
        if not last.exists() or modified(last) < modified(requeued):
            requeued.replace(last)
        else:
            requeued.unlink()  # else lightning would take it, whatever came later


def is_finished(before: Earlier, config: DictConfig) -> bool:
    """Whether a run has come to its end, and that end is not to be moved."""
    return before.result.get("status") in DONE and not end_moved(before.settings, config)


def end_moved(before: dict[str, Any], config: DictConfig) -> bool:
    """Whether a run is to end elsewhere than it was."""
    now = flat(plain(config))
    return any(before.get(k) != now[k] for k in ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time"))


def read(checkpoint: Path, device: str = "meta") -> dict[str, Any]:
    """Return what a checkpoint holds; ConfigError if it is not there, damaged, none of this project, or holds code."""
    if not checkpoint.is_file():
        raise ConfigError(f"{shown(checkpoint)} does not exist")
    try:
        content = torch.load(checkpoint, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ConfigError(
                f"{shown(checkpoint)} holds more than numbers and text, which might run code when loaded: refused"
            ) from error
        raise ConfigError(f"{shown(checkpoint)} is damaged, or no checkpoint") from error
    except Exception as error:
        raise ConfigError(f"{shown(checkpoint)} is damaged, or no checkpoint: {one_line(str(error))[:100]}") from error
    if not isinstance(content, dict) or not {"global_step", "state_dict", "loops"} <= content.keys():
        raise ConfigError(f"{shown(checkpoint)} is no checkpoint of a run")
    return content


def may_change(key: str) -> bool:
    """Whether a setting may be another one when a run goes on."""
    return any(fnmatch(key, pattern) for pattern in MAY_CHANGE)


def check_unchanged(folder: Path, before: dict[str, Any], config: DictConfig, derived: bool = True) -> None:
    """Raise ConfigError if a run is to go on with settings that would make it another run.

    `derived` says whether the config has what is worked out from the rest.
    """
    now = flat(plain(config))
    if not derived:
        now |= {k: before[k] for k in now if now[k] is None and k in before and any(fnmatch(k, d) for d in DERIVED)}
    changed = [
        f"{key}={before.get(key, 'nothing')} then, {now.get(key, 'nothing')} now"
        for key in dict.fromkeys((*before, *now))
        if before.get(key) != now.get(key) and not may_change(key)
    ]
    if changed:
        more = f", and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{shown(folder)} was trained with other settings: {'; '.join(changed[:4])}{more}; "
            f"choose another name, or go on with its own by resume={shown(folder)}"
        )


def check_resumable(checkpoint: Path, module: LanguageModel, steps: int | None) -> None:
    """Raise ConfigError for another network's or tokenizer's checkpoint, or one with all the `steps` behind it."""
    content = read(checkpoint)
    done, theirs = content["global_step"], {name: tuple(w.shape) for name, w in content["state_dict"].items()}
    ours = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"resume: {shown(checkpoint)} is another network's: {name} has the shape {theirs.get(name)} there "
                f"and {ours.get(name)} here"
            )
    if content.get("tokenizer", module.tokenizer.fingerprint) != module.tokenizer.fingerprint:
        raise ConfigError(
            f"resume: {shown(checkpoint)} was trained with another tokenizer; take the same text, or "
            "tokenizer=file tokenizer.path=<that run's folder>/tokenizer.json"
        )
    if steps is not None and done >= steps:
        raise ConfigError(
            f"resume: {shown(checkpoint)} was trained for {done:,} steps already, and the run ends at {steps:,}; "
            "set a larger trainer.max_epochs or trainer.max_steps"
        )


@contextmanager
def kept(folder: Path, config: DictConfig, overrides: list[str], tokenizer: Any, first: bool = True) -> Iterator[None]:
    """Make the folder with what the run is made from, and write what is logged inside to ``train.log``.

    Only on the `first` process: for the others this does nothing.
    """
    if not first:
        yield
        return
    with blamed_on("folder"):
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        OmegaConf.save(OmegaConf.create(overrides), folder / "overrides.yaml")
        tokenizer.save(folder / "tokenizer.json")
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json``."""
    save_json(folder / "result.json", result)


def save_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file as `save_text` does; numbers that are not finite become null."""
    save_text(file, json.dumps(finite(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def save_text(file: Path, content: str) -> None:
    """Write a file in one move, so that it is whole or not there."""
    beside = file.with_name(f"{file.name}.tmp")
    beside.write_text(content, encoding="utf-8")
    beside.replace(file)


def finite(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str | None]:
    """Return the versions that a result depends on, and the commit that the code stands at (None outside git)."""
    packages = ("torch", "lightning", "hydra-core", "omegaconf", "tensorboard", "numpy")
    found: dict[str, str | None] = {name: importlib.metadata.version(name) for name in packages}
    return found | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit(),
    }


def commit() -> str | None:
    """Return the commit of the project's checkout, ``-dirty`` behind it when files differ; None outside git."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
