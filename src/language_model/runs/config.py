"""Configs: composed by Hydra, checked, and built into objects; every error is one line.

A config node with a ``_target_`` is a call. Its keys are checked against the parameters of the target: their names,
and the types and ranges in their annotations (by pydantic). So a class that a user adds needs no separate schema.
"""

import datetime
import difflib
import functools
import inspect
import json
import os
import pkgutil
import re
import secrets
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    ConfigDict,
    Field,
    PositiveInt,
    PydanticSchemaGenerationError,
    TypeAdapter,
)
from pydantic import ValidationError as PydanticError

from language_model.files import ROOT

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=,+-]*$", max_length=100)]

# Keys of the run as a whole, which belong to no node with a _target_.
SETTINGS: dict[str, Any] = {
    "name": Name | int | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],  # numpy's limit
    "resume": str | None,
    "folder": str | None,
    "vocab_size": PositiveInt | None,
    "total_steps": PositiveInt | None,
    "monitor": str | None,
    "compile": bool | None,
    "exercise": None,  # or a node, checked as every node
}

# The packages of Hydra's launchers.
LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
}


def name_or_timestamp(name: str | int | None) -> str:
    """Return the name, or if there is none the date and time with a random suffix, so that no two runs collide."""
    return str(name or f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}")


OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
# Cached: all jobs of a sweep must get the same folder.
OmegaConf.register_new_resolver("name_or_timestamp", name_or_timestamp, use_cache=True, replace=True)


class ConfigError(Exception):
    """A mistake that the user can correct; its message is one line."""


def entry_point(
    config_name: str, literal: tuple[str, ...] = ()
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Return a decorator that makes a function of a config a script's entry point.

    Hydra composes the config from ``conf/<config_name>.yaml`` and the command line. A ConfigError, or an override that
    Hydra refuses, ends the script with one line on stderr and exit status 1 (HYDRA_FULL_ERROR=1 adds the traceback).

    Args:
        config_name: file in ``conf``, without the suffix.
        literal: keys whose values are taken as text, whatever characters they contain.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> None:
            try:
                task(config)
            except ConfigError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    print(f"error: {error}", file=sys.stderr)
                    raise  # the sweep continues with its other jobs and ends with the first error
                if traceback_wanted:
                    raise
                sys.exit(f"error: {error}")

        traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
        hydra_main = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(job)

        def main() -> None:
            sys.argv[1:] = [quote_override(argument, literal) for argument in sys.argv[1:]]
            if traceback_wanted:
                return hydra_main()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing several lines
            try:
                hydra_main()
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                sys.exit(f"error: {explain_error(error, config_name, sys.argv[1:])}")
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "0"

        return main

    return decorate


def quote_override(argument: str, literal: tuple[str, ...] = ()) -> str:
    """Return an override with its value quoted if its key is `literal` or Hydra's grammar cannot parse the value."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\""):
        return argument
    if key not in literal:
        try:
            OverridesParser.create().parse_override(argument)
            return argument
        except HydraException:
            pass
    inner = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"{key}='{inner}'"


def check_config(config: DictConfig) -> None:
    """Raise ConfigError for the first unknown key, or value of the wrong type or range.

    Null passes here: some values are derived later, and `build` checks again.
    """
    everything = as_dict(config)
    nodes = {key: value for key, value in everything.items() if isinstance(value, dict)}
    for key in everything.keys() - nodes.keys():
        if key not in SETTINGS:
            raise ConfigError(f"{key}: unknown key{did_you_mean(key, everything)}")
        check_value(key, everything[key], SETTINGS[key])
    for key, node in nodes.items():
        check_node(key, node, allow_null=True)


def check_values(config: DictConfig, annotations: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first value that does not match the annotation of its dotted key."""
    values = flatten(as_dict(config))
    for key, annotation in annotations.items():
        check_value(key, values[key], annotation)


def build(config: DictConfig, key: str, **arguments: Any) -> Any:
    """Return the object that the node `key` describes, or None if the node is null.

    `arguments` are passed in addition to the node's keys. Raises ConfigError if the object cannot be built.
    """
    node = as_dict(config)[key]
    if node is None:
        return None
    check_node(key, node)
    with errors_for_key(key):
        return hydra.utils.instantiate(node, **arguments, _convert_="all")


@contextmanager
def errors_for_key(key: str) -> Iterator[None]:
    """Turn any exception inside into a ConfigError that names `key`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        message = one_line(str(cause)) or type(cause).__name__
        if isinstance(cause, OSError) and cause.filename:
            message = f"{cause.filename}: {(cause.strerror or message).lower()}"
        if not isinstance(cause, ValueError | OSError) and type(cause).__name__ != "MisconfigurationException":
            message = f"{type(cause).__name__}: {message} (HYDRA_FULL_ERROR=1 shows where)"
        raise ConfigError(f"{key}: {message}") from error


def check_node(path: str, node: Mapping[str, Any], allow_null: bool = False) -> None:
    """Check a node, and the nodes in it, against the parameters of their targets."""
    parameters: Mapping[str, Any] | None = None
    if "_target_" in node:
        try:
            target = pkgutil.resolve_name(node["_target_"])
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{path}._target_={node['_target_']}: {one_line(str(error))}") from error
        function = target.__init__ if inspect.isclass(target) else target
        parameters = inspect.signature(target).parameters
        try:
            annotations = typing.get_type_hints(function, include_extras=True)
        except NameError:  # imported for type checkers only, as in lightning's plugins
            annotations = {}
    for key, value in node.items():
        here = f"{path}.{key}"
        if key.startswith("_") and key.endswith("_"):
            continue
        if isinstance(value, dict) and (parameters is None or "_target_" in value):
            check_node(here, value, allow_null)
        elif parameters is None:
            if value is not None:  # null switches a node off, as in callbacks.sample=null
                raise ConfigError(f"{here}: nothing takes this key{did_you_mean(key, node)}")
        elif key in parameters:
            if not (value is None and allow_null):
                check_value(here, value, annotations.get(key, Any))
        elif all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            raise ConfigError(f"{here}: unknown key{did_you_mean(key, parameters)}")


def check_value(path: str, value: Any, annotation: Any) -> None:
    """Raise ConfigError unless a value matches an annotation, by JSON's strict rules (true is no number)."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return  # an annotation that pydantic cannot check
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except PydanticError as error:
        wanted = "; or: ".join(
            dict.fromkeys(
                "".join(f"item {step}: " for step in e["loc"] if isinstance(step, int))
                + e["msg"][0].lower()
                + e["msg"][1:]
                for e in error.errors()
                if e["type"] != "needs_python_object"
            )
        )
        raise ConfigError(f"{path}={json.dumps(value, ensure_ascii=False)}: {wanted}") from None


def explain_error(error: Exception, config_name: str, arguments: list[str]) -> str:
    """Return one line for an error of Hydra's, with what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if choice in LAUNCHERS:
            return f"hydra/launcher={choice}: not installed; pip install {LAUNCHERS[choice]}"
        options = error.options or [file.stem for file in (ROOT / "conf" / group).glob("*.yaml")]
        return f"{group}={choice}: there is no such file in conf/{group}; choose from {', '.join(sorted(options))}"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if not unknown:
        return one_line(str(error))
    groups = [a.split(",")[0] for a in arguments if (ROOT / "conf" / a.partition("=")[0]).is_dir() and "=" in a]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            known = hydra.compose(config_name, groups)
    except HydraException:  # the mistake is in a config file, not on the command line
        return one_line(str(error))
    parent, _, name = unknown[1].rpartition(".")
    siblings = OmegaConf.select(known, parent) if parent else known
    same_name = [key for key in flatten(OmegaConf.to_container(known)) if key.endswith(f".{name}")]
    return f"{unknown[1]}: unknown key{did_you_mean(name, siblings or (), same_name)}"


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless the value is one of the known ones."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}={value}: unknown; choose from {', '.join(known)}")


def did_you_mean(name: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Return "; did you mean ...?" with similar names, or else keys that end in `name`, or else "; known: ..."."""
    names = [str(other) for other in known if other not in (name, "self") and not str(other).startswith("_")]
    close = difflib.get_close_matches(name, names, n=2) or list(elsewhere)[:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names)}" if names else ""


def as_dict(config: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, interpolations resolved; ConfigError for a missing value."""
    try:
        for key in OmegaConf.missing_keys(config):
            raise ConfigError(f"{key}: a value is needed, as {key}=...")
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]  # not a list
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(str(error))) from error


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of nested dicts with dotted keys, ``{"model.d_model": 64, ...}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
            if isinstance(value, dict)
            else {key: value}
        )
        leaves |= inner
    return leaves


def one_line(text: str) -> str:
    """Return a text with every run of whitespace as one space."""
    return " ".join(text.split())
