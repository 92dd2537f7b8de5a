"""The JSON files of runs and sweeps, checked when they are read: a folder may be damaged, or a stranger's."""

from pathlib import Path
from typing import Any

from language_model.files import display_path, read_json, write_json
from language_model.runs.config import ConfigError, check_value, one_line
from language_model.runs.moved_names import with_current_names

Texts = dict[str, str]

# The types of what is read, by file; other facts are not used.
RESULT: dict[str, Any] = {
    "status": str,
    "error": str,
    "monitor": str,
    "monitor_mode": str,
    "best": float | None,  # null: not finite
    "best_checkpoint": str,
    "metrics": dict[str, float | None],
    "uniform_baseline": float,
    "seconds": float,
    "steps": int,
    "epochs": int,
    "tokens": int,
    "tokens_per_sec": float | None,
    "mfu": float | None,
    "grad_norm_max": float | None,
    "grad_norm_mean": float | None,
    "grad_norm_last": float | None,
    "clipped_share": float,
    "skipped_steps": int,
    "stopped_early": str,
    "validated_step": int | None,
    "validated_share": float | None,
    "unfinished_epoch": dict[str, float],
    "undecayed": dict[str, float],
    "sample": str,
    "sample_description": str,
}
IN_A_FINISHED_RESULT = ("metrics", "uniform_baseline", "seconds", "steps", "epochs")
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


def read_facts(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a run or a sweep holds, empty if there is none; ConfigError if it is damaged."""
    try:
        facts = read_json(file)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{display_path(file)} is damaged: {one_line(str(error))}") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{display_path(file)} is damaged: it is not a JSON object")
    return facts


def read_result(folder: Path) -> dict[str, Any]:
    """Return a run's result; empty if it has none yet. ConfigError if the file is damaged."""
    file = folder / "result.json"
    result = read_facts(file)
    if "guessing_loss" in result:  # its name in older runs
        result["uniform_baseline"] = result.pop("guessing_loss")
    return checked(file, result, RESULT, IN_A_FINISHED_RESULT if result.get("status") == "finished" else ())


def read_job(folder: Path) -> dict[str, Any]:
    """Return what a sweep wrote about one of its jobs; empty for a run of no sweep. ConfigError if it is damaged."""
    file = folder / "job.json"
    return checked(file, with_current_names(read_facts(file)), JOB, needed=("overrides", "values"))


def update_job(folder: Path, **facts: Any) -> None:
    """Write facts into ``job.json``; those of the same names are replaced."""
    write_json(folder / "job.json", with_current_names(read_facts(folder / "job.json")) | facts)


def read_sweep(folder: Path) -> dict[str, Any]:
    """Return what a sweep was asked for. ConfigError if the file is damaged."""
    file = folder / "sweep.json"
    return checked(file, with_current_names(read_facts(file)), SWEEP, needed=("asked",))


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
