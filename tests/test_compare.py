"""Comparisons over seeds: the intervals, what is compared with what, and how often a verdict is wrong."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ACCURACY, Jobs, Sweep, run_script
from scipy import stats

from language_model.runs.config import ConfigError
from language_model.sweeps import summary
from language_model.sweeps.compare import Comparison, compare, compare_settings, seeds_needed
from language_model.sweeps.summary import Row

KEY = "model.position"
FINISHED = {"status": "finished", "uniform_baseline": 4.0, "seconds": 1.0, "steps": 10, "epochs": 1}


def row(values: dict[str, str], value: float | None, status: str = "finished", **result: Any) -> Row:
    return Row(Path(",".join(values.values())), [], values, status, None, "val/loss", value, result)


def rows(by: dict[str, dict[int, float]]) -> list[Row]:
    """A sweep's rows: of each setting, the metric by seed."""
    return [row({KEY: name, "seed": str(seed)}, value) for name, values in by.items() for seed, value in values.items()]


def only(made: list[Row], **options: Any) -> Comparison:
    (found,) = compare_settings(made, KEY, **options).comparisons
    return found


def test_pairs_are_compared_as_scipy_does() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(1.5, 0.1, 6), draw.normal(1.6, 0.1, 6)
    found = compare("a", dict(enumerate(a)), "b", dict(enumerate(b)), confidence=0.9)
    oracle = stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.9)
    assert found.paired
    assert (found.num, found.mean) == (6, pytest.approx(a.mean()))
    assert (found.low, found.difference, found.high) == pytest.approx((low, a.mean() - b.mean(), high))
    assert (found.verdict == "undecided") == (oracle.pvalue > 0.1)


def test_two_samples_are_compared_as_scipy_does() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(1.5, 0.1, 5), draw.normal(1.6, 0.3, 9)
    found = compare("a", {("a", i): v for i, v in enumerate(a)}, "b", {("b", i): v for i, v in enumerate(b)}, 0.95)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert not found.paired
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(("shift", "verdict"), [(-0.5, "better"), (0.5, "worse"), (0.0, "undecided")])
def test_less_is_better(shift: float, verdict: str) -> None:
    baseline = {seed: 1.5 + 0.01 * seed for seed in range(5)}
    wobble = (0.01, -0.01, 0.02, -0.02, 0.001)
    ours = {seed: value + shift + wobble[seed] for seed, value in baseline.items()}
    found = only(rows({"learned": baseline, "rotary": ours}))
    assert (found.setting, found.baseline, found.verdict) == ("rotary", "learned", verdict)
    assert (found.more_seeds is None) == (verdict != "undecided") or found.more_seeds is None


def test_pairing_sees_what_two_samples_do_not() -> None:
    """The seeds differ by much, the settings by little, and always the same way."""
    baseline = {seed: float(seed) for seed in range(5)}
    found = only(rows({"a": baseline, "b": {s: v - 0.1 - 0.01 * s for s, v in baseline.items()}}))
    assert found.verdict == "better"
    found = only(rows({"a": baseline, "b": {s + 9: v - 0.1 for s, v in baseline.items()}}))
    assert not found.paired
    assert found.verdict == "undecided"


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Four settings that do not differ, five seeds: some verdict in at most 5 % of the sweeps."""
    draw = np.random.default_rng(2)
    alarms = 0
    for _ in range(800):
        by = {name: dict(enumerate(draw.normal(1.5, 0.02, 5))) for name in "abcd"}
        alarms += has_verdict(rows(by))
    assert 0.025 < alarms / 800 < 0.065


def has_verdict(made: list[Row]) -> bool:
    return any(found.verdict != "undecided" for found in compare_settings(made, KEY).comparisons)


def simulated_sweep(place: Path, draw: np.random.Generator, noise: dict[str, float], seeds: range) -> list[Row]:
    """Return the rows of a sweep whose runs leave the files of real ones, by curves that end alike on average.

    Settings "few" and "many" validate 5 and 50 times. A seed moves all its curves by the same amount; `noise` is the
    standard deviation of a single validation.
    """
    for seed in seeds:
        level = draw.normal(1.5, 0.02)
        for setting, deviation in noise.items():
            falling = np.geomspace(1.0, 1e-3, 50 if setting == "many" else 5)
            curve = level + falling + draw.normal(0.0, deviation, len(falling))
            folder = place / f"{setting},{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            values = {KEY: setting, "seed": str(seed)}
            (folder / "job.json").write_text(json.dumps({"overrides": [], "values": values, "error": None}))
            result = FINISHED | {"monitor": "val/loss", "monitor_mode": "min", "best": curve.min()}
            result["metrics"] = {"val/loss": curve[-1]}
            (folder / "result.json").write_text(json.dumps(result))
    return summary.read(place)


CASES: dict[str, dict[str, float]] = {
    "5 against 50 validations": {"few": 0.02, "many": 0.02},
    "quiet against noisy": {"few": 0.01, "noisy": 0.1},
    "all at once": {"few": 0.01, "many": 0.03, "noisy": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_curves_that_end_alike_get_no_verdict(tmp_path: Path, case: str) -> None:
    """The best of a run's validations is lower the more there are and the noisier they are; the last is not."""
    draw = np.random.default_rng(4)
    sweeps = 40
    alarms = sum(has_verdict(simulated_sweep(tmp_path, draw, CASES[case], range(5))) for _ in range(sweeps))
    assert alarms / sweeps < 0.16  # three standard deviations above 5 %


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [2, 5])
@pytest.mark.parametrize("case", CASES)
def test_curves_that_end_alike_rarely_get_a_verdict(tmp_path: Path, case: str, num_seeds: int) -> None:
    draw = np.random.default_rng(5)
    sweeps = 600
    alarms = sum(has_verdict(simulated_sweep(tmp_path, draw, CASES[case], range(num_seeds))) for _ in range(sweeps))
    assert alarms / sweeps < 0.08  # three standard deviations above 5 %


def test_a_true_difference_is_found_at_the_end_of_the_curves() -> None:
    """Where the best values say the opposite."""
    finals = {"a": {s: 1.5 + 0.01 * s for s in range(5)}, "b": {s: 1.4 + 0.011 * s for s in range(5)}}
    made = [each._replace(result={"best": 3.0 - (each.value or 0.0)}) for each in rows(finals)]
    assert only(made).verdict == "better"


def test_where_higher_is_better_the_verdicts_are_the_other_way() -> None:
    made = [
        each._replace(result={"monitor_mode": "max"})
        for each in rows({"a": {0: 0.1, 1: 0.2, 2: 0.3}, "b": {0: 0.5, 1: 0.61, 2: 0.7}})
    ]
    assert (only(made).verdict, only(made, baseline="b").verdict) == ("better", "worse")


@pytest.mark.parametrize("shift", [0.1, 0.0, 1 / 3])
@pytest.mark.parametrize("num", [2, 5])
def test_seeds_that_all_differ_by_the_same_decide_nothing(shift: float, num: int) -> None:
    baseline = {seed: 1.5 + 0.1 * seed for seed in range(num)}
    found = only(rows({"a": baseline, "b": {seed: value + shift for seed, value in baseline.items()}}))
    assert (found.verdict, found.low, found.high, found.more_seeds) == ("undecided", None, None, None)


def grid(value: Any) -> list[Row]:
    """The rows of a grid over position, rate and seed; `value` makes the metric from them, None: it failed."""
    made = []
    for position in ("learned", "rotary"):
        for rate in ("0.1", "0.2"):
            for seed in range(3):
                number = value(position, rate, seed)
                status = "failed" if number is None else "finished"
                made.append(row({KEY: position, "optimizer.lr": rate, "seed": str(seed)}, number, status))
    return made


def test_only_seeds_are_repetitions() -> None:
    """Each seed's value is the mean over the other settings: two rates of three seeds are three pairs, not six."""
    made = grid(lambda position, rate, seed: seed + 10 * float(rate) - (1 + 0.1 * seed) * (position == "rotary"))
    found = compare_settings(made, KEY)
    assert found.averaged == {"optimizer.lr": ["0.1", "0.2"]}
    alone = only(
        rows({p: {s: s + 1.5 - (1 + 0.1 * s) * (p == "rotary") for s in range(3)} for p in ("learned", "rotary")})
    )
    assert found.comparisons[0]._asdict() == pytest.approx(alone._asdict())
    assert (found.num, found.comparisons[0].num) == (3, 3)


def test_a_seed_that_lacks_a_combination_is_left_out() -> None:
    made = grid(
        lambda p, rate, seed: None if (p, rate, seed) == ("rotary", "0.2", 1) else seed * (2 if p == "rotary" else 1)
    )
    found = compare_settings(made, KEY)
    assert found.comparisons[0].num == 2
    assert [tuple(left) for left in found.left_out] == [
        ("rotary", "optimizer.lr=0.1, seed=1", "finished, but others of its seed are missing"),
        ("rotary", "optimizer.lr=0.2, seed=1", "failed"),
        ("learned", "seed=1", "finished, but not in rotary"),
    ]


def test_trials_of_a_search_are_no_repetitions() -> None:
    made = [row({"trial": str(n), KEY: "ab"[n % 2], "optimizer.lr": str(n)}, float(n)) for n in range(8)]
    with pytest.raises(
        ConfigError, match=r"by=model.position: varies together with trial, optimizer.lr, .*; type a sweep"
    ):
        compare_settings(made, KEY)


def test_what_is_left_out_is_named() -> None:
    made = rows({name: dict.fromkeys(range(4), 1.0) for name in "abc"})
    made = [each._replace(value=number * number / 7) for number, each in enumerate(made)]
    made[5] = made[5]._replace(status="failed")
    made[6] = made[6]._replace(status="pruned")
    made[7] = made[7]._replace(value=None)
    made[11] = made[11]._replace(values={KEY: "c", "seed": "9"})
    found = compare_settings(made, KEY)
    assert sorted(tuple(left) for left in found.left_out) == [
        ("a", "seed=3", "finished, but not in c"),
        ("b", "seed=0", "finished, but alone"),
        ("b", "seed=1", "failed"),
        ("b", "seed=2", "pruned"),
        ("b", "seed=3", "not a finite number"),
        ("c", "seed=9", "finished, but not in a"),
    ]
    assert [each.setting for each in found.comparisons] == ["c"]  # b has one value


def test_jobs_of_several_metrics_are_not_compared() -> None:
    made = rows({"a": {0: 1.0, 1: 1.1}, "b": {0: 1.0, 1: 1.2}})
    made[0] = made[0]._replace(metric="train/loss_epoch")
    with pytest.raises(ConfigError, match="need one metric to compare, and monitor train/loss_epoch and val/loss"):
        compare_settings(made, KEY)


def test_the_seeds_asked_for_decide_as_often_as_promised() -> None:
    draw = np.random.default_rng(3)
    effect = 0.4
    number = 5 + seeds_needed(effect, 0.95, paired=True, done=5)
    differences = draw.normal(effect, 1.0, (4000, number))
    seen = stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.03)
    assert seeds_needed(1e-6, 0.95, paired=True, done=5) is None
    assert seeds_needed(0.4, 0.95, paired=False, done=5) < number


@pytest.mark.parametrize(
    ("by", "options", "found"),
    [
        ({"a": {0: 1.0, 1: 1.1}, "b": {0: 1.0}}, {}, "b against a: 1 and 2 values; at least two seeds of each"),
        ({"a": {0: 1.0, 1: 1.1}}, {}, "by=model.position: does not vary in the sweep"),
        ({"a": {0: 1.0, 1: 1.1}, "b": {0: 1.0}}, {"baseline": "c"}, "baseline=c: .*no such value; choose from a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(by: dict, options: dict, found: str) -> None:
    made = rows(by)
    if len(by) == 1:
        made = [each._replace(values={"seed": each.values["seed"]}) for each in made]
    with pytest.raises(ConfigError, match=found):
        compare_settings(made, "model.position", **options)


def test_jobs_that_failed_are_left_out() -> None:
    made = rows({"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 2.0, 1: 2.1, 2: 2.3}})
    made[5] = made[5]._replace(status="failed")
    assert only(made).num == 2


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep's folder, made by hand: three positions, three seeds."""
    for p, position in enumerate(("learned", "rotary", "none")):
        for seed in range(3):
            job = tmp_path / "sweep" / f"model.position={position},seed={seed}"
            job.mkdir(parents=True)
            facts = {"overrides": [], "values": {"model.position": position, "seed": str(seed)}, "error": None}
            (job / "job.json").write_text(json.dumps(facts))
            value = 1.5 + (0.0, -0.3, 0.001)[p] + 0.01 * seed * (1, -1, 2)[p] - 0.01 * (p == 2)
            result = FINISHED | {"monitor": "val/loss", "best": 0.0, "metrics": {"val/loss": value}}
            (job / "result.json").write_text(json.dumps(result))
    asked = {"model.position": ["learned", "rotary", "none"], "seed": ["0", "1", "2"]}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"asked": asked}))
    return tmp_path / "sweep"


@pytest.mark.parametrize(("typed", "shown"), [("null", "None"), ("[0.9,0.95]", "[0.9, 0.95]")])
def test_the_baseline_is_the_first_value_typed(
    sweep: Path, capsys: pytest.CaptureFixture, typed: str, shown: str
) -> None:
    """Which the rows do not hold as it was typed."""
    for file in sweep.glob("*learned*/job.json"):
        job = json.loads(file.read_text())
        job |= {"overrides": [f"model.position={typed}"], "values": job["values"] | {"model.position": shown}}
        file.write_text(json.dumps(job))
    asked = {"model.position": [typed, "rotary", "none"], "seed": ["0", "1", "2"]}
    (sweep / "sweep.json").write_text(json.dumps({"asked": asked}))
    run_script("compare.py", f"sweep={sweep}", "by=model.position")
    assert f"against {shown}" in capsys.readouterr().out


def test_seeds_of_the_baseline_alone_are_left_out_and_named() -> None:
    baseline = {seed: 1.0 + seed for seed in range(5)}
    found = compare_settings(rows({"a": baseline, "b": {seed: baseline[seed] + 0.1 for seed in range(3)}}), KEY, "a")
    assert [(each.setting, each.job) for each in found.left_out] == [("a", "seed=3"), ("a", "seed=4")]


def test_the_script(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    run_script("compare.py", f"sweep={sweep}", "by=model.position")
    said = capsys.readouterr().out
    assert "val/loss of the final weights (lower is better) in " in said
    assert "model.position against learned, pairs of the same seed" in said
    assert "95% interval, 2 intervals together" in said
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert [line[0] for line in lines] == ["learned", "rotary", "none"]
    assert lines[0] == ["learned", "1.5100", "", "", "3", "the baseline"]
    assert "left out" not in said
    kept = json.loads((sweep / "compare-model.position.json").read_text())
    assert kept["comparisons"][0]["verdict"] == "better"
    assert kept["comparisons"][1]["verdict"] == "undecided"
    assert math.isclose(kept["comparisons"][0]["difference"], -0.32)
    assert (sweep / "compare-model.position.png").read_bytes().startswith(b"\x89PNG")
    assert (kept["metric"], kept["value"], kept["mode"]) == ("val/loss", "val/loss of the final weights", "min")
    assert (kept["baseline"], kept["num"], kept["mean"]) == ("learned", 3, pytest.approx(1.51))
    run_script("compare.py", f"sweep={sweep}", "by=model.position", "baseline=rotary")
    assert "against rotary" in capsys.readouterr().out


def test_the_script_names_what_it_leaves_out(sweep: Path, capsys: pytest.CaptureFixture) -> None:
    failed, constant = sweep / "model.position=rotary,seed=1", sweep / "model.position=none,seed=0" / "result.json"
    job = json.loads((failed / "job.json").read_text())
    (failed / "job.json").write_text(json.dumps(job | {"error": "out of memory"}))
    constant.unlink()
    for seed in (1, 2):  # none is worse than learned by exactly 0.5
        learned = json.loads((sweep / f"model.position=learned,seed={seed}" / "result.json").read_text())
        learned["metrics"]["val/loss"] += 0.5
        (sweep / f"model.position=none,seed={seed}" / "result.json").write_text(json.dumps(learned))
    run_script("compare.py", f"sweep={sweep}", "by=model.position")
    said = capsys.readouterr().out
    assert "warning: left out: 1 of model.position=rotary: seed=1 failed\n" in said
    assert "warning: left out: 1 of model.position=none: seed=0 not finished\n" in said
    assert "undecided; every seed has the same difference" in said
    kept = json.loads((sweep / "compare-model.position.json").read_text())
    assert {"setting": "rotary", "job": "seed=1", "reason": "failed"} in kept["left_out"]
    assert kept["comparisons"][1]["low"] is None


@pytest.mark.slow
def test_a_sweep_of_a_metric_where_higher_is_better(
    multirun: Sweep, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The summary, its command and the comparison; the best values of the runs say the opposite."""
    jobs.outcome = lambda config: config.optimizer.lr * (10 + 0.1 * config.seed)
    jobs.best = lambda config: 1 - config.optimizer.lr
    said = multirun("optimizer.lr=0.01,0.03,0.02", "seed=1,2", *ACCURACY)
    assert "train/accuracy at the end of the run" in said
    page = (tmp_path / "sweep" / "summary.md").read_text()
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| 0.")] == [
        "| 0.03",
        "| 0.02",
        "| 0.01",
    ]
    (best,) = (line for line in said.splitlines() if line.startswith("best "))
    assert "optimizer.lr=0.03 seed=2" in best
    run_script("compare.py", f"sweep={tmp_path / 'sweep'}", "by=optimizer.lr", "confidence=0.5")
    said = capsys.readouterr().out
    assert "(higher is better)" in said
    assert [line.split("│")[-2].strip() for line in said.splitlines() if line.startswith("│")][1:] == [
        "better",
        "better",
    ]


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["sweep=nowhere", "by=seed"], "sweep=nowhere: there is no such sweep"),
        (["by=seed"], "sweep: a value is needed"),
        (["by=model.positon"], "by=model.positon: does not vary in the sweep; did you mean model.position?"),
        (["by=seed"], "by=seed: does not vary in the sweep"),
        (["by=model.position", "confidence=2"], "confidence=2: input should be less than 1"),
        (["by=model.position", "baseline=sinus"], "baseline=sinus: model.position has no such value"),
        (["by=model.position", "output=missing/x.json"], "output: missing/x.json"),
    ],
)
def test_the_script_refuses(sweep: Path, overrides: list[str], found: str) -> None:
    if found != "sweep: a value is needed" and not overrides[0].startswith("sweep="):
        overrides = [f"sweep={sweep}", *overrides]
    with pytest.raises(SystemExit) as stopped:
        run_script("compare.py", *overrides)
    assert found in str(stopped.value)
    assert "\n" not in str(stopped.value)
