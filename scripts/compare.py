"""Test whether differences between the settings of a sweep are real: a confidence interval and a verdict for each.

`python scripts/compare.py sweep=my_sweep by=model.position`; `--help` shows every key.
"""

from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field
from rich.table import Table

from language_model.files import display_path, write_json
from language_model.pages.plots import Interval, plot_intervals
from language_model.runs.config import ConfigError, as_dict, check_values, did_you_mean, entry_point, errors_for_key
from language_model.runs.folder import SWEEPS, read_facts
from language_model.runs.moved_names import with_current_names
from language_model.sweeps import summary
from language_model.sweeps.compare import MAX_SEEDS, POWER, compare_settings
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
    asked = with_current_names(read_facts(folder / "sweep.json"))["asked"]
    first = next(iter(asked.get(config.by, [])), None)
    baseline = first if config.baseline is None else str(config.baseline)
    comparisons = compare_settings(rows, config.by, baseline, config.confidence)

    metric = next((row.metric for row in rows if row.metric), "metric")
    method = "pairs of the same seed" if all(each.paired for each in comparisons) else "two samples each"
    widened = f", {len(comparisons)} intervals together" if len(comparisons) > 1 else ""
    log.info(f"{metric} in {display_path(folder)}: {config.by} against {baseline}, {method}")
    table = Table(config.by, "mean", "difference", f"{config.confidence:.0%} interval{widened}", "n", "verdict")
    for each in comparisons:
        more = f"; {each.more_seeds or f'over {MAX_SEEDS}'} more seeds" if each.verdict == "undecided" else ""
        interval = f"{each.low:+.4f} to {each.high:+.4f}"
        table.add_row(
            each.setting, f"{each.mean:.4f}", f"{each.difference:+.4f}", interval, str(each.num), each.verdict + more
        )
    terminal.print(table, soft_wrap=True)
    if any(each.verdict == "undecided" for each in comparisons):
        log.info(f"more seeds: the number that detects a difference of this size with a probability of {POWER:.0%}")
    output = Path(config.output) if config.output else folder / f"compare-{config.by}.json"
    with errors_for_key("output"):
        write_json(output, {"metric": metric, "by": config.by, "comparisons": [each._asdict() for each in comparisons]})
        intervals = [Interval(each.setting, each.difference, each.low, each.high, each.verdict) for each in comparisons]
        plot_intervals(intervals, config.by, metric, str(baseline), output.with_suffix(".png"))
    log.info(f"saved in {display_path(output)}, and as a plot in .png")


def find_sweep(sweep: str) -> Path:
    """Return the folder of a sweep, given by its name or folder."""
    for folder in (Path(sweep), SWEEPS / sweep):
        if (folder / "sweep.json").is_file():
            return folder
    names = [file.parent.name for file in SWEEPS.glob("*/sweep.json")]
    raise ConfigError(f"sweep={sweep}: there is no such sweep{did_you_mean(sweep, names)}")


if __name__ == "__main__":
    main()
