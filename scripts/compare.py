"""Test whether differences between the settings of a sweep are real: a confidence interval and a verdict for each.

`python scripts/compare.py sweep=my_sweep by=model.position`; `--help` shows every key.
"""

from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import Field
from rich.table import Table

from language_model.files import display_path, write_json
from language_model.pages.plots import Interval, plot_intervals
from language_model.runs.command_line import entry_point
from language_model.runs.config import ConfigError, as_dict, check_values, did_you_mean, errors_for_key
from language_model.runs.folder import SWEEPS
from language_model.runs.monitor import BETTER, final_name
from language_model.runs.records import read_sweep
from language_model.sweeps import summary
from language_model.sweeps.compare import MAX_SEEDS, POWER, Comparisons, compare_settings
from language_model.terminal import log, setup_logging, terminal

KEYS = {
    "sweep": str | int,
    "by": str,
    "baseline": str | int | float | bool | None,
    "confidence": Annotated[float, Field(gt=0, lt=1)],
    "output": str | None,
}


@entry_point("compare")
def main(config: DictConfig) -> None:
    """Print the comparisons as a table, and save them as JSON and as a plot."""
    as_dict(config)  # raises ConfigError for a missing value
    check_values(config, KEYS)
    setup_logging()
    folder = find_sweep(str(config.sweep))
    rows = summary.read(folder)
    typed = next(iter(read_sweep(folder)["asked"].get(config.by, [])), None)
    as_typed = (row for row in rows if typed == row.values.get(config.by) or f"{config.by}={typed}" in row.overrides)
    first = next((row.values.get(config.by) for row in as_typed), None)
    found = compare_settings(
        rows, config.by, first if config.baseline is None else str(config.baseline), config.confidence
    )
    show(found, config, folder)
    output = Path(config.output) if config.output else folder / f"compare-{config.by}.json"
    with errors_for_key("output"):
        write_json(output, as_json(found, config.by))
        intervals = [Interval(c.setting, c.difference, c.low, c.high, c.verdict) for c in found.comparisons]
        label = f"{final_name(found.metric)}: difference from {found.baseline} ({BETTER[found.mode]} is better)"
        plot_intervals(intervals, config.by, label, output.with_suffix(".png"))
    log.info(f"saved in {display_path(output)}, and as a plot in .png")


def show(found: Comparisons, config: DictConfig, folder: Path) -> None:
    """Print what is compared, the table, and the jobs that are left out."""
    comparisons = found.comparisons
    method = "pairs of the same seed" if all(each.paired for each in comparisons) else "two samples each"
    log.info(
        f"{final_name(found.metric)} ({BETTER[found.mode]} is better) in {display_path(folder)}: "
        f"{config.by} against {found.baseline}, {method}"
    )
    for key, values in found.averaged.items():
        log.info(f"each seed's value is the mean over {key}={','.join(values)}")
    widened = f", {len(comparisons)} intervals together" if len(comparisons) > 1 else ""
    table = Table(config.by, "mean", "difference", f"{config.confidence:.0%} interval{widened}", "n", "verdict")
    table.add_row(found.baseline, f"{found.mean:.4f}", "", "", str(found.num), "the baseline")
    for each in comparisons:
        more = f"; {each.more_seeds or f'over {MAX_SEEDS}'} more seeds" if each.verdict == "undecided" else ""
        if each.low is None:
            interval, more = "none", "; every seed has the same difference"
        else:
            interval = f"{each.low:+.4f} to {each.high:+.4f}"
        table.add_row(
            each.setting, f"{each.mean:.4f}", f"{each.difference:+.4f}", interval, str(each.num), each.verdict + more
        )
    terminal.print(table, soft_wrap=True)
    if any(each.more_seeds for each in comparisons):
        log.info(f"more seeds: the number that detects a difference of this size with a probability of {POWER:.0%}")
    for setting in dict.fromkeys(left.setting for left in found.left_out):
        jobs = [f"{left.job} {left.reason}" for left in found.left_out if left.setting == setting]
        log.warning(f"left out: {len(jobs)} of {config.by}={setting}: {'; '.join(jobs)}")


def as_json(found: Comparisons, by: str) -> dict[str, Any]:
    """Return the comparisons as JSON has them."""
    lists = {
        "comparisons": [each._asdict() for each in found.comparisons],
        "left_out": [each._asdict() for each in found.left_out],
    }
    return {"by": by, "value": final_name(found.metric), **found._asdict(), **lists}


def find_sweep(sweep: str) -> Path:
    """Return the folder of a sweep, given by its name or folder."""
    for folder in (Path(sweep), SWEEPS / sweep):
        if (folder / "sweep.json").is_file():
            return folder
    names = [file.parent.name for file in SWEEPS.glob("*/sweep.json")]
    raise ConfigError(f"sweep={sweep}: there is no such sweep{did_you_mean(sweep, names)}")


if __name__ == "__main__":
    main()
