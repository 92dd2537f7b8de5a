import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_model import run
from language_model.config import ConfigError


@given(overrides=st.lists(st.text(max_size=300), max_size=8))
def test_folder_names_are_safe_bounded_and_all_different(overrides: list[str]) -> None:
    names = {override: run.safe_name(override) for override in overrides}
    assert len(set(names.values())) == len(names)
    for name in names.values():
        assert re.fullmatch(r"[\w.=,+-]{1,140}", name)


def test_plain_overrides_are_their_own_folder_name() -> None:
    assert run.safe_name("optimizer.lr=1e-2,seed=1") == "optimizer.lr=1e-2,seed=1"
    assert run.safe_name("") == "defaults"
    long = [run.safe_name("data.path=" + "x" * 500 + end) for end in ("a", "b")]
    assert max(map(len, long)) < 140
    assert long[0] != long[1]


def test_a_result_is_written_whole_and_as_plain_json(tmp_path: Path) -> None:
    run.save_result(tmp_path, {"best": math.nan, "steps": 3, "metrics": {"val/loss": math.inf, "lr": 0.1}})
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result == {"best": None, "steps": 3, "metrics": {"val/loss": None, "lr": 0.1}}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_commit_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run.versions()
    assert found["lightning"]
    assert found["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["git_commit"])
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.versions()["git_commit"] is None


def test_what_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; a run's folder or a checkpoint is needed"):
        run.checkpoint_to_resume(str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        run.checkpoint_to_resume(str(tmp_path / "nothing.ckpt"))
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert run.checkpoint_to_resume(str(tmp_path)) == run.checkpoint_to_resume(str(last)) == last


def test_paths_are_shown_as_they_would_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run.shown(tmp_path / "a" / "b") == str(Path("a") / "b")
    assert run.shown(tmp_path.parent) == str(tmp_path.parent)
