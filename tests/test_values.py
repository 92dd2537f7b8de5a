"""Wrong values for every key of every script: one line that names the key, or an honest run."""

import copy
import functools
import json
import math
import runpy
import shutil
from pathlib import Path

import hydra
import pytest
import yaml
from conftest import ROOT, TINY, Jobs, Run, Sweep, refused_sweep, run_script
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from language_model.runs.config import ConfigError, check_values, flatten
from language_model.runs.fit import fit
from language_model.runs.plan import Plan, make_plan
from language_model.terminal import setup_logging

WRONG = ("abc", "-1", "nan", "[1]", "''")

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
SETTINGS = [setting for setting in TINY if "warmup" not in setting]


@functools.cache
def composed(part: str) -> DictConfig:
    """Return the config with a part, once for all its keys: composing takes longer than refusing a value."""
    tokens = ["data.train_path=x"] if part == "data=bin" else []
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("train", [*tokens, *([part] if part else [])])


def keys_of(part: str) -> list[str]:
    leaves = flatten(OmegaConf.to_container(composed(part)))
    return [key for key in leaves if key.startswith(PARTS[part]) and not key.endswith("_") and "*" not in key]


EVERY = [(part, key) for part in PARTS for key in keys_of(part)]


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    (tmp_path / "tokens.bin").write_bytes(bytes(range(40)) * 200)
    return f"data.train_path={tmp_path / 'tokens.bin'}"


def settings_of(part: str, corpora: str, tokens: str) -> list[str]:
    return [*SETTINGS, corpora, tokens if part == "data=bin" else "data.val_fraction=0.1"]


def plan_with(part: str, key: str, value: str, settings: list[str]) -> Plan:
    """Return the plan with these settings, and with this value for the key."""
    setup_logging()
    overrides = [*(setting for setting in settings if not setting.startswith(f"{key}=")), f"{key}={value}"]
    config = copy.deepcopy(composed(part))
    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(config, override.get_key_element(), override.value(), merge=False)
    return make_plan(config, overrides)


def refusal(part: str, key: str, value: str, settings: list[str]) -> str | None:
    """Return why a plan is refused: one line that names the key; None if it is not."""
    try:
        plan_with(part, key, value, settings)
    except ConfigError as error:
        message = str(error)
        assert "\n" not in message
        assert key in message or f" {key.rpartition('.')[2]}={value}" in message, f"{key}={value}: {message}"
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
        refusal(part, key, value, [*settings_of(part, corpora, tokens), f"folder={tmp_path / 'run'}"])
        if key != "data.cache":  # which is a folder of any name
            assert {path.name for path in tmp_path.iterdir()} == before, f"{key}={value}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize(("part", "key"), [each for each in EVERY if each[1] != "compile"])  # which has its own tests
def test_what_a_plan_accepts_trains(
    part: str, key: str, tmp_path: Path, corpora: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value passes the plan and fails later, but for a gradient that is not finite."""
    monkeypatch.chdir(tmp_path)
    for number, value in enumerate((*WRONG, "1e30", "0", "1", "0.5", "true")):
        settings = [*settings_of(part, corpora, tokens), f"folder={tmp_path / str(number)}"]
        if refusal(part, key, value, settings) is not None:
            continue
        try:
            result = fit(plan_with(part, key, value, settings))
            assert result["status"] == "finished", f"{key}={value}"
            assert result["steps"] > 0, f"{key}={value}"
        except Exception as error:
            if not (isinstance(error, ConfigError) and "is not finite" in str(error)):
                pytest.fail(f"{key}={value}: {type(error).__name__}: {error}")


def made_up_sweep(folder: Path, run: Run) -> Path:
    """Return the folder of a sweep of two rates and two seeds, whose jobs came to these losses."""
    write_json_file(folder / "sweep.json", {"asked": {"optimizer.lr": ["0.1", "0.2"], "seed": ["0", "1"]}})
    for i in range(4):
        values = {"optimizer.lr": str(0.1 + i // 2 / 10), "seed": str(i % 2)}
        job = folder / f"job-{i}"
        shutil.copytree(run.folder, job, ignore=shutil.ignore_patterns("*.ckpt", "events*"))
        write_json_file(job / "job.json", {"overrides": [], "values": values, "error": None})
        result = json.loads((job / "result.json").read_text())
        result["metrics"]["train/loss_epoch"] = result["best"] = 3.0 + i / 100 + (i == 3) / 200
        write_json_file(job / "result.json", result)
    return folder


def write_json_file(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


SCRIPT_SETTINGS = {
    "generate": ["max_new_tokens=2"],
    "evaluate": ["accelerator=cpu"],
    "compare": ["by=optimizer.lr"],
}


def keys_of_script(script: str) -> list[str]:
    keys = flatten(yaml.safe_load((ROOT / "conf" / f"{script}.yaml").read_text()))
    return [key for key in keys if not key.startswith(("hydra.", "defaults"))]


SCRIPT_KEYS = [(script, key) for script in SCRIPT_SETTINGS for key in keys_of_script(script)]


@pytest.mark.parametrize(("script", "key"), SCRIPT_KEYS)
def test_a_wrong_value_for_another_script(
    script: str, key: str, shared_run: Run, tmp_path: Path, corpora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*SCRIPT_SETTINGS[script], *([corpora] if script == "evaluate" else [])]
    if script == "compare":
        arguments.append(f"sweep={made_up_sweep(tmp_path / 'sweep', shared_run)}")
    else:
        arguments.append(f"run={shutil.copytree(shared_run.folder, tmp_path / 'run')}")
    for value in (*WRONG, "true", "null", "/dev/null/x"):
        try:
            run_script(f"{script}.py", *(a for a in arguments if not a.startswith(f"{key}=")), f"{key}={value}")
        except SystemExit as stopped:
            message = str(stopped)
            assert message.startswith("error: "), f"{key}={value}: {message}"
            assert "\n" not in message
            assert key in message, f"{key}={value}: {message}"
            assert "HYDRA_FULL_ERROR" not in message, f"{key}={value}: {message}"


@pytest.mark.parametrize("script", ["chapter", "data", "generate", "goals"])
def test_wrong_values_for_the_benchmarks(script: str) -> None:
    annotations = runpy.run_path(str(ROOT / "scripts" / "benchmarks" / f"{script}.py"))["KEYS"]
    defaults = flatten(yaml.safe_load((ROOT / "conf" / f"benchmark_{script}.yaml").read_text()))
    for key in keys_of_script(f"benchmark_{script}"):
        refused = 0
        for value in ("abc", -1, math.nan, [1.5], 1e30, True):
            config = OmegaConf.create(defaults | {"folder": "x", "figures": "x"} | {key: value})
            try:
                check_values(config, annotations)
            except ConfigError as error:
                refused += 1
                if key not in str(error):
                    pytest.fail(f"{key}={value}: {error}")
        assert refused >= 4, key


@pytest.mark.parametrize("key", ["hydra.sweeper.max_jobs", "hydra.sweeper.params"])
@pytest.mark.parametrize("value", ["abc", "-1", "nan", "0", "[1]", "true"])
def test_wrong_values_for_the_sweepers(key: str, value: str, multirun: Sweep, jobs: Jobs) -> None:
    message = refused_sweep(multirun, "seed=1,2", f"{key}={value}")
    assert key in message


@pytest.mark.parametrize("key", ["n_trials", "n_jobs", "sampler.n_startup_trials", "pruner.n_warmup_steps"])
@pytest.mark.parametrize("value", ["abc", "-1", "nan", "[1]", "1e30"])
def test_wrong_values_for_a_search(key: str, value: str, multirun: Sweep, jobs: Jobs) -> None:
    space = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
    message = refused_sweep(multirun, "hydra/sweeper=search", space, f"hydra.sweeper.{key}={value}")
    assert f"hydra.sweeper.{key}" in message
