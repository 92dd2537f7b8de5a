"""A stranger's folder: nothing in it runs code, or writes outside the folder."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Run, run_script

from language_model.runs.config import ConfigError
from language_model.runs.folder import read_config
from language_model.runs.resume import compose, resolve_resume
from language_model.runs.trust import check_offered, named_in_conf
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
    ("override", "says"),
    [
        ("callbacks.last.dirpath=..", "callbacks.last.dirpath=.. in run/overrides.yaml: is outside the run's folder"),
        (
            "logger.csv.save_dir=/elsewhere",
            "logger.csv.save_dir=/elsewhere in run/overrides.yaml: is outside the run's folder",
        ),
        ("logger.csv.save_dir=x", "logger.csv.save_dir=x in run/overrides.yaml: is outside the run's folder"),
        ("trainer.default_root_dir=..", "trainer.default_root_dir=.. in run/overrides.yaml: is outside the run's"),
        (
            "logger.csv={_target_:language_model.training.log_files.TableLogger,save_dir:/elsewhere}",
            "logger.csv.save_dir=/elsewhere in run/overrides.yaml: is outside the run's folder",
        ),
        ("+logger.csv.file=~/x", "logger.csv.file=~/x in run/overrides.yaml: is outside the run's folder"),
        ("data.path=${oc.env:HOME}", "data.path=${oc.env:HOME} in run/overrides.yaml: could read outside"),
        ("data.field=${${name}.env:HOME}", "data.field=${${name}.env:HOME} in run/overrides.yaml: could read outside"),
        (
            "callbacks.sample='${ oc.create:{_target_:torch.load,f:weights.pt,weights_only:false}}'",
            "in run/overrides.yaml: could read outside",
        ),
        ("data.field=${ oc.env:HOME}", "data.field=${ oc.env:HOME} in run/overrides.yaml: could read outside"),
        ("hydra.searchpath=[file://x]", "hydra.searchpath=[file://x] in run/overrides.yaml: could read outside"),
        ("+hydra.x=1", "+hydra.x=1 in run/overrides.yaml: could read outside"),
        ("data={cache:/elsewhere/x}", "data={cache:/elsewhere/x} in run/overrides.yaml: could read outside"),
        ("experiment=../../x", "experiment=../../x in run/overrides.yaml: could read outside"),
    ],
)
def test_overrides_do_not_reach_outside_the_folder(folder: Path, override: str, says: str) -> None:
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    (folder / "overrides.yaml").write_text(yaml.safe_dump([*overrides, override]))
    assert says in refused("train.py", "resume=run", "trainer.max_epochs=3")


@pytest.mark.parametrize("override", ["data.cache=CACHE", "++data.cache=CACHE"])
def test_a_cache_without_corpora_is_replaced(folder: Path, tmp_path: Path, override: str) -> None:
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    cache = tmp_path / "elsewhere"
    mine = [o for o in overrides if not o.startswith("data.cache")] + [override.replace("CACHE", str(cache))]
    (folder / "overrides.yaml").write_text(yaml.safe_dump(mine))
    config, _ = resolve_resume(compose([f"resume={folder}"]), [f"resume={folder}"])
    assert config.data.cache == str(ROOT / "outputs" / "corpora")
    (cache / "text-1").mkdir(parents=True)
    (cache / "text-1" / "corpus.json").touch()
    config, _ = resolve_resume(compose([f"resume={folder}"]), [f"resume={folder}"])
    assert config.data.cache == str(cache)


def test_a_link_that_leads_out_is_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "log"
    outside.write_text("theirs")
    (folder / "train.log").unlink()
    (folder / "train.log").symlink_to(outside)
    assert "folder: run has a link that leads out of it, train.log: refused" in refused(
        "train.py", "resume=run", "trainer.max_epochs=3"
    )
    assert outside.read_text() == "theirs"


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml"])
def test_a_file_that_unfolds_is_refused(folder: Path, name: str) -> None:
    layers = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)]
    (folder / name).write_text("\n".join(["model: {}", "l0: &l0 [x, x]", *layers]))
    assert f"run/{name} is damaged, or a stranger's: it has YAML aliases" in refused("train.py", "resume=run")


def test_a_network_of_other_sizes_takes_no_memory(folder: Path) -> None:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["model"] |= {"d_model": 1_000_000, "n_layers": 100}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert "belongs to another network" in refused("generate.py", "run=run")


def test_a_checkpoint_removes_no_file_elsewhere(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Lightning removes the best checkpoint of before, whose path is in the checkpoint."""
    victim = tmp_path_factory.mktemp("victim")
    last = folder / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    (state,) = (
        state for state in content["callbacks"].values() if state.get("best_model_path", "").endswith("best.ckpt")
    )
    path = f"{folder / 'checkpoints'}/../../../{victim.name}"
    score = torch.tensor(1e9)
    state |= {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: score}}
    state |= {"best_model_score": score, "kth_value": score}
    del state["dirpath"]
    torch.save(content, last)
    run_script("train.py", "resume=run", "trainer.max_epochs=3")
    assert victim.is_dir()
    assert (folder / "checkpoints" / "best.ckpt").is_file()


def test_a_run_that_was_moved_keeps_its_best(folder: Path) -> None:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = (
        state for state in content["callbacks"].values() if state.get("best_model_path", "").endswith("best.ckpt")
    )
    state |= {"best_model_score": torch.tensor(0.5), "kth_value": torch.tensor(0.5)}
    state["best_k_models"] = {path: torch.tensor(0.5) for path in state["best_k_models"]}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    before = (folder / "checkpoints" / "best.ckpt").read_bytes()
    run_script("train.py", "resume=run", "trainer.max_epochs=3")
    assert (folder / "checkpoints" / "best.ckpt").read_bytes() == before
    assert Run(folder).result["best"] == 0.5


def test_a_trial_outside_its_search_is_a_run(folder: Path) -> None:
    (folder / "job.json").write_text('{"overrides": [], "values": {}, "trial": 3}')
    run_script("train.py", "resume=run", "trainer.max_epochs=3")
    assert Run(folder).result["steps"] == 24
    assert {path.name for path in Path().iterdir()} == {"run", "weights.pt"}


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
