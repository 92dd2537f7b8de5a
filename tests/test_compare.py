import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from language_model.runs.config import ConfigError
from language_model.sweeps.compare import compare, compare_settings, seeds_needed
from language_model.sweeps.summary import Row


def rows(by: dict[str, dict[int, float]], key: str = "model.position") -> list[Row]:
    """A sweep's rows: of each setting, the metric by seed."""
    return [
        Row(Path(f"{name},{seed}"), [], {key: name, "seed": str(seed)}, "finished", None, "val/loss", value, {})
        for name, values in by.items()
        for seed, value in values.items()
    ]


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
    (found,) = compare_settings(rows({"learned": baseline, "rotary": ours}), "model.position")
    assert (found.setting, found.baseline, found.verdict) == ("rotary", "learned", verdict)
    assert (found.more_seeds is None) == (verdict != "undecided") or found.more_seeds is None


def test_pairing_sees_what_two_samples_do_not() -> None:
    """The seeds differ by much, the settings by little, and always the same way."""
    baseline = {seed: float(seed) for seed in range(5)}
    (found,) = compare_settings(
        rows({"a": baseline, "b": {s: v - 0.1 - 0.01 * s for s, v in baseline.items()}}), "model.position"
    )
    assert found.verdict == "better"
    (found,) = compare_settings(
        rows({"a": baseline, "b": {s + 9: v - 0.1 for s, v in baseline.items()}}), "model.position"
    )
    assert not found.paired
    assert found.verdict == "undecided"


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Four settings that do not differ, five seeds: some verdict in at most 5 % of the sweeps."""
    draw = np.random.default_rng(2)
    alarms = 0
    for _ in range(800):
        by = {name: dict(enumerate(draw.normal(1.5, 0.02, 5))) for name in "abcd"}
        alarms += any(found.verdict != "undecided" for found in compare_settings(rows(by), "model.position"))
    assert 0.025 < alarms / 800 < 0.065


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
        ({"a": {0: 1.0, 1: 1.1}}, {}, "by=model.position: does not vary in the sweep; known: seed"),
        ({"a": {0: 1.0, 1: 1.1}, "b": {0: 1.0}}, {"baseline": "c"}, "baseline=c: .*no such value; choose from a, b"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(by: dict, options: dict, found: str) -> None:
    made = rows(by)
    if len(by) == 1:
        made = [row._replace(values={"seed": row.values["seed"]}) for row in made]
    with pytest.raises(ConfigError, match=found):
        compare_settings(made, "model.position", **options)


def test_jobs_that_failed_are_left_out() -> None:
    made = rows({"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 2.0, 1: 2.1, 2: 2.3}})
    made[5] = made[5]._replace(status="failed")
    (found,) = compare_settings(made, "model.position")
    assert found.num == 2


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
            (job / "result.json").write_text(json.dumps({"status": "finished", "monitor": "val/loss", "best": value}))
    asked = {"model.position": ["learned", "rotary", "none"], "seed": ["0", "1", "2"]}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"asked": asked}))
    return tmp_path / "sweep"


def script(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    import runpy

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["compare.py", *overrides])
    runpy.run_path(str(ROOT / "scripts" / "compare.py"), run_name="__main__")


def test_the_script(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script(monkeypatch, f"sweep={sweep}", "by=model.position")
    said = capsys.readouterr().out
    assert "model.position against learned, pairs of the same seed" in said
    assert "95% interval, 2 intervals together" in said
    assert [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")] == ["rotary", "none"]
    kept = json.loads((sweep / "compare-model.position.json").read_text())
    assert kept["comparisons"][0]["verdict"] == "better"
    assert kept["comparisons"][1]["verdict"] == "undecided"
    assert math.isclose(kept["comparisons"][0]["difference"], -0.32)
    assert (sweep / "compare-model.position.png").read_bytes().startswith(b"\x89PNG")
    script(monkeypatch, f"sweep={sweep}", "by=model.position", "baseline=rotary")
    assert "against rotary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["sweep=nowhere", "by=seed"], "sweep=nowhere: there is no such sweep"),
        (["by=seed"], "sweep: a value is needed"),
        (["by=model.positon"], "by=model.positon: does not vary in the sweep; did you mean model.position?"),
        (["by=model.position", "confidence=2"], "confidence=2: input should be less than 1"),
        (["by=model.position", "baseline=sinus"], "baseline=sinus: model.position has no such value"),
        (["by=model.position", "output=/nowhere/x.json"], "output: /nowhere/x.json"),
    ],
)
def test_the_script_refuses(sweep: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], found: str) -> None:
    if found != "sweep: a value is needed" and not overrides[0].startswith("sweep="):
        overrides = [f"sweep={sweep}", *overrides]
    with pytest.raises(SystemExit) as stopped:
        script(monkeypatch, *overrides)
    assert found in str(stopped.value)
    assert "\n" not in str(stopped.value)
