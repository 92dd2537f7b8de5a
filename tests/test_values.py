"""Wrong values for every key of every script: one line that names the key, or an honest run."""

import shutil
from pathlib import Path

import hydra
import pytest
from conftest import ROOT, TINY
from omegaconf import OmegaConf

from language_model.runs.config import ConfigError, flatten
from language_model.runs.fit import fit
from language_model.runs.folder import RUNS
from language_model.runs.plan import make_plan
from language_model.runs.resume import compose

WRONG = ("abc", "-1", "nan", "[1]", "''", "1e30")

# Overrides that choose other parts, with the keys that these have; together with the defaults, every key of conf.
PARTS = {
    "": "",
    "optimizer=adam": "optimizer.",
    "optimizer=muon": "optimizer.",
    "optimizer=sgd": "optimizer.",
    "schedule=warmup_linear": "schedule.",
    "schedule=constant": "schedule.",
    "tokenizer=bpe": "tokenizer.",
    "checkpoint_io=async": "checkpoint_io.",
    "data=bin": "data.",
}
# What makes the others valid, without fixing the key that is tried.
SETTINGS = [*(setting for setting in TINY if "warmup" not in setting), "data.val_fraction=0.1", "name=wrong"]


def keys_of(part: str) -> list[str]:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("train", [part] if part else [])
    leaves = flatten(OmegaConf.to_container(config))
    return [key for key in leaves if key.startswith(PARTS[part]) and not key.endswith("_")]


EVERY = [(part, key) for part in PARTS for key in keys_of(part)]


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    (tmp_path / "tokens.bin").write_bytes(bytes(range(40)) * 200)
    return f"data.train_path={tmp_path / 'tokens.bin'}"


def overrides_for(part: str, key: str, value: str, tmp_path: Path, corpora: str, tokens: str) -> list[str]:
    needed = [tokens] if part == "data=bin" else []
    mine = [*SETTINGS, corpora, *needed, f"folder={tmp_path / 'run'}"]
    if part == "data=bin":
        mine.remove("data.val_fraction=0.1")
    return [part] * bool(part) + [o for o in mine if not o.startswith(f"{key}=")] + [f"{key}={value}"]


def refusal(key: str, value: str, overrides: list[str]) -> str | None:
    """Return why a plan with these overrides is refused: one line that names the key; None if it is not."""
    try:
        make_plan(compose(overrides), overrides)
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
        assert key in message, f"{key}={value}: {message}"
        assert "HYDRA_FULL_ERROR" not in message, f"{key}={value}: {message}"
        return message
    return None


@pytest.mark.parametrize(("part", "key"), EVERY)
def test_a_wrong_value_is_refused_by_its_key_before_anything_is_written(
    part: str, key: str, tmp_path: Path, corpora: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    for value in WRONG:
        overrides = overrides_for(part, key, value, tmp_path, corpora, tokens)
        refusal(key, value, overrides)
        if key != "data.cache":  # which is a folder of any name
            assert {path.name for path in tmp_path.iterdir()} == before, f"{key}={value}"


@pytest.mark.slow
@pytest.mark.parametrize(("part", "key"), EVERY)
def test_what_a_plan_accepts_trains(
    part: str, key: str, tmp_path: Path, corpora: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value passes the plan and fails later, but for a gradient that is not finite."""
    monkeypatch.chdir(tmp_path)
    for value in (*WRONG, "0", "1", "0.5", "true"):
        overrides = overrides_for(part, key, value, tmp_path, corpora, tokens)
        if refusal(key, value, overrides) is not None:
            continue
        try:
            result = fit(make_plan(compose(overrides), overrides))
            assert result["status"] == "finished", f"{key}={value}"
            assert result["steps"] > 0, f"{key}={value}"
        except Exception as error:
            if not (isinstance(error, ConfigError) and "is not finite" in str(error)):
                pytest.fail(f"{key}={value}: {type(error).__name__}: {error}")
        for folder in (tmp_path / "run", RUNS / "wrong"):
            shutil.rmtree(folder, ignore_errors=True)
