"""Is a difference between the settings of a sweep real? A confidence interval and a verdict for each.

`python scripts/compare.py sweep=my_sweep by=model.position`; `--help` shows all that can be set.
"""

import json
from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field
from rich.table import Table

from language_model import plots, summary
from language_model.compare import MOST, POWER, compare_settings
from language_model.config import ConfigError, blamed_on, check_values, entry_point, near, plain
from language_model.run import SWEEPS, save_json, shown
from language_model.terminal import log, speak, terminal

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
    plain(config)  # says what is missing
    check_values(config, KEYS)
    speak()
    folder = next(
        (f for f in (Path(str(config.sweep)), SWEEPS / str(config.sweep)) if (f / "sweep.json").is_file()), None
    )
    if folder is None:
        names = [file.parent.name for file in SWEEPS.glob("*/sweep.json")]
        raise ConfigError(f"sweep={config.sweep}: there is no such sweep{near(str(config.sweep), names)}")
    rows = summary.read(folder)
    asked = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["asked"]
    first = next(iter(asked.get(config.by, [])), None)
    baseline = first if config.baseline is None else str(config.baseline)
    found = compare_settings(rows, config.by, baseline, config.confidence)

    metric = next((row.metric for row in rows if row.metric), "metric")
    how = "pairs of the same seed" if all(each.paired for each in found) else "two samples each"
    widened = f", {len(found)} intervals together" if len(found) > 1 else ""
    log.info(f"{metric} in {shown(folder)}: {config.by} against {baseline}, {how}")
    table = Table(config.by, "mean", "difference", f"{config.confidence:.0%} interval{widened}", "n", "verdict")
    for each in found:
        more = f"; {each.further or f'over {MOST}'} more seeds" if each.verdict == "undecided" else ""
        interval = f"{each.low:+.4f} to {each.high:+.4f}"
        table.add_row(
            each.setting, f"{each.mean:.4f}", f"{each.difference:+.4f}", interval, str(each.num), each.verdict + more
        )
    terminal.print(table, soft_wrap=True)
    if any(each.verdict == "undecided" for each in found):
        log.info(f"more seeds: so many would show a difference of that size with a probability of {POWER:.0%}")
    output = Path(config.output) if config.output else folder / f"compare-{config.by}.json"
    with blamed_on("output"):
        save_json(output, {"metric": metric, "by": config.by, "comparisons": [each._asdict() for each in found]})
        plots.comparison(found, config.by, metric, output.with_suffix(".png"))
    log.info(f"kept in {shown(output)}, .png")


if __name__ == "__main__":
    main()
