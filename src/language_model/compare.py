"""Is a difference real? Settings of a sweep compared over its seeds, by Student's t."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from language_model.config import ConfigError, near
from language_model.summary import Row

POWER = 0.8  # the chance to see a difference of the size observed, that the number of seeds is worked out for
MOST = 1000  # seeds that are worth naming


class Comparison(NamedTuple):
    """One setting against the baseline; differences are setting minus baseline, so less than zero is better."""

    setting: str
    baseline: str
    num: int  # pairs, or values of the setting
    paired: bool
    mean: float  # of the setting
    difference: float  # of the means
    low: float  # the interval that the true difference is in
    high: float
    verdict: Literal["better", "worse", "undecided"]
    further: int | None  # seeds that would decide it; None if it is decided, or would take more than MOST


def compare(
    setting: str, ours: Mapping[tuple, float], baseline: str, theirs: Mapping[tuple, float], confidence: float
) -> Comparison:
    """Compare the metric of a setting with that of the baseline.

    Args:
        setting, baseline: their names.
        ours, theirs: values of the metric, by what else they were made with: the seed, and other settings. Where two
            or more are in both, those are compared as pairs (Student's t); else all of them as two samples (Welch's).
        confidence: that the interval holds the true difference.

    Raises:
        ConfigError: there are fewer than two values on a side.
    """
    common = [key for key in ours if key in theirs]
    paired = len(common) > 1
    a = np.array([ours[key] for key in common] if paired else list(ours.values()))
    b = np.array([theirs[key] for key in common] if paired else list(theirs.values()))
    if min(len(a), len(b)) < 2:
        there = f"{len(a)} and {len(b)} values"
        raise ConfigError(f"{setting} against {baseline}: {there}; two seeds of each are the least, five are better")
    difference = float(a.mean() - b.mean())
    if paired:
        spread, degrees = float(np.std(a - b, ddof=1)) / math.sqrt(len(a)), len(a) - 1.0
    else:
        parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        spread = math.sqrt(sum(parts))
        squares = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
        degrees = sum(parts) ** 2 / squares if squares else len(a) + len(b) - 2.0
    reach = float(stats.t.ppf((1 + confidence) / 2, degrees)) * spread
    low, high = difference - reach, difference + reach
    verdict: Literal["better", "worse", "undecided"] = "better" if high < 0 else "worse" if low > 0 else "undecided"
    further = None
    if verdict == "undecided" and difference:
        one = spread * math.sqrt(len(a))  # the deviation that one more pair, or one more of each, would have
        further = seeds_needed(abs(difference) / one, confidence, paired, len(a))
    return Comparison(setting, baseline, len(a), paired, float(a.mean()), difference, low, high, verdict, further)


def seeds_needed(effect: float, confidence: float, paired: bool, done: int) -> int | None:
    """Return how many more seeds would show a difference with a probability of `POWER`; None if more than `MOST`.

    Args:
        effect: the difference over the deviation of one pair's (or of one of each side's) difference.
        confidence: of the interval that shall not hold zero.
        paired: whether a seed gives a pair; else it gives a value on each side.
        done: seeds there are.
    """
    n = np.arange(done + 1, MOST + 1)
    degrees = (n - 1.0) * (1 if paired else 2)
    reach = stats.t.ppf((1 + confidence) / 2, degrees)
    enough = (
        stats.nct.sf(reach, degrees, effect * np.sqrt(n)) >= POWER
    )  # the noncentral t: Student's around a difference
    return int(n[np.argmax(enough)]) - done if enough.any() else None


def compare_settings(
    rows: Sequence[Row], by: str, baseline: str | None = None, confidence: float = 0.95
) -> list[Comparison]:
    """Compare every value of a setting with the baseline's.

    The intervals are widened for their number (Bonferroni), so that where no setting differs, the chance that any of
    them is called better or worse is at most 1 − `confidence`.

    Args:
        rows: the jobs of a sweep.
        by: the key of the setting.
        baseline: its value to compare with; None for the first one in the rows' order.
        confidence: that all intervals hold their true differences.

    Raises:
        ConfigError: `by` does not vary, there is no such `baseline`, or there are too few values.
    """
    varied = list(rows[0].values) if rows else []
    if by not in varied:
        raise ConfigError(f"by={by}: this does not vary in the sweep{near(by, varied)}")
    found: dict[str, dict[tuple, float]] = {}
    for row in rows:
        rest = tuple(value for key, value in row.values.items() if key != by)
        values = found.setdefault(row.values[by], {})
        if row.status == "finished" and row.value is not None:
            values[rest] = row.value
    names = list(found)
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ConfigError(f"baseline={baseline}: {by} has no such value; choose from {', '.join(names)}")
    others = [name for name in names if name != baseline]
    each = 1 - (1 - confidence) / len(others)
    return [compare(name, found[name], baseline, found[baseline], each) for name in others]
