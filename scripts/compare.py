"""Is a difference between the settings of a sweep real? A confidence interval and a verdict for each.

`python scripts/compare.py sweep=my_sweep by=model.position`; `--help` shows all that can be set.
"""

from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field
from rich.table import Table

from language_model.files import display_path, read_json, write_json
from language_model.pages.plots import Interval, plot_intervals
from language_model.runs.config import ConfigError, as_dict, check_values, did_you_mean, entry_point, errors_for_key
from language_model.runs.folder import SWEEPS
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
    """Print the comparisons as a table, and keep them as JSON and as a picture."""
    as_dict(config)  # says what is missing
    check_values(config, KEYS)
    setup_logging()
    folder = next(
        (f for f in (Path(str(config.sweep)), SWEEPS / str(config.sweep)) if (f / "sweep.json").is_file()), None
    )
    if folder is None:
        names = [file.parent.name for file in SWEEPS.glob("*/sweep.json")]
        raise ConfigError(f"sweep={config.sweep}: there is no such sweep{did_you_mean(str(config.sweep), names)}")
    rows = summary.read(folder)
    asked = read_json(folder / "sweep.json")["asked"]
    first = next(iter(asked.get(config.by, [])), None)
    baseline = first if config.baseline is None else str(config.baseline)
    found = compare_settings(rows, config.by, baseline, config.confidence)

    metric = next((row.metric for row in rows if row.metric), "metric")
    how = "pairs of the same seed" if all(each.paired for each in found) else "two samples each"
    widened = f", {len(found)} intervals together" if len(found) > 1 else ""
    log.info(f"{metric} in {display_path(folder)}: {config.by} against {baseline}, {how}")
    table = Table(config.by, "mean", "difference", f"{config.confidence:.0%} interval{widened}", "n", "verdict")
    for each in found:
        more = f"; {each.more_seeds or f'over {MAX_SEEDS}'} more seeds" if each.verdict == "undecided" else ""
        interval = f"{each.low:+.4f} to {each.high:+.4f}"
        table.add_row(
            each.setting, f"{each.mean:.4f}", f"{each.difference:+.4f}", interval, str(each.num), each.verdict + more
        )
    terminal.print(table, soft_wrap=True)
    if any(each.verdict == "undecided" for each in found):
        log.info(f"more seeds: so many would show a difference of that size with a probability of {POWER:.0%}")
    output = Path(config.output) if config.output else folder / f"compare-{config.by}.json"
    with errors_for_key("output"):
        write_json(output, {"metric": metric, "by": config.by, "comparisons": [each._asdict() for each in found]})
        intervals = [Interval(each.setting, each.difference, each.low, each.high, each.verdict) for each in found]
        plot_intervals(intervals, config.by, metric, str(baseline), output.with_suffix(".png"))
    log.info(f"kept in {display_path(output)}, .png")


if __name__ == "__main__":
    main()
