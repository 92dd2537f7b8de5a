"""Whose code a folder's files may name: what this checkout offers. A run's folder may come from a stranger.

A ``_target_`` in a config is a call, so building a stranger's config would run what the stranger likes. From the folder
of a run or a sweep, a node is built only if its target is

- named for such a node in a file of ``conf``: the package's own parts, and those that the user has added there, or
- a class of the right kind (for ``model``, an ``nn.Module``) that a file in ``src`` defines.

What is typed on the command line is not checked: it is the user's.
"""

import pkgutil
import re
from collections.abc import Iterator, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any

import yaml

from language_model.files import ROOT, display_path
from language_model.runs.config import ConfigError
from language_model.terminal import log

# Keys whose values are folders that a run writes to, besides its own.
WRITTEN = re.compile(r"(^|\.)(dirpath|save_dir|default_root_dir)$")


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


def harmless_overrides(saved: Sequence[str], file: Path) -> list[str]:
    """Return the overrides in a run's `file` without a ``data.cache`` that holds no corpora.

    ConfigError for one by which resuming would read the environment, or write outside the run's folder.
    """
    kept = []
    for override in saved:
        key, _, value = override.partition("=")
        if key == "data.cache" and not any(Path(value.strip("'\"")).glob("*/corpus.json")):
            log.info(f"cache    {override} of {display_path(file)} is left out: no corpora are there")
            continue
        if key.lstrip("+~").startswith("hydra") or "${oc." in override or WRITTEN.search(key):
            raise ConfigError(
                f"{override} in {display_path(file)}: could reach outside the run's folder: refused, unless you type it"
            )
        kept.append(override)
    return kept


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
