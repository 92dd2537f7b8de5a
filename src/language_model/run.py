"""A run on disk: its folder, what is kept of how it was made, and its result."""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from language_model.config import ROOT, ConfigError, blamed_on, name_or_time, one_line
from language_model.module import LanguageModel
from language_model.terminal import log

RUNS = ROOT / "outputs" / "runs"
FOLDER = "LANGUAGE_MODEL_RUN_FOLDER"  # tells the processes that lightning starts where the first one writes


def folder_for(config: DictConfig) -> Path:
    """Return the folder for this run, not made yet; ConfigError where the name is taken.

    A single run gets ``outputs/runs/<name>``; a job of a sweep a folder named by its overrides, in the sweep's.
    """
    hydra_config = HydraConfig.get()
    if config.folder:
        folder = Path(config.folder)
    elif hydra_config.mode == RunMode.MULTIRUN:
        overrides = [o for o in hydra_config.overrides.task if not o.startswith("name=")]
        folder = Path(hydra_config.sweep.dir) / safe_name(",".join(sorted(overrides)))
    else:
        folder = RUNS / name_or_time(config.name)
    if rank_zero_only.rank == 0:
        os.environ[FOLDER] = str(folder.resolve())
    elif not (config.folder or config.name):  # a process that the first one started: they share a folder
        folder = Path(os.environ[FOLDER])
    if folder.exists() and rank_zero_only.rank == 0:
        raise ConfigError(f"name={config.name}: {shown(folder)} is there already; choose another name, or remove it")
    return folder.resolve()


def safe_name(overrides: str, longest: int = 120) -> str:
    """Return a folder name for a job's overrides: no character that a file system minds, bounded, none alike."""
    name = re.sub(r"[^\w.=,+-]+", "_", overrides, flags=re.ASCII)[:longest].lstrip(".") or "defaults"
    return name if name == (overrides or name) else f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def shown(path: Path) -> str:
    """Return a path as a user would type it: relative to the working directory if it is below that."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def checkpoint_to_resume(resume: str) -> Path:
    """Return the checkpoint that `resume` names: a file, or the last one of a run's folder; ConfigError for neither."""
    path = Path(resume)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise ConfigError(
            f"resume={resume}: {shown(checkpoint)} does not exist; a run's folder or a checkpoint is needed"
        )
    return checkpoint


def check_resumable(checkpoint: Path, module: LanguageModel, steps: int | None) -> None:
    """Raise ConfigError for a damaged checkpoint, another network's or tokenizer's, or one with `steps` behind it."""
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True)
        done, theirs = content["global_step"], {name: tuple(w.shape) for name, w in content["state_dict"].items()}
    except Exception as error:
        why = one_line(str(error))[:200]
        raise ConfigError(f"resume: {shown(checkpoint)} is not a run's checkpoint: {why}") from error
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
def kept(folder: Path, config: DictConfig, tokenizer: Any, first: bool = True) -> Iterator[None]:
    """Make the folder with what the run is made from, and write what is logged inside to ``train.log``.

    Only on the `first` process: for the others this does nothing.
    """
    if not first:
        yield
        return
    with blamed_on("folder"):
        folder.mkdir(parents=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        OmegaConf.save(OmegaConf.create(list(HydraConfig.get().overrides.task)), folder / "overrides.yaml")
        tokenizer.save(folder / "tokenizer.json")
    handler = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` in one move, so that it is whole or not there; numbers that are not finite become null."""
    beside = folder / "result.json.tmp"
    beside.write_text(json.dumps(finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(folder / "result.json")


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
