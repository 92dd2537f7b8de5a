"""The terminal: one log for all that a run says, and silence for what a user can do nothing about."""

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

from language_model.config import JOB

log = logging.getLogger("language_model")
terminal = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a file has room for tables

# What the stack warns of, and why it is no news here.
NO_NEWS = [
    "does not have many workers",  # the tokens are in memory: workers would only slow it down
    "number of training batches .* is smaller than the logging interval",  # a short epoch is fine
    "Experiment logs directory .* exists and is not empty",  # the run's own folder, made a moment ago
    "Checkpoint directory .* exists and is not empty",  # three callbacks share it
    "isinstance.treespec, LeafSpec",  # deprecated inside torch, called by lightning
    "Total length of `list` across ranks is zero",  # no validation split
    "You're resuming from a checkpoint that ended before the epoch ended",  # the order begins behind what is done
    "The dirpath has changed from",  # resuming writes to a folder of its own
]


class TerminalHandler(logging.Handler):
    """Writes log lines above a progress bar, as they are: no wrapping, warnings in yellow."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        warning = record.levelno >= logging.WARNING
        text = Text(f"warning: {record.getMessage()}" if warning else record.getMessage())
        terminal.print(text, style="yellow" if warning else None, soft_wrap=True)


@contextmanager
def progress(what: str, num_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar over so many bytes (None: unknown), where there is a terminal; gives the function that moves it."""
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


def speak() -> None:
    """Send the project's log to the terminal, on the first process only, and quieten the stack's."""
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [TerminalHandler(logging.WARNING if JOB in os.environ else logging.INFO)]
    log.handlers = log.handlers if rank_zero_only.rank == 0 else []
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NO_NEWS:
        warnings.filterwarnings("ignore", f".*{message}")
