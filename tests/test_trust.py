"""A stranger's folder: nothing in it runs code, or writes outside the folder."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Run, run_script

from language_model.runs.config import ConfigError
from language_model.runs.folder import read_config
from language_model.runs.trust import check_offered, harmless_overrides, named_in_conf
from language_model.sweeps.study import Trials


class Evil:
    """A pickle that makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.fixture
def folder(shared_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a run, with a pickle beside it, as the current folder's only content."""
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), tmp_path / "weights.pt")
    return Path(shutil.copytree(shared_run.folder, tmp_path / "run"))


def refused(name: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_script(name, *arguments)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert {path.name for path in Path().iterdir()} == {"run", "weights.pt"}
    return message


HOSTILE = {
    "a pickle": {"_target_": "torch.load", "f": "weights.pt", "weights_only": False},
    "a command": {"_target_": "os.system", "command": "mkdir evil"},
    "a command, by a module of the package": {"_target_": "language_model.files.os.mkdir", "path": "evil"},
    "a function of the package": {"_target_": "language_model.files.write_text", "file": "evil", "content": ""},
    "a class that a module imports": {"_target_": "language_model.files.Path", "_args_": ["evil"]},
    "another part of conf": {"_target_": "language_model.data.datamodule.TextData", "path": "weights.pt"},
    "a class of another kind": {"_target_": "language_model.startup.QuickTorchmetrics"},
    "inside an offered node": {
        "_target_": "language_model.model.gpt.GPT",
        "vocab_size": {"_target_": "os.mkdir", "path": "evil"},
    },
    "inside a list": {"_target_": "language_model.model.gpt.GPT", "x": [{"_target_": "os.mkdir", "path": "evil"}]},
    "a module that does not exist": {"_target_": "evil.Evil"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_config_names_only_what_this_checkout_offers(folder: Path, what: str) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(content | {"model": HOSTILE[what]}))
    for command in ("generate.py", "evaluate.py"):
        message = refused(command, "run=run")
        assert "error: model" in message
        assert "run/config.yaml: this checkout does not offer it there" in message


@pytest.mark.parametrize("what", HOSTILE)
def test_so_do_overrides_when_a_run_resumes(folder: Path, what: str) -> None:
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    flow = yaml.safe_dump(HOSTILE[what], default_flow_style=True, width=1000).strip()
    overrides.append(f"exercise={flow.replace(': ', ':')}")
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    message = refused("train.py", "resume=run", "trainer.max_epochs=3")
    assert "error: exercise" in message
    assert "run/overrides.yaml: this checkout does not offer it there" in message


@pytest.mark.parametrize(
    "override",
    [
        "callbacks.last.dirpath=..",
        "logger.csv.save_dir=/tmp",
        "trainer.default_root_dir=..",
        "data.path=${oc.env:HOME}",
        "hydra.searchpath=[file://x]",
        "+hydra.x=1",
    ],
)
def test_overrides_do_not_reach_outside_the_folder(folder: Path, override: str) -> None:
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    (folder / "overrides.yaml").write_text(yaml.safe_dump([*overrides, override]))
    message = refused("train.py", "resume=run", "trainer.max_epochs=3")
    assert f"error: {override} in run/overrides.yaml: could reach outside the run's folder" in message


def test_a_cache_without_corpora_is_left_out(tmp_path: Path) -> None:
    file, saved = tmp_path / "overrides.yaml", [f"data.cache={tmp_path}", "seed=1"]
    assert harmless_overrides(saved, file) == ["seed=1"]
    (tmp_path / "text-1").mkdir()
    (tmp_path / "text-1" / "corpus.json").touch()
    assert harmless_overrides(saved, file) == saved


def test_what_is_typed_is_the_users(folder: Path) -> None:
    typed = ["optimizer._target_=torch.optim.RMSprop"]
    check_offered({"optimizer": {"_target_": "torch.optim.RMSprop"}}, "x", typed)
    with pytest.raises(ConfigError, match=r"^optimizer._target_=torch.optim.RMSprop in x: "):
        check_offered({"optimizer": {"_target_": "torch.optim.RMSprop"}}, "x")


def test_a_network_of_the_checkout_needs_no_file_in_conf() -> None:
    assert ("model", "language_model.model.gpt.Block") not in named_in_conf()
    check_offered({"model": {"_target_": "language_model.model.gpt.Block"}}, "x")
    with pytest.raises(ConfigError, match="this checkout does not offer it there"):
        check_offered({"data": {"_target_": "language_model.model.gpt.Block"}}, "x")


def test_a_config_does_not_read_the_environment(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["data"]["path"] = "${oc.env:HOME}"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert read_config(folder).data.path == "${oc.env:HOME}"
    message = refused("evaluate.py", "run=run")
    assert "${oc.env:HOME}" in message


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "null", '{"type": "bpe"}', '{"type": "ids", "vocab_size": "os.system"}', '{"model": {}}',
     '{"type": "char", "characters": 5}', '{"_target_": "os.system"}', "[" * 100_000],
)  # fmt: skip
def test_a_tokenizer_is_read_as_data(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert "run/tokenizer.json" in refused("generate.py", "run=run")


@pytest.mark.parametrize("name", ["result.json", "job.json"])
@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"best": "abc"}', '{"status": 5, "metrics": 5, "seconds": "x", "overrides": 5}', "null"]
)
def test_facts_are_read_as_data(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    try:
        run_script("train.py", "resume=run")
    except SystemExit as stopped:
        message = str(stopped)
        assert message.startswith(f"error: run/{name} is damaged") or "trained for 16 steps already" in message
        assert "\n" not in message
    assert {path.name for path in Path().iterdir()} == {"run", "weights.pt"}


def test_a_search_takes_no_other_keys_from_its_study(tmp_path: Path) -> None:
    """A trial that a stranger's study.log calls unfinished would be run with what it says."""
    optuna = pytest.importorskip("optuna")
    (tmp_path / "sweep.json").write_text('{"asked": {}, "pruner": {"_target_": "optuna.pruners.NopPruner"}}')
    spaces = {"optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1)}
    theirs = Trials(
        tmp_path, {"exercise": optuna.distributions.CategoricalDistribution(["{_target_:os.abort}"])}, {}, "min"
    )
    number = theirs.study.ask(theirs.spaces).number
    with pytest.raises(ConfigError, match=r"study\.log is damaged: trial 0 has other keys"):
        Trials(tmp_path, spaces, {}, "min").values(number)
