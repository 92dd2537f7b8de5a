"""What a sweep has come to: read from its jobs' folders, as a table, a CSV file and a picture."""

import csv
import io
import json
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from rich.table import Table

from language_model import plots, run
from language_model.config import ROOT
from language_model.run import shown
from language_model.terminal import log, terminal

SEED = "seed"


class Row(NamedTuple):
    """A job of a sweep, and what it has come to."""

    folder: Path
    overrides: list[str]
    values: dict[str, str]  # of the settings that vary between the jobs
    status: str  # finished, pruned, failed, not finished
    error: str | None
    metric: str | None
    value: float | None  # the best of the metric; the less, the better
    result: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it trained."""
        return self.result.get("seconds", 0.0)

    @property
    def setting(self) -> dict[str, str]:
        """The values but the seed."""
        return {key: value for key, value in self.values.items() if key != SEED}


class Group(NamedTuple):
    """The jobs with one setting, over the seeds."""

    setting: dict[str, str]
    rows: list[Row]

    @property
    def values(self) -> list[float]:
        """What its jobs came to."""
        return [row.value for row in self.rows if row.value is not None and row.status == "finished"]

    @property
    def label(self) -> str:
        """The setting in a line."""
        return in_words(self.setting) or "all"


def in_words(setting: dict[str, str]) -> str:
    """Return a setting in a line."""
    return ", ".join(f"{key}={shorter(value)}" for key, value in setting.items())


def shorter(value: str) -> str:
    """Return a long number with four digits."""
    try:
        return value if len(value) < 8 else f"{float(value):.4g}"
    except ValueError:
        return value


def job_of(folder: Path) -> dict[str, Any]:
    """Return what ``job.json`` says; nothing if there is none."""
    file = folder / "job.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def save_job(folder: Path, **facts: Any) -> None:
    """Write facts into ``job.json``, over those of the same names."""
    run.save_json(folder / "job.json", job_of(folder) | facts)


def read(sweep: Path) -> list[Row]:
    """Return the jobs of a sweep, the best first, those without a value last."""
    jobs = {file.parent: job_of(file.parent) for file in sweep.glob("*/job.json")}
    keys = dict.fromkeys(key for job in jobs.values() for key in job["values"])
    filled = {
        folder: {key: job["values"].get(key) or str(run.settings_of(folder).get(key, "")) for key in keys}
        for folder, job in jobs.items()
    }
    varied = [key for key in keys if len({values[key] for values in filled.values()}) > 1]
    rows = []
    for folder, job in jobs.items():
        result = run.result_of(folder)
        status = "failed" if job.get("error") else result.get("status", "")
        metric, value = result.get("monitor"), result.get("best")
        rows.append(
            Row(
                folder, job["overrides"], {key: filled[folder][key] for key in varied},
                status if status in (*run.DONE, "failed") else "not finished",
                job.get("error"), metric, value, result,
            )
        )  # fmt: skip
    return sorted(
        rows, key=lambda row: (row.value is None or row.status == "failed", row.value or 0.0, row.folder.name)
    )


def outcome(folder: Path) -> str:
    """Return in words what a job has come to."""
    job, result = job_of(folder), run.result_of(folder)
    name = in_words({k: v for k, v in job["values"].items() if k != "trial"}) if "trial" in job else folder.name
    if job["error"]:
        return f"{name}: {job['error']}"
    best = f"{result['monitor']} {result['best']:.4f}, " if "best" in result else ""
    return f"{name}: {best}{result.get('status', 'not finished')} in {duration(result.get('seconds', 0.0))}"


def groups(rows: Iterable[Row]) -> list[Group]:
    """Return the rows by their settings, the best mean first."""
    found: dict[tuple, Group] = {}
    for row in rows:
        found.setdefault(tuple(row.setting.items()), Group(row.setting, [])).rows.append(row)
    return sorted(
        found.values(), key=lambda group: (not group.values, statistics.fmean(group.values or [0.0]), group.label)
    )


def best(rows: Iterable[Row]) -> Row | None:
    """Return the best job of the setting that is best over its seeds; None if no job has finished."""
    first = next(iter(groups(rows)), None)
    done = [row for row in first.rows if row.status == "finished" and row.value is not None] if first else []
    return min(done, key=lambda row: row.value or 0.0, default=None)


def command(row: Row) -> str:
    """Return the command that repeats a job as a run."""
    single = ["hydra.mode=RUN"] if any(o.startswith("experiment=") for o in row.overrides) else []
    return shlex.join(["python", shown(ROOT / "scripts" / "train.py"), *row.overrides, *single])


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the heading and the lines of the table over settings."""
    settings = list(rows[0].setting) if rows else []
    metric = next((row.metric for row in rows if row.metric), "metric")
    several = any(len(group.rows) > 1 for group in groups(rows))
    lines = []
    for group in groups(rows):
        seconds = [row.seconds for row in group.rows if row.status == "finished"]
        unfinished = [row.status for row in group.rows if row.status != "finished"]
        lines.append(
            [
                *map(shorter, group.setting.values()),
                mean_and_deviation(group.values),
                *([str(len(group.values))] if several else []),
                duration(statistics.fmean(seconds)) if seconds else "–",
                ", ".join(f"{unfinished.count(status)} {status}" for status in dict.fromkeys(unfinished)),
            ]
        )
    heading = [
        *settings,
        f"{metric} (mean ± s.d.)" if several else metric,
        *(["seeds"] if several else []),
        "time a job",
    ]
    if any(line[-1] for line in lines):
        return [*heading, ""], lines
    return heading, [line[:-1] for line in lines]


def mean_and_deviation(values: list[float]) -> str:
    """Return values as mean ± sample standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds > 9.95 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def update(sweep: Path) -> list[Row]:
    """Write ``summary.csv``, ``summary.md`` and ``summary.png`` anew, and return the rows."""
    with FileLock(sweep / ".summary.lock"):
        rows = read(sweep)
        run.save_text(sweep / "summary.csv", as_csv(rows))
        run.save_text(sweep / "summary.md", as_markdown(sweep, rows))
        plots.sweep(groups(rows), sweep / "summary.png")
    return rows


def as_csv(rows: list[Row]) -> str:
    """Return a line for each job."""
    metrics = sorted({name for row in rows for name in row.result.get("metrics", {})})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = [*(rows[0].values if rows else ()), "status", "metric", "best", *metrics]
    writer.writerow([*heading, "steps", "tokens", "seconds", "error", "folder"])
    for row in rows:
        last = row.result.get("metrics", {})
        values = [*row.values.values(), row.status, row.metric, row.value, *(last.get(name) for name in metrics)]
        facts = [row.result.get(name) for name in ("steps", "tokens", "seconds")]
        writer.writerow([*values, *facts, row.error, row.folder.name])
    return text.getvalue()


def as_markdown(sweep: Path, rows: list[Row]) -> str:
    """Return the page: table, picture, the best one's command, failures."""
    heading, lines = table(rows)
    finished = sum(row.status == "finished" for row in rows)
    page = [f"# {sweep.name}", "", f"{finished} of {len(rows)} jobs finished.", ""]
    page += [markdown_line(heading), markdown_line("---" for _ in heading), *map(markdown_line, lines), ""]
    page += ["![every job](summary.png)", ""]
    if first := best(rows):
        page += ["The best one again:", "", "```sh", command(first), "```", ""]
    if failed := [row for row in rows if row.error]:
        page += ["Failed:", "", *(f"- `{row.folder.name}`: {row.error}" for row in failed), ""]
    return "\n".join(page)


def markdown_line(cells: Iterable[str]) -> str:
    """Return a line of a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(sweep: Path, rows: list[Row]) -> None:
    """Say what the sweep has come to."""
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
    log.info(f"summary  {shown(sweep / 'summary.md')}, .csv, .png")
    log.info(f"look     tensorboard --logdir {shlex.quote(shown(sweep))}")
