"""What sweeps leave in JSON files, checked when it is read: a folder may be damaged, or made by someone else."""

from pathlib import Path
from typing import Any

from language_model.files import display_path
from language_model.runs import folder as runs
from language_model.runs.config import ConfigError, check_value
from language_model.runs.folder import read_facts
from language_model.runs.moved_names import with_current_names

Texts = dict[str, str]

# The types of what is read, by file; facts that are not listed are not used by sweeps.
RESULT: dict[str, Any] = {
    "status": str,
    "error": str,
    "monitor": str,
    "monitor_mode": str,
    "best": float | None,  # null: not finite
    "metrics": dict[str, float | None],
    "seconds": float,
    "steps": int,
    "epochs": int,
    "tokens": int,
}
JOB: dict[str, Any] = {
    "overrides": list[str],
    "values": Texts,
    "label": str,
    "error": str | None,
    "ended": float,
    "trial": int,
    "swept": Texts,
}
SWEEP: dict[str, Any] = {"asked": dict[str, list[str]], "pruner": dict[str, Any]}


def read_result(folder: Path) -> dict[str, Any]:
    """Return a job's result; empty if it has none yet. ConfigError if the file is damaged."""
    return checked(folder / "result.json", runs.read_result(folder), RESULT)


def read_job(folder: Path) -> dict[str, Any]:
    """Return what a sweep wrote about a job; empty for a run of no sweep. ConfigError if the file is damaged."""
    return checked(folder / "job.json", runs.read_job(folder), JOB, needed=("overrides", "values"))


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return what a sweep was asked for. ConfigError if the file is damaged."""
    facts = with_current_names(read_facts(folder / "sweep.json"))
    return checked(folder / "sweep.json", facts, SWEEP, needed=("asked",))


def final_value(result: dict[str, Any]) -> float | None:
    """Return the last value of the monitored metric: that of the final weights; None if there is none, or no number."""
    value: float | None = result.get("metrics", {}).get(result.get("monitor"))
    return value


def checked(
    file: Path, facts: dict[str, Any], annotations: dict[str, Any], needed: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the facts; ConfigError if one has another type than its annotation, or a needed one is missing."""
    name = f"{display_path(file)} is damaged"
    for key in annotations.keys() & facts.keys():
        check_value(f"{name}: {key}", facts[key], annotations[key])
    if file.is_file() and (missing := [key for key in needed if key not in facts]):
        raise ConfigError(f"{name}: {missing[0]} is missing")
    return facts
