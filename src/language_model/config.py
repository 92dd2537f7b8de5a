"""Hydra's side of the project: finding the configs, checking them, building from them, and saying what is wrong.

A config node with a ``_target_`` is a call; its keys are checked against the parameters of what it calls: their
names, and their annotations' types and ranges (by pydantic). So a class that a user adds is checked without a schema.
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
from pathlib import Path
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

ROOT = Path(__file__).resolve().parents[2]

# In the environment of a sweep's job: which of the jobs it is, in words. It leaves most of the talking to the sweep.
JOB = "LANGUAGE_MODEL_JOB"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=,+-]*$", max_length=100)]

# The keys that belong to the run as a whole and not to a node with a _target_.
SETTINGS: dict[str, Any] = {
    "name": Name | int | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],  # numpy's limit
    "resume": str | None,
    "folder": str | None,
    "vocab_size": PositiveInt | None,
    "total_steps": PositiveInt | None,
    "monitor": str | None,
    "compile": bool | None,
    "exercise": None,  # or a node, which is checked as one
}

# What Hydra's launchers come with.
LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
}


def name_or_time(name: str | int | None) -> str:
    """Return a name, or for none the date and time with something behind it that cannot collide."""
    return str(name or f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}")


OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
# Cached, so that the jobs of a sweep share its folder.
OmegaConf.register_new_resolver("name_or_time", name_or_time, use_cache=True, replace=True)


class ConfigError(Exception):
    """Something that a user set and can set right; its text is one line."""


def entry_point(
    config_name: str, literal: tuple[str, ...] = ()
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a function of a config the entry point of a script, composed by Hydra from ``conf/<config_name>.yaml``.

    A ConfigError, or an override that Hydra refuses, ends it with one line on stderr and exit status 1;
    with HYDRA_FULL_ERROR=1 also with the traceback. The values of `literal` keys are text, whatever it is made of.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> None:
            try:
                task(config)
            except ConfigError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    print(f"error: {error}", file=sys.stderr)
                    raise  # the sweep goes on with its other jobs, and ends with the first error
                if traceback_wanted:
                    raise
                sys.exit(f"error: {error}")

        traceback_wanted = os.environ.get("HYDRA_FULL_ERROR", "0") != "0"
        hydra_main = hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=config_name)(job)

        def main() -> None:
            sys.argv[1:] = [quoted(argument, literal) for argument in sys.argv[1:]]
            if traceback_wanted:
                return hydra_main()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print in several lines
            try:
                hydra_main()
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                sys.exit(f"error: {explain(error, config_name, sys.argv[1:])}")
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "0"

        return main

    return decorate


def quoted(argument: str, literal: tuple[str, ...] = ()) -> str:
    """Return an override with its value in quotes, if its key is `literal` or Hydra's grammar has no place for it."""
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


def check(config: DictConfig) -> None:
    """Raise ConfigError for the first key that nothing takes, or value that does not fit its key.

    What is still null is let pass: some of it is derived later, and `build` checks again.
    """
    everything = plain(config)
    nodes = {key: value for key, value in everything.items() if isinstance(value, dict)}
    for key in everything.keys() - nodes.keys():
        if key not in SETTINGS:
            raise ConfigError(f"{key}: unknown key{near(key, everything)}")
        check_value(key, everything[key], SETTINGS[key])
    for key, node in nodes.items():
        check_node(key, node, allow_null=True)


def check_values(config: DictConfig, annotations: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first value that does not fit the annotation of its dotted key."""
    values = flat(plain(config))
    for key, annotation in annotations.items():
        check_value(key, values[key], annotation)


def build(config: DictConfig, key: str, **arguments: Any) -> Any:
    """Make what the node `key` describes, with further arguments; ConfigError if it cannot be made."""
    node = plain(config)[key]
    if node is None:
        return None
    check_node(key, node)
    with blamed_on(key):
        return hydra.utils.instantiate(node, **arguments, _convert_="all")


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """Turn an exception into a ConfigError that names `key`."""
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
        except NameError:  # some are imported for type checkers only, as in lightning's plugins
            annotations = {}
    for key, value in node.items():
        here = f"{path}.{key}"
        if key.startswith("_") and key.endswith("_"):
            continue
        if isinstance(value, dict) and (parameters is None or "_target_" in value):
            check_node(here, value, allow_null)
        elif parameters is None:
            if value is not None:  # a node switched off, as callbacks.sample=null
                raise ConfigError(f"{here}: nothing takes this key{near(key, node)}")
        elif key in parameters:
            if not (value is None and allow_null):
                check_value(here, value, annotations.get(key, Any))
        elif all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            raise ConfigError(f"{here}: unknown key{near(key, parameters)}")


def check_value(path: str, value: Any, annotation: Any) -> None:
    """Raise ConfigError unless a value fits an annotation, as strictly as JSON allows."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError:
        return  # an annotation that says nothing checkable
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


def explain(error: Exception, config_name: str, arguments: list[str]) -> str:
    """Put an error of Hydra's into one line that says what is allowed."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if choice in LAUNCHERS:
            return f"hydra/launcher={choice}: is not installed; pip install {LAUNCHERS[choice]}"
        options = error.options or []
        return f"{group}={choice}: there is no such file in conf/{group}; choose from {', '.join(sorted(options))}"
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if not unknown:
        return one_line(str(error))
    groups = [a.split(",")[0] for a in arguments if (ROOT / "conf" / a.partition("=")[0]).is_dir() and "=" in a]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            known = hydra.compose(config_name, groups)
    except HydraException:  # it is a config file that is wrong, not what was typed
        return one_line(str(error))
    parent, _, name = unknown[1].rpartition(".")
    siblings = OmegaConf.select(known, parent) if parent else known
    same_name = [key for key in flat(OmegaConf.to_container(known)) if key.endswith(f".{name}")]
    return f"{unknown[1]}: unknown key{near(name, siblings or (), same_name)}"


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless a value is one of those known."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{key}={value}: there is no such one here; choose from {', '.join(known)}")


def near(name: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Say which known names look like `name`, or which full keys end in it, or else what is known."""
    names = [str(other) for other in known if other not in (name, "self") and not str(other).startswith("_")]
    close = difflib.get_close_matches(name, names, n=2) or list(elsewhere)[:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names)}" if names else ""


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a config as dicts and lists, interpolations resolved; ConfigError for a value that is missing."""
    try:
        for key in OmegaConf.missing_keys(config):
            raise ConfigError(f"{key}: a value is needed, as {key}=...")
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]  # not a list
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(str(error))) from error


def flat(tree: Any) -> dict[str, Any]:
    """Return the leaves of nested dicts with dotted keys, ``{"model.d_model": 64, ...}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = (
            {f"{key}.{name}": leaf for name, leaf in flat(value).items()} if isinstance(value, dict) else {key: value}
        )
        leaves |= inner
    return leaves


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())
