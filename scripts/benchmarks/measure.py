"""What the benchmarks share: run a function in a new process, time scripts/train.py, print and save figures."""

import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from language_model.files import ROOT
from language_model.runs.config import ConfigError

BENCHMARKS = ROOT / "outputs" / "benchmarks"
T = TypeVar("T")


def run_in_new_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def time_train_script(*arguments: str) -> float:
    """Return the seconds that ``scripts/train.py`` takes as a command, with the start of Python."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {last_error_line(done)}")
    return seconds


def train(*overrides: str, parent: str | None = None) -> dict[str, float]:
    """Train; return the seconds of the command and of its training steps, and the final val/loss (NaN if none).

    Args:
        overrides: of ``scripts/train.py``.
        parent: the folder in which the run's folder, ``run``, is created; None: a temporary one.
    """
    with nullcontext(parent) if parent else tempfile.TemporaryDirectory() as folder:
        seconds = time_train_script(f"folder={folder}/run", *overrides)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    training_seconds = result["tokens"] / result["tokens_per_sec"]
    loss = result["metrics"].get("val/loss", math.nan)
    return {"command_seconds": seconds, "training_seconds": training_seconds, "loss": loss}


def last_error_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that a failed command wrote to standard error, else its exit status."""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def log_figures(name: str, figures: dict[str, float]) -> dict[str, float]:
    """Print figures on one line, and return them."""
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return figures


def median_text(numbers: Sequence[float], form: str = ".3g") -> str:
    """Return the median as text, in this format."""
    return f"{statistics.median(numbers):{form}}"


def range_text(numbers: Sequence[float], form: str = ".3g") -> str:
    """Return the smallest and the largest number as text, in this format."""
    return f"{min(numbers):{form}} to {max(numbers):{form}}"


def save_figures(file: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=2) + "\n")
