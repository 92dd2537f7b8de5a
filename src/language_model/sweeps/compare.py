"""Is a difference between settings real? Confidence intervals over the seeds of a sweep, by Student's t."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from language_model.runs.config import ConfigError, did_you_mean
from language_model.runs.monitor import sign_of
from language_model.sweeps.summary import SEED, Row, format_setting, metrics

Verdict = Literal["better", "worse", "undecided"]

POWER = 0.8  # probability of detecting a difference of the observed size, for which seeds are counted
MAX_SEEDS = 1000  # no larger number of seeds is suggested
ROUNDING = 1e-12  # a spread below this share of the values is none: it is the rounding of the sums


class Comparison(NamedTuple):
    """One setting against the baseline. Differences are setting minus baseline."""

    setting: str
    baseline: str
    num: int  # pairs, or values of the setting
    paired: bool
    mean: float  # of the setting
    difference: float  # of the means
    low: float | None  # the confidence interval of the difference; None if the seeds do not differ
    high: float | None
    verdict: Verdict
    more_seeds: int | None  # further seeds that would decide it; None if decided, or more than MAX_SEEDS


class LeftOut(NamedTuple):
    """A job whose value is in no comparison."""

    setting: str
    job: str  # its seed and the other settings that vary
    reason: str


class Comparisons(NamedTuple):
    """All settings of a sweep against the baseline."""

    metric: str
    mode: str  # whether a lower (min) or a higher (max) value is better
    baseline: str
    mean: float  # of the baseline
    num: int  # values of the baseline
    averaged: dict[str, list[str]]  # settings that vary too, with their values: each seed's value is the mean over them
    comparisons: list[Comparison]
    left_out: list[LeftOut]


def compare(
    setting: str,
    ours: Mapping[str, float],
    baseline: str,
    theirs: Mapping[str, float],
    confidence: float,
    mode: str = "min",
) -> Comparison:
    """Compare the metric of a setting with that of the baseline.

    Args:
        setting, baseline: their names.
        ours, theirs: values of the metric, by the seed. If two or more seeds are in both, their values are compared as
            pairs (Student's t); else all values as two samples (Welch's t).
        confidence: probability that the interval contains the true difference.
        mode: whether a lower (min) or a higher (max) value is better.

    Raises:
        ConfigError: there are fewer than two values on a side.
    """
    common = [seed for seed in ours if seed in theirs]
    paired = len(common) > 1
    a = np.array([ours[seed] for seed in common] if paired else list(ours.values()))
    b = np.array([theirs[seed] for seed in common] if paired else list(theirs.values()))
    if min(len(a), len(b)) < 2:
        there = f"{len(a)} and {len(b)} values"
        raise ConfigError(
            f"{setting} against {baseline}: {there}; at least two seeds of each are needed, five are better"
        )
    mean, difference = float(a.mean()), float(a.mean() - b.mean())
    spread, degrees = standard_error(a, b, paired)
    if spread <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()):  # nothing to tell chance from effect by
        return Comparison(setting, baseline, len(a), paired, mean, difference, None, None, "undecided", None)
    reach = float(stats.t.ppf((1 + confidence) / 2, degrees)) * spread
    low, high = difference - reach, difference + reach
    verdict: Verdict = "undecided"
    more_seeds = None
    if low > 0 or high < 0:
        verdict = "better" if sign_of(mode) * difference < 0 else "worse"
    elif difference:
        one = spread * math.sqrt(len(a))  # the deviation of a single pair, or of one value of each
        more_seeds = seeds_needed(abs(difference) / one, confidence, paired, len(a))
    return Comparison(setting, baseline, len(a), paired, mean, difference, low, high, verdict, more_seeds)


def standard_error(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[float, float]:
    """Return the standard error of the difference of two samples' means, and its degrees of freedom.

    Student's for pairs, Welch's (with the Welch-Satterthwaite approximation) for two independent samples.
    """
    if paired:
        return float(np.std(a - b, ddof=1)) / math.sqrt(len(a)), len(a) - 1.0
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    squares = parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)
    return math.sqrt(sum(parts)), sum(parts) ** 2 / squares if squares else len(a) + len(b) - 2.0


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
) -> Comparisons:
    """Compare the final metric of every value of a setting with the baseline's.

    Each seed gives one value: where other settings vary too, the mean over all their combinations. So only seeds are
    counted as repetitions, and a seed that lacks a combination is left out.

    The intervals are widened for their number (Bonferroni): where no setting differs, the probability that any of
    them is called better or worse is at most 1 − `confidence`.

    Args:
        rows: the jobs of a sweep.
        by: the key of the setting.
        baseline: its value to compare with; None for the first in the rows' order.
        confidence: probability that all intervals contain their true differences.

    Raises:
        ConfigError: `by` does not vary, the baseline does not exist, there are too few values, or several metrics.
    """
    names = check_comparable(rows, by, baseline)
    baseline = names[0] if baseline is None else baseline
    values, left_out = values_by_seed(rows, by)
    others = [name for name in names if name != baseline]
    compared = [name for name in others if min(len(values[name]), len(values[baseline])) > 1] or others
    also = {key: sorted({row.values[key] for row in rows}) for key in rows[0].values if key not in (by, SEED)}
    if also and min(len(values[baseline]), len(values[compared[0]])) < 2:
        raise ConfigError(
            f"by={by}: varies together with {', '.join(also)}, and fewer than two seeds have every combination; "
            f"type a sweep over {by} and seed=1,2,3,4,5 alone, or a grid that holds all combinations"
        )
    each = 1 - (1 - confidence) / len(compared)
    mode = next(row.mode for row in rows if row.metric)
    found = [compare(name, values[name], baseline, values[baseline], each, mode) for name in compared]
    for name in (name for name in others if name not in compared):
        left_out += [LeftOut(name, f"{SEED}={seed}", "finished, but alone") for seed in values[name]]
    for one in (one for one in found if one.paired):
        for name, other in ((one.setting, baseline), (baseline, one.setting)):
            alone = sorted(values[name].keys() - values[other].keys())
            left_out += [LeftOut(name, f"{SEED}={seed}", f"finished, but not in {other}") for seed in alone]
    mean = statistics.fmean(values[baseline].values())
    return Comparisons(metrics(rows)[0], mode, baseline, mean, len(values[baseline]), also, found, left_out)


def check_comparable(rows: Sequence[Row], by: str, baseline: str | None) -> list[str]:
    """Return the values of a setting; ConfigError if it or the metric cannot be compared."""
    varied = [key for key in rows[0].values if key != SEED] if rows else []
    if by not in varied:
        raise ConfigError(f"by={by}: does not vary in the sweep{did_you_mean(by, varied)}")
    if len(metrics(rows)) != 1:
        found = " and ".join(metrics(rows)) or "none"
        raise ConfigError(f"by={by}: the jobs need one metric to compare, and monitor {found}; set monitor")
    names = list(dict.fromkeys(row.values[by] for row in rows))
    if baseline is not None and baseline not in names:
        raise ConfigError(f"baseline={baseline}: {by} has no such value; choose from {', '.join(names)}")
    return names


def values_by_seed(rows: Sequence[Row], by: str) -> tuple[dict[str, dict[str, float]], list[LeftOut]]:
    """Return each setting's value of each seed, and the jobs that no value is from, with the reasons.

    A value is the mean over all combinations of the other settings that vary.
    """
    found: dict[tuple[str, str], dict[tuple[str, ...], Row]] = {}
    for row in rows:
        rest = tuple(value for key, value in row.values.items() if key not in (by, SEED))
        found.setdefault((row.values[by], row.values.get(SEED, "")), {})[rest] = row
    combinations = {rest for jobs in found.values() for rest in jobs}
    values: dict[str, dict[str, float]] = {row.values[by]: {} for row in rows}
    left_out = []
    for (setting, seed), jobs in found.items():
        done = {rest: row.value for rest, row in jobs.items() if row.status == "finished" and row.value is not None}
        if done.keys() == combinations:
            values[setting][seed] = statistics.fmean(value for value in done.values() if value is not None)
            continue
        for rest, row in jobs.items():
            job = format_setting({key: value for key, value in row.values.items() if key != by})
            why = row.status if row.status != "finished" else "not a finite number"
            left_out.append(
                LeftOut(setting, job, "finished, but others of its seed are missing" if rest in done else why)
            )
    return values, left_out
