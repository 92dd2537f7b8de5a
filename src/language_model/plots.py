"""Pictures of runs and sweeps."""

import csv
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from language_model.compare import Comparison
    from language_model.summary import Group

Points = tuple[list[float], list[float]]  # steps, values


def points(run: Path, metric: str) -> Points:
    """Return a metric's points from a run's ``metrics.csv``; none if there are none yet."""
    file = run / "metrics.csv"
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines())) if file.is_file() else []
    found = [(float(row["step"]) + 1, float(row[metric])) for row in rows if row.get(metric)]
    return [step for step, _ in found], [value for _, value in found]


@contextmanager
def figure(file: Path, panels: int = 1, width: float = 5.0) -> Iterator[Any]:
    """Give the axes of a figure, and save it in one move; one that is the less, the better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and most commands draw nothing
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * panels, 4.0), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    yield axes
    beside = file.with_name(f"{file.name}.tmp")
    drawing.savefig(beside, format=file.suffix[1:], dpi=130)
    beside.replace(file)


def sweep(groups: "Sequence[Group]", file: Path) -> None:
    """Draw the metric over the steps of every job, and what the jobs came to over each setting that varies."""
    metric = next((row.metric for group in groups for row in group.rows if row.metric), None)
    if metric is None:
        return
    settings = list(groups[0].setting)[:3]
    with figure(file, 1 + len(settings)) as axes:
        for number, group in enumerate(groups):
            color = color_of(number, len(groups))
            label = group.label if number < 8 else None
            for row in group.rows:
                axes[0].plot(*points(row.folder, metric), color=color, label=label, linewidth=1)
                label = None
        axes[0].set(xlabel="step", ylabel=metric)
        if len(groups) > 1:
            axes[0].legend(fontsize="x-small", frameon=False)
        for axis, key in zip(axes[1:], settings, strict=True):
            over_setting(axis, key, groups)
            axis.set(xlabel=key, ylabel=f"best {metric}")


def over_setting(axis: Any, key: str, groups: "Sequence[Group]") -> None:
    """Draw what each job came to over its value of one setting; a line through the means if nothing else varies."""
    found = [(group.setting[key], group) for group in groups if any(row.value is not None for row in group.rows)]
    try:
        places = {value: float(value) for value, _ in found}
        positive = all(place > 0 for place in places.values())
        if positive and places and max(places.values()) >= 8 * min(places.values()):
            axis.set_xscale("log")
        if len(places) <= 8:
            axis.set_xticks(list(places.values()), list(places))
            axis.set_xticks([], minor=True)
    except ValueError:  # names
        order = list(dict.fromkeys(value for value, _ in found))
        places = {value: float(order.index(value)) for value in order}
        axis.set_xticks(range(len(order)), order)
    for value, group in found:
        color = color_of(list(groups).index(group), len(groups))
        axis.scatter([places[value]] * len(group.values), group.values, color=color, s=18, zorder=3)
        pruned = [row.value for row in group.rows if row.status == "pruned"]
        axis.scatter([places[value]] * len(pruned), pruned, color="0.7", marker="x", s=18)
    if found and len(found[0][1].setting) == 1 and all(group.values for _, group in found):
        means = sorted((places[value], statistics.fmean(group.values)) for value, group in found)
        axis.plot(*zip(*means, strict=True), color="0.6", linewidth=1)


def color_of(number: int, of: int) -> Any:
    """Return the color of a group: the best is the darkest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * number / max(1, of - 1)) if of > 1 else "C0"


def comparison(found: "Sequence[Comparison]", by: str, metric: str, file: Path) -> None:
    """Draw the interval of each difference from the baseline."""
    colors = {"better": "C2", "worse": "C3", "undecided": "0.5"}
    with figure(file, width=7) as (axis,):
        axis.axvline(0.0, color="0.3", linewidth=1)
        for place, each in enumerate(found):
            reach = (each.high - each.low) / 2
            axis.errorbar(each.difference, place, xerr=reach, fmt="o", capsize=4, color=colors[each.verdict])
            axis.annotate(
                each.verdict, (each.difference, place), textcoords="offset points", xytext=(0, 7), ha="center"
            )
        axis.set_yticks(range(len(found)), [each.setting for each in found])
        axis.set(xlabel=f"{metric}: difference from {found[0].baseline} (less is better)", ylabel=by)
        axis.set_ylim(len(found) - 0.5, -0.5)
