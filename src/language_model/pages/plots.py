"""Plots of runs and sweeps, drawn from plain values and from the files in run folders."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from language_model.files import display_path
from language_model.runs.monitor import final_name

Points = tuple[list[float], list[float]]  # steps, values


class Series(NamedTuple):
    """Runs with one setting (over several seeds): one color in a plot."""

    label: str
    setting: dict[str, str]
    folders: list[Path]
    finished: list[float]  # the metric of each finished run, at its end
    pruned: list[float]  # the same of runs that a search stopped early


class Interval(NamedTuple):
    """A setting's difference from the baseline, with its confidence interval."""

    setting: str
    difference: float
    low: float | None  # None: there is no interval
    high: float | None
    verdict: str  # better, worse, undecided


def read_points(run: Path, metric: str) -> Points:
    """Return a metric's steps and values from a run's ``metrics.csv``; empty if there are none yet.

    ValueError if the file is damaged.
    """
    file = run / "metrics.csv"
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []
        points = [(float(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{display_path(file)} is damaged: {error}") from error
    return [step for step, _ in points], [value for _, value in points]


@contextmanager
def figure(file: Path, panels: int = 1, width: float = 5.0) -> Iterator[Any]:
    """Yield the axes of a figure, one for each panel; save it to the file at the end, in one move.

    Args:
        file: its suffix decides the format.
        panels: axes side by side.
        width: of a panel, in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and most commands draw nothing
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * panels, 4.0), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    temporary = file.with_name(f"{file.name}.tmp")
    drawing.savefig(temporary, format=file.suffix[1:], dpi=130)
    temporary.replace(file)


def plot_sweep(series: Sequence[Series], metric: str, file: Path) -> None:
    """Draw a metric over the steps of every run, and its final values over each of the first three settings."""
    settings = list(series[0].setting)[:3]
    with figure(file, 1 + len(settings)) as axes:
        for number, each in enumerate(series):
            label = each.label if number < 8 else None  # more do not fit into a legend
            for folder in each.folders:
                axes[0].plot(*read_points(folder, metric), color=color(number, len(series)), label=label, linewidth=1)
                label = None
        axes[0].set(xlabel="step", ylabel=metric)
        if len(series) > 1:
            axes[0].legend(fontsize="x-small", frameon=False)
        for axis, key in zip(axes[1:], settings, strict=True):
            plot_over_setting(axis, key, series)
            axis.set(xlabel=key, ylabel=final_name(metric))


def plot_over_setting(axis: Any, key: str, series: Sequence[Series]) -> None:
    """Draw the final values over one setting; a line through the means if nothing else varies."""
    shown = [(number, each) for number, each in enumerate(series) if each.finished or each.pruned]
    places = setting_places(axis, [each.setting[key] for _, each in shown])
    for number, each in shown:
        place, own_color = places[each.setting[key]], color(number, len(series))
        axis.scatter([place] * len(each.finished), each.finished, color=own_color, s=18, zorder=3)
        axis.scatter([place] * len(each.pruned), each.pruned, color="0.7", marker="x", s=18)
    if shown and len(shown[0][1].setting) == 1 and all(each.finished for _, each in shown):
        means = sorted((places[each.setting[key]], statistics.fmean(each.finished)) for _, each in shown)
        axis.plot(*zip(*means, strict=True), color="0.6", linewidth=1)


def setting_places(axis: Any, values: Sequence[str]) -> dict[str, float]:
    """Return where each value stands on the x axis: numbers by size (logarithmic over a wide range), names in order."""
    try:
        places = {value: float(value) for value in values}
    except ValueError:
        names = list(dict.fromkeys(values))
        axis.set_xticks(range(len(names)), names)
        return {name: float(place) for place, name in enumerate(names)}
    if places and min(places.values()) > 0 and max(places.values()) >= 8 * min(places.values()):
        axis.set_xscale("log")
    if len(places) <= 8:
        axis.set_xticks(list(places.values()), list(places))
        axis.set_xticks([], minor=True)
    return places


def color(number: int, total: int) -> Any:
    """Return the color of a series: the darkest for the first, which is the best."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / max(1, total - 1)) if total > 1 else "C0"


def plot_intervals(intervals: Sequence[Interval], by: str, label: str, file: Path) -> None:
    """Draw each setting's difference from the baseline, with its confidence interval; `label` says what differs."""
    colors = {"better": "C2", "worse": "C3", "undecided": "0.5"}
    with figure(file, width=7) as (axis,):
        axis.axvline(0.0, color="0.3", linewidth=1)
        for place, each in enumerate(intervals):
            reach = None if each.low is None or each.high is None else (each.high - each.low) / 2
            axis.errorbar(each.difference, place, xerr=reach, fmt="o", capsize=4, color=colors[each.verdict])
            axis.annotate(
                each.verdict, (each.difference, place), textcoords="offset points", xytext=(0, 7), ha="center"
            )
        axis.set_yticks(range(len(intervals)), [each.setting for each in intervals])
        axis.set(xlabel=label, ylabel=by)
        axis.set_ylim(len(intervals) - 0.5, -0.5)
