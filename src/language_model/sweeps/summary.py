"""A sweep's summary, read from its jobs' folders: a table in the terminal, a page, a CSV file and a plot."""

import csv
import io
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from rich.table import Table

from language_model.files import ROOT, display_path, write_text
from language_model.pages.plots import Series, plot_sweep
from language_model.runs.config import errors_for_key
from language_model.runs.folder import read_settings
from language_model.runs.monitor import best_name, final_name, sign_of
from language_model.runs.records import final_value, read_job, read_result
from language_model.runs.resume import COMPLETED
from language_model.terminal import log, terminal

SEED = "seed"


class Row(NamedTuple):
    """A job of a sweep, and its outcome."""

    folder: Path
    overrides: list[str]
    values: dict[str, str]  # of the settings that vary between the jobs
    status: str  # finished, pruned, failed, not finished
    error: str | None
    metric: str | None
    value: float | None  # of the metric, at the end of the run
    result: dict[str, Any]

    @property
    def best(self) -> float | None:
        """The metric's best value during the run."""
        return self.result.get("best")

    @property
    def mode(self) -> str:
        """Whether a lower (min) or a higher (max) value is better; results of older versions have only the former."""
        return self.result.get("monitor_mode", "min")

    @property
    def rank(self) -> tuple[bool, str, float]:
        """Sorts the better job first, those without a value last."""
        missing = self.value is None or self.status == "failed"
        return missing, self.metric or "", sign_of(self.mode) * (self.value or 0.0)

    @property
    def seconds(self) -> float:
        """Training time."""
        return self.result.get("seconds", 0.0)

    @property
    def setting(self) -> dict[str, str]:
        """The values, without the seed."""
        return {key: value for key, value in self.values.items() if key != SEED}


class Group(NamedTuple):
    """The jobs that differ only in the seed."""

    setting: dict[str, str]
    rows: list[Row]

    @property
    def finished(self) -> list[Row]:
        """The finished jobs that have a value."""
        return [row for row in self.rows if row.value is not None and row.status == "finished"]

    @property
    def values(self) -> list[float]:
        """The final value of the metric of each finished job."""
        return [row.value for row in self.finished if row.value is not None]

    @property
    def rank(self) -> tuple[bool, str, float, str]:
        """Sorts the group of the better mean first, those without a value last."""
        first = (self.finished or self.rows)[0]
        mean = statistics.fmean(self.values) if self.values else 0.0
        return not self.values, first.metric or "", sign_of(first.mode) * mean, self.label

    @property
    def label(self) -> str:
        """The setting in one line."""
        return format_setting(self.setting) or "all"

    @property
    def series(self) -> Series:
        """What a plot shows of it."""
        pruned = [row.value for row in self.rows if row.value is not None and row.status == "pruned"]
        return Series(self.label, self.setting, [row.folder for row in self.rows], self.values, pruned)


def format_setting(setting: dict[str, str]) -> str:
    """Return a setting in one line."""
    return ", ".join(f"{key}={shorten(value)}" for key, value in setting.items())


def shorten(value: str) -> str:
    """Return a number of eight or more characters with four digits; other text as it is."""
    try:
        return value if len(value) < 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def read(sweep: Path) -> list[Row]:
    """Return the jobs of a sweep, the best first, those without a value last.

    Of jobs with the same settings, as when a value is typed that was the default before, one is returned.
    """
    jobs = {file.parent: read_job(file.parent) for file in sweep.glob("*/job.json")}
    keys = dict.fromkeys(key for job in jobs.values() for key in job["values"])
    filled = {
        folder: {key: job["values"].get(key) or str(read_settings(folder).get(key, "")) for key in keys}
        for folder, job in jobs.items()
    }
    varied = [key for key in keys if len({values[key] for values in filled.values()}) > 1]
    rows = [job_row(folder, job, {key: filled[folder][key] for key in varied}) for folder, job in jobs.items()]
    unique: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (row.rank, row.folder.name)):
        unique.setdefault(tuple(filled[row.folder].values()), row)
    return list(unique.values())


def job_row(folder: Path, job: dict[str, Any], values: dict[str, str]) -> Row:
    """Return a job's row, with its `values` of the settings that vary."""
    result = read_result(folder)
    status = "failed" if job.get("error") else result.get("status", "")
    if status not in (*COMPLETED, "failed"):
        status = "not finished"
    metric, value = result.get("monitor"), final_value(result)
    return Row(folder, job["overrides"], values, status, job.get("error"), metric, value, result)


def outcome(folder: Path) -> str:
    """Return a job's outcome in one line: its error, or its final metric, status and time."""
    job, result = read_job(folder), read_result(folder)
    name = format_setting({k: v for k, v in job["values"].items() if k != "trial"}) if "trial" in job else folder.name
    if job.get("error"):
        return f"{name}: {job['error']}"
    value, status = final_value(result), result.get("status", "not finished")
    final = f"final {result['monitor']} {value:.4f}, " if value is not None else ""
    return f"{name}: {final}{status} in {format_duration(result.get('seconds', 0.0))}"


def metrics(rows: Iterable[Row]) -> list[str]:
    """Return the metrics that the jobs monitor: one, unless they differ in whether they validate."""
    return sorted({row.metric for row in rows if row.metric})


def groups(rows: Iterable[Row]) -> list[Group]:
    """Return the rows grouped by setting, the best mean of the final values first."""
    found: dict[tuple, Group] = {}
    for row in rows:
        found.setdefault(tuple(row.setting.items()), Group(row.setting, [])).rows.append(row)
    return sorted(found.values(), key=lambda group: group.rank)


def best(rows: Sequence[Row]) -> Row | None:
    """Return the best job of the setting with the best mean over its seeds.

    None if no job has finished, or their metrics are different ones.
    """
    first = next(iter(groups(rows)), None)
    if first is None or len(metrics(rows)) > 1:
        return None
    return min(first.finished, key=lambda row: row.rank, default=None)


def command(row: Row) -> str:
    """Return the command that repeats a job as a run."""
    single = ["hydra.mode=RUN"] if any(o.startswith("experiment=") for o in row.overrides) else []
    return shlex.join(["python", display_path(ROOT / "scripts" / "train.py"), *row.overrides, *single])


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the lines of the table of settings."""
    settings = list(rows[0].setting) if rows else []
    names = metrics(rows)
    several = any(len(group.rows) > 1 for group in groups(rows))
    lines = []
    for group in groups(rows):
        seconds = [row.seconds for row in group.rows if row.status == "finished"]
        unfinished = [row.status for row in group.rows if row.status != "finished"]
        lines.append(
            [
                *map(shorten, group.setting.values()),
                *([group.rows[0].metric or "–"] if len(names) > 1 else []),
                mean_and_deviation(group.values),
                mean_and_deviation([row.best for row in group.finished if row.best is not None]),
                *([str(len(group.values))] if several else []),
                format_duration(statistics.fmean(seconds)) if seconds else "–",
                ", ".join(f"{unfinished.count(status)} {status}" for status in dict.fromkeys(unfinished)),
            ]
        )
    heading = [
        *settings,
        *(["metric"] if len(names) > 1 else []),
        *(f"{name} (mean ± s.d.)" if several else name for name in value_names(names)),
        *(["seeds"] if several else []),
        "time a job",
    ]
    if any(line[-1] for line in lines):
        return [*heading, ""], lines
    return heading, [line[:-1] for line in lines]


def value_names(names: Sequence[str]) -> tuple[str, str]:
    """Return what the final and the best values of the jobs' metrics are called."""
    return (
        (final_name(names[0]), best_name(names[0])) if len(names) == 1 else ("at the end of the run", "best of the run")
    )


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean ± sample standard deviation" of the values."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def format_duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds > 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def update(sweep: Path) -> list[Row]:
    """Rewrite ``summary.csv``, ``summary.md`` and ``summary.png``; return the rows."""
    with FileLock(sweep / ".summary.lock"):
        rows = read(sweep)
        write_text(sweep / "summary.csv", as_csv(rows))
        write_text(sweep / "summary.md", as_markdown(sweep, rows))
        if names := metrics(rows):
            with errors_for_key("summary.png"):
                plot_sweep([group.series for group in groups(rows)], names[0], sweep / "summary.png")
    return rows


def as_csv(rows: list[Row]) -> str:
    """Return the CSV file: a line for each job."""
    logged = sorted({name for row in rows for name in row.result.get("metrics", {})})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = [*(rows[0].values if rows else ()), "status", "metric", "final", "best", *logged]
    writer.writerow([*heading, "steps", "tokens", "seconds", "error", "folder"])
    for row in rows:
        last = row.result.get("metrics", {})
        values = [*row.values.values(), row.status, row.metric, row.value, row.best]
        values += [last.get(name) for name in logged]
        facts = [row.result.get(name) for name in ("steps", "tokens", "seconds")]
        writer.writerow([*values, *facts, row.error, row.folder.name])
    return text.getvalue()


def as_markdown(sweep: Path, rows: list[Row]) -> str:
    """Return the page: table, plot, the command that repeats the best job, failures."""
    heading, lines = table(rows)
    finished = sum(row.status == "finished" for row in rows)
    page = [f"# {sweep.name}", "", f"{finished} of {len(rows)} jobs finished.", ""]
    page += [markdown_line(heading), markdown_line("---" for _ in heading), *map(markdown_line, lines), ""]
    page += ["![every job](summary.png)", ""]
    if first := best(rows):
        page += ["The command that repeats the best job:", "", "```sh", command(first), "```", ""]
    if failed := [row for row in rows if row.error]:
        page += ["Failed:", "", *(f"- `{row.folder.name}`: {row.error}" for row in failed), ""]
    return "\n".join(page)


def markdown_line(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(sweep: Path, rows: list[Row]) -> None:
    """Log the table, the failures, the best job's command, and where to look."""
    heading, lines = table(rows)
    rich_table = Table(*(name.replace(" (", "\n(") for name in heading))
    for line in lines:
        rich_table.add_row(*line)
    log.info("")
    terminal.print(rich_table, soft_wrap=True)
    for error in dict.fromkeys(row.error for row in rows if row.error):
        names = [row.folder.name for row in rows if row.error == error]
        log.warning(f"failed: {error} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})")
    if first := best(rows):
        log.info(f"best     {command(first)}")
    log.info(f"summary  {display_path(sweep / 'summary.md')}, .csv, .png")
    log.info(f"look     tensorboard --logdir {shlex.quote(display_path(sweep))}")
