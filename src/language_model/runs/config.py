"""Configs: composed by Hydra, checked, and built into objects; every error is one line.

A config node with a ``_target_`` is a call. Its keys are checked against the parameters of the target: their names,
and the types and ranges in their annotations (by pydantic). So a class that a user adds needs no separate schema.
"""

import datetime
import difflib
import inspect
import json
import pkgutil
import re
import secrets
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    PydanticSchemaGenerationError,
    TypeAdapter,
)
from pydantic import ValidationError as PydanticError

from language_model.files import ROOT
from language_model.runs.values import Allowed, allowed_values, non_finite_numbers

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=,+-]*$", max_length=100)]

# Keys of the run as a whole, which belong to no node with a _target_.
SETTINGS: dict[str, Any] = {
    "name": Name | NonNegativeInt | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],  # numpy's limit
    "resume": Annotated[str, Field(min_length=1)] | int | None,
    "folder": Annotated[str, Field(min_length=1)] | None,
    "vocab_size": PositiveInt | None,
    "total_steps": PositiveInt | None,
    "cooldown_start": PositiveInt | None,
    "monitor": str | None,
    "monitor_mode": Literal["min", "max"] | None,
    "compile": bool | None,
    "exercise": None,  # or a node, checked as every node
}


def name_or_timestamp(name: str | int | None) -> str:
    """Return the name, or if there is none the date and time with a random suffix, so that no two runs collide."""
    return str(name or f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(2)}")


OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
# Cached: all jobs of a sweep must get the same folder.
OmegaConf.register_new_resolver("name_or_timestamp", name_or_timestamp, use_cache=True, replace=True)


class ConfigError(Exception):
    """A mistake that the user can correct; its message is one line."""


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
    with errors_for_key(key, parameters=node):
        escaped = escape_interpolations(escape_interpolations(node))  # Hydra resolves them twice
        return hydra.utils.instantiate(escaped, **arguments, _convert_="all")


@contextmanager
def errors_for_key(key: str, parameters: Iterable[str] = ()) -> Iterator[None]:
    """Turn any exception inside into a ConfigError that names `key`.

    A message that begins with one of its `parameters`, as ``batch_size=32: ...``, names that key.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        message = one_line(str(cause)) or type(cause).__name__
        if isinstance(cause, OSError) and cause.filename:
            message = f"{cause.filename}: {(cause.strerror or message).lower()}"
        if isinstance(cause, TypeError) and "required positional argument" in message:
            message += "; a part that gets more arguments later needs _partial_: true"
        elif not isinstance(cause, ValueError | OSError) and type(cause).__name__ != "MisconfigurationException":
            message = f"{type(cause).__name__}: {message} (HYDRA_FULL_ERROR=1 shows where)"
        joint = "." if message.partition("=")[0] in parameters else ": "
        raise ConfigError(f"{key}{joint}{message}") from error


def check_node(path: str, node: Mapping[str, Any], allow_null: bool = False) -> None:
    """Check a node, and the nodes in it, against the parameters of their targets."""
    parameters: Mapping[str, Any] | None = None
    allowed: Mapping[str, Allowed] = {}
    if "_target_" in node:
        allowed = allowed_values(str(node["_target_"]))
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
                check_value(here, value, annotations.get(key, Any), allowed.get(key))
        elif all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            raise ConfigError(f"{here}: unknown key{did_you_mean(key, parameters)}")


def check_value(path: str, value: Any, annotation: Any, allowed: Allowed | None = None) -> None:
    """Raise ConfigError unless a value matches an annotation, by JSON's strict rules (true is no number).

    With `allowed`, that is what it must match. NaN and infinity are never allowed.
    """
    shown = f"{path}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
    for number in non_finite_numbers(value):
        raise ConfigError(f"{shown}: {number} is not a finite number")
    try:
        adapter = TypeAdapter(
            annotation if allowed is None else allowed.annotation, config=ConfigDict(arbitrary_types_allowed=True)
        )
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
        raise ConfigError(f"{shown}: {f'allowed: {allowed.words}' if allowed else wanted}") from None


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
        raise ConfigError(explain_interpolation(error)) from error


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """Return one line for a ``${...}`` that cannot be replaced by a value, with its key."""
    message = one_line((error.msg or str(error)).splitlines()[0])
    escape = "; write \\${ for the characters ${" if isinstance(error, InterpolationResolutionError) else ""
    return f"{error.full_key}: {message}{escape}" if error.full_key else message


def escape_interpolations(value: Any) -> Any:
    """Return a value of any nesting that OmegaConf resolves to the given one, with every ``${`` as it stands."""
    if isinstance(value, dict):
        return {key: escape_interpolations(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escape_interpolations(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


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
