"""Whose code a folder's files may name: what this checkout offers. A run's folder may come from a stranger.

A ``_target_`` in a config is a call, so building a stranger's config would run what the stranger likes. From the folder
of a run or a sweep, a node is built only if its target is

- named for such a node in a file of ``conf``: the package's own parts, and those that the user has added there, or
- a class of the right kind (for ``model``, an ``nn.Module``) that a file in ``src`` defines.

What is typed on the command line is not checked: it is the user's.
"""

import pkgutil
from collections.abc import Iterator, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from language_model.files import ROOT, display_path
from language_model.runs.command_line import override_key
from language_model.runs.config import ConfigError, as_dict, flatten

FOLDER_KEYS = (".dirpath", ".save_dir", ".default_root_dir")


def check_offered(settings: dict[str, Any], where: str, typed: Sequence[str] = ()) -> None:
    """Raise ConfigError for the first ``_target_`` in settings that this checkout does not offer.

    Args:
        settings: the config of a run, or another nested dict.
        where: the file that they come from, for the message.
        typed: the overrides that were typed: what they name is the user's.
    """
    known = named_in_conf()
    for path, target in targets(settings):
        places = {path[0], path[-1]}
        theirs = not any((place, target) in known for place in places) and not is_class_of_checkout(path[0], target)
        if theirs and not any(target in override for override in typed):
            raise ConfigError(
                f"{'.'.join(path)}._target_={target} in {where}: this checkout does not offer it there, and building "
                "it could run a stranger's code: refused; to trust it, name it in a file of conf"
            )


def check_overrides(saved: Sequence[str], file: Path) -> None:
    """Raise ConfigError for an override in a run's `file` that could change what Hydra reads, or call a resolver."""
    for override in saved:
        key, _, value = override.partition("=")
        is_path = (ROOT / "conf" / key.lstrip("+~")).is_dir() and ("/" in value or ".." in value)
        if key.lstrip("+~").startswith("hydra") or is_path or ("${" in value and ":" in value):
            raise ConfigError(
                f"{override} in {display_path(file)}: could read outside the run's folder: refused, unless you type it"
            )


def stay_in_folder(config: DictConfig, folder: Path, file: Path, typed: Sequence[str]) -> None:
    """Raise ConfigError for a setting in a run's `file` by which resuming would write outside the run's `folder`.

    A ``data.cache`` that holds no corpora is replaced by the checkout's own. What was `typed` may be anywhere.
    """
    mine = tuple(override_key(override) for override in typed)
    for key, value in flatten(as_dict(config)).items():
        writes = key.startswith(("callbacks.", "logger.", "checkpoint_io.", "trainer."))
        if not writes or key.startswith(mine) or not isinstance(value, str):
            continue
        is_path = value.startswith(("/", "~")) or ".." in Path(value).parts or key.endswith(FOLDER_KEYS)
        if is_path and not Path(value).expanduser().resolve().is_relative_to(folder):
            raise ConfigError(
                f"{key}={value} in {display_path(file)}: is outside the run's folder: refused, unless you type it"
            )
    cache = config.data.get("cache")
    if cache and "data.cache" not in mine and not any(Path(cache).glob("*/corpus.json")):
        config.data.cache = str(ROOT / "outputs" / "corpora")


def targets(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path and the ``_target_`` of every node that has one."""
    if isinstance(settings, dict):
        if "_target_" in settings:
            yield path or ("",), str(settings["_target_"])
        for key, value in settings.items():
            yield from targets(value, (*path, str(key)))
    elif isinstance(settings, list):
        for i, value in enumerate(settings):
            yield from targets(value, (*path, str(i)))


def named_in_conf() -> set[tuple[str, str]]:
    """Return the targets that the files of ``conf`` name, each with the first and the last key of its path."""
    found = set()
    for file in (ROOT / "conf").rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        if "_target_" in text:
            group = () if "@package _global_" in text else file.relative_to(ROOT / "conf").parent.parts
            for path, target in targets(yaml.safe_load(text), group):
                found |= {(path[0], target), (path[-1], target)}
    return found


def is_class_of_checkout(key: str, target: str) -> bool:
    """Whether a file in ``src`` defines a class of this name, of the kind that `key` needs."""
    module, _, name = target.rpartition(".")
    file = ROOT.joinpath("src", *module.split("."))
    if not module or not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
        return False  # before anything is imported
    import lightning as L
    import torch
    from lightning.pytorch.loggers import Logger

    kinds = {
        "model": torch.nn.Module,
        "data": L.LightningDataModule,
        "optimizer": torch.optim.Optimizer,
        "callbacks": L.Callback,
        "logger": Logger,
    }
    try:
        found = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError):
        return False
    return key in kinds and isclass(found) and issubclass(found, kinds[key]) and found.__module__ == module
