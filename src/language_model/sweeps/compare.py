"""Is a difference between settings real? Confidence intervals over the seeds of a sweep, by Student's t."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from language_model.runs.config import ConfigError, did_you_mean
from language_model.sweeps.summary import Row

POWER = 0.8  # probability of detecting a difference of the observed size, for which seeds are counted
MAX_SEEDS = 1000  # no larger number of seeds is suggested


class Comparison(NamedTuple):
    """One setting against the baseline. Differences are setting minus baseline: below zero is better."""

    setting: str
    baseline: str
    num: int  # pairs, or values of the setting
    paired: bool
    mean: float  # of the setting
    difference: float  # of the means
    low: float  # the confidence interval of the difference
    high: float
    verdict: Literal["better", "worse", "undecided"]
    more_seeds: int | None  # further seeds that would decide it; None if decided, or more than MAX_SEEDS


def compare(
    setting: str, ours: Mapping[tuple, float], baseline: str, theirs: Mapping[tuple, float], confidence: float
) -> Comparison:
    """Compare the metric of a setting with that of the baseline.

    Args:
        setting, baseline: their names.
        ours, theirs: values of the metric, by the seed and the other settings that vary. If two or more keys are in
            both, their values are compared as pairs (Student's t); else all values as two samples (Welch's t).
        confidence: probability that the interval contains the true difference.

    Raises:
        ConfigError: there are fewer than two values on a side.
    """
    common = [key for key in ours if key in theirs]
    paired = len(common) > 1
    a = np.array([ours[key] for key in common] if paired else list(ours.values()))
    b = np.array([theirs[key] for key in common] if paired else list(theirs.values()))
    if min(len(a), len(b)) < 2:
        there = f"{len(a)} and {len(b)} values"
        raise ConfigError(
            f"{setting} against {baseline}: {there}; at least two seeds of each are needed, five are better"
        )
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
    more_seeds = None
    if verdict == "undecided" and difference:
        one = spread * math.sqrt(len(a))  # the deviation of a single pair, or of one value of each
        more_seeds = seeds_needed(abs(difference) / one, confidence, paired, len(a))
    return Comparison(setting, baseline, len(a), paired, float(a.mean()), difference, low, high, verdict, more_seeds)


def seeds_needed(effect: float, confidence: float, paired: bool, done: int) -> int | None:
    """Return how many more seeds would detect a difference with probability `POWER`; None if over `MAX_SEEDS`.

    Args:
        effect: the difference divided by the standard deviation of one pair's (or one value's on each side) difference.
        confidence: of the interval that must not contain zero.
        paired: whether a seed gives a pair, or an independent value on each side.
        done: number of seeds so far.
    """
    n = np.arange(done + 1, MAX_SEEDS + 1)
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

    The intervals are widened for their number (Bonferroni): where no setting differs, the probability that any of
    them is called better or worse is at most 1 − `confidence`.

    Args:
        rows: the jobs of a sweep.
        by: the key of the setting.
        baseline: its value to compare with; None for the first in the rows' order.
        confidence: probability that all intervals contain their true differences.

    Raises:
        ConfigError: `by` does not vary, the baseline does not exist, or there are too few values.
    """
    varied = list(rows[0].values) if rows else []
    if by not in varied:
        raise ConfigError(f"by={by}: does not vary in the sweep{did_you_mean(by, varied)}")
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
