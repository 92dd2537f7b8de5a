"""Every example of docs/extend.md, executed in a copy of the project."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

TRAIN = "python scripts/train.py "
SHORT = ["data.batch_size=4", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
         "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "callbacks.sample.max_new_tokens=8",
         "schedule.warmup_steps=1"]  # fmt: skip

# Runs scripts/train.py once for each list of arguments, in one process: starting one takes seconds.
DRIVER = """
import json, runpy, sys
from pathlib import Path
messages = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        runpy.run_path("scripts/train.py", run_name="__main__")
        messages.append(None)
    except SystemExit as stopped:
        messages.append(str(stopped.code))
Path("messages.json").write_text(json.dumps(messages))
"""


class Block(NamedTuple):
    language: str
    lines: list[str]


def blocks() -> list[Block]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs/extend.md").read_text("utf-8"), re.M | re.S)
    return [Block(language, content.splitlines()) for language, content in found]


def files() -> dict[str, Block]:
    """The examples' files, by the path in their first line."""
    return {re.split(r"[ ,]", block.lines[0])[1]: block for block in blocks() if block.language in ("python", "yaml")}


def shell(beginning: str = TRAIN) -> list[list[str]]:
    """The overrides of the commands that begin so, besides those that need another package."""
    ours = [block.lines for block in blocks() if block.language == "sh" and not block.lines[0].startswith("pip ")]
    return [shlex.split(line.removeprefix(beginning)) for lines in ours for line in lines if line.startswith(beginning)]


def combined(commands: list[list[str]]) -> list[list[str]]:
    """The commands in fewer runs: a command joins the first one whose keys it does not set to other values."""
    runs: list[dict[str, str]] = []
    for command in commands:
        keys = dict(override.split("=", 1) for override in command)
        free = (run for run in runs if all(run.get(key, value) == value for key, value in keys.items()))
        run = next(free, None)
        if run is None:
            runs.append(run := {})
        run.update(keys)
    return [[f"{key}={value}" for key, value in run.items()] for run in runs]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with the examples' files added."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("conf", "scripts", "src"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (copy / "my.txt").write_text((ROOT / "src/language_model/sonnets.txt").read_text("utf-8") * 4, encoding="utf-8")
    for path, block in files().items():
        assert not (copy / path).exists(), f"{path} is not new"
        (copy / path).write_text("\n".join(block.lines) + "\n", encoding="utf-8")
    return copy


def run(project: Path, *command: str) -> str:
    """Run a command in the copy; return its output."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("COV")
    }  # coverage is not of the copy
    environment |= {"PYTHONPATH": str(project / "src"), "HYDRA_FULL_ERROR": "0"}
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_yaml_file_is_used_by_a_command_as_it_says() -> None:
    used = {
        override for block in blocks() if block.language == "sh" for line in block.lines for override in line.split()
    }
    for path, block in files().items():
        if path.startswith("conf/"):
            group, name = Path(path).parent.name, Path(path).stem
            assert block.lines[0] == f"# {path}, used as {group}={name}"
            assert f"{group}={name}" in used


def test_the_examples_train_and_report_errors_as_shown(project: Path) -> None:
    shown = [block.lines for block in blocks() if block.language == "console"]
    wrong = {line: lines[i + 1] for lines in shown for i, line in enumerate(lines) if line.startswith("$ ")}
    packages = {block.lines[0].split()[-1]: block.lines[1:] for block in blocks() if block.lines[0].startswith("pip ")}
    missing = {line: package for package, lines in packages.items() for line in lines
               if importlib.util.find_spec(package) is None}  # fmt: skip
    right = combined([command for command in shell() if "-m" not in command])
    names = [f"name=example_{i}" for i in range(len(right))]
    jobs = [[name, *SHORT, *command] for name, command in zip(names, right, strict=True)]
    jobs += [shlex.split(line.removeprefix("$ ").removeprefix(TRAIN)) for line in (*wrong, *missing)]
    run(project, "-c", DRIVER, json.dumps(jobs))
    messages = json.loads((project / "messages.json").read_text())

    errors = [message for message in messages[: len(right)] if message]
    assert not errors
    results = [json.loads(file.read_text()) for file in sorted(project.glob("outputs/runs/example_*/result.json"))]
    assert [result["status"] for result in results] == ["finished"] * len(right)
    assert {result["steps"] for result in results} == {2}
    assert len(list(project.glob("outputs/runs/example_*/metrics.csv"))) == len(right)
    logged = set().union(*(result["metrics"] for result in results))
    assert {"train/weight_norm", "val/top5_accuracy", "val/loss"} <= logged
    (lines,) = project.glob("outputs/runs/*/metrics.jsonl")
    assert "train/loss" in json.loads(lines.read_text().splitlines()[0])

    messages = messages[len(right) :]
    assert messages[: len(wrong)] == list(wrong.values())
    for message, package in zip(messages[len(wrong) :], missing.values(), strict=True):
        assert f"Requirement '{package}" in message  # so the YAML file's keys are right


@pytest.mark.slow  # six jobs, each in a process of its own
def test_the_examples_can_be_swept_and_compared(project: Path) -> None:
    (sweep,) = [command for command in shell() if "-m" in command]
    run(project, "scripts/train.py", *sweep, *SHORT)
    (comparison,) = shell("python scripts/compare.py ")
    assert "lstm" in run(project, "scripts/compare.py", *comparison)
