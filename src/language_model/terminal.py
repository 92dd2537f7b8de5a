"""The terminal: the project's log, progress bars, and which warnings of the libraries are hidden."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# Environment variable of a sweep's job: its label, such as "[2/6] optimizer.lr=0.001". A job logs only warnings to the
# terminal; the sweep reports the rest.
JOB_LABEL = "LANGUAGE_MODEL_JOB"

log = logging.getLogger("language_model")
terminal = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # wide tables when written to a file

# Warnings that users can do nothing about, each with the reason.
HIDDEN_WARNINGS = [
    "does not have many workers",  # tokens are memory-mapped: workers would slow loading down
    "number of training batches .* is smaller than the logging interval",  # short epochs are fine
    "Experiment logs directory .* exists and is not empty",  # the run's own folder, created just before
    "Checkpoint directory .* exists and is not empty",  # three callbacks share it
    "isinstance.treespec, LeafSpec",  # deprecated inside torch, called by lightning
    "Total length of `list` across ranks is zero",  # no validation split
    "You're resuming from a checkpoint that ended before the epoch ended",  # the sampler skips what is done
    "callbacks used to create the checkpoint need to be provided",  # one may be switched off when a run resumes
    "The dirpath has changed from",  # a new run that starts from a checkpoint writes to its own folder
]


class TerminalHandler(logging.Handler):
    """Writes log lines above a progress bar, without wrapping; warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        warning = record.levelno >= logging.WARNING
        text = Text(f"warning: {record.getMessage()}" if warning else record.getMessage())
        terminal.print(text, style="yellow" if warning else None, soft_wrap=True)


@contextmanager
def progress(what: str, num_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in a terminal, over a number of bytes (None: unknown); yields the function that advances it.

    Nothing is shown where the output is not a terminal, or on other processes than the first.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=terminal,
        transient=True,
        refresh_per_second=4,
        disable=not terminal.is_terminal or rank_zero_only.rank != 0,
    )
    with bar:
        task = bar.add_task(what, total=num_bytes)
        yield lambda more: bar.advance(task, more)


def setup_logging() -> None:
    """Send the project's log to the terminal, on the first process only, and hide the libraries' usual warnings."""
    log.setLevel(logging.INFO)
    log.propagate = False
    level = logging.WARNING if JOB_LABEL in os.environ else logging.INFO
    log.handlers = [TerminalHandler(level) if rank_zero_only.rank == 0 else logging.NullHandler()]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
