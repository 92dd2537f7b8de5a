import json
import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from language_model import files
from language_model.runs import folder as run
from language_model.runs.config import ConfigError


@given(overrides=st.lists(st.text(max_size=300), max_size=8))
def test_folder_names_are_safe_bounded_and_all_different(overrides: list[str]) -> None:
    names = {override: run.safe_folder_name(override) for override in overrides}
    assert len(set(names.values())) == len(names)
    for name in names.values():
        assert re.fullmatch(r"[\w.=,+-]{1,140}", name)


def test_the_latest_run_among_jobs_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "SWEEPS", tmp_path / "sweeps")
    for sweep, time in (("a", 100), ("b", 300), ("c", 200)):
        file = tmp_path / "sweeps" / sweep / "seed=1" / "config.yaml"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time, time))
    assert run.find_run("run", "latest").parent.name == "b"


def test_plain_overrides_are_their_own_folder_name() -> None:
    assert run.safe_folder_name("optimizer.lr=1e-2,seed=1") == "optimizer.lr=1e-2,seed=1"
    assert run.safe_folder_name("") == "defaults"
    long = [run.safe_folder_name("data.path=" + "x" * 500 + end) for end in ("a", "b")]
    assert max(map(len, long)) < 140
    assert long[0] != long[1]


def test_a_result_is_written_whole_and_as_plain_json(tmp_path: Path) -> None:
    files.write_json(
        tmp_path / "result.json", {"best": math.nan, "steps": 3, "metrics": {"val/loss": math.inf, "lr": 0.1}}
    )
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result == {"best": None, "steps": 3, "metrics": {"val/loss": None, "lr": 0.1}}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_commit_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run.package_versions()
    assert found["lightning"]
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_commit"])
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.package_versions()["git_commit"] is None


def test_finding_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "SWEEPS", tmp_path / "sweeps")
    with pytest.raises(ConfigError, match="run=latest: no such run"):
        run.find_run("run", "latest")
    for i, place in enumerate(("runs/first", "sweeps/lr/job", "runs/second")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.yaml").touch()
        os.utime(tmp_path / place / "config.yaml", (i, i))
    assert run.find_run("run", "latest") == tmp_path / "runs" / "second"
    assert run.find_run("run", "first") == tmp_path / "runs" / "first"
    assert run.find_run("run", str(tmp_path / "sweeps" / "lr" / "job")) == tmp_path / "sweeps" / "lr" / "job"
    with pytest.raises(ConfigError, match=r"run=frist: no such run; .* did you mean first\?"):
        run.find_run("run", "frist")


def test_paths_are_shown_as_they_would_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.display_path(tmp_path / "a" / "b") == str(Path("a") / "b")
    assert files.display_path(tmp_path.parent) == str(tmp_path.parent)


@pytest.mark.parametrize(
    ("rank", "environment"), [(0, {"TORCHELASTIC_RUN_ID": "none"}), (1, {}), (1, {"TORCHELASTIC_RUN_ID": "none"})]
)
def test_processes_that_are_started_one_by_one_need_a_name(
    monkeypatch: pytest.MonkeyPatch, rank: int, environment: dict[str, str]
) -> None:
    """Each would take another time and random suffix as the run's name."""
    monkeypatch.delenv(run.RUN_FOLDER, raising=False)
    monkeypatch.setattr(run.rank_zero_only, "rank", rank)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    nameless = OmegaConf.create({"folder": None, "name": None})
    with pytest.raises(ConfigError, match=r"^name: .*needs name=\.\.\.$"):
        run.choose_folder(nameless)
    assert run.choose_folder(OmegaConf.create({"folder": None, "name": "mine"})) == run.RUNS / "mine"
