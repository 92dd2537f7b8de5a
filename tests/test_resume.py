"""Runs of earlier versions, and what may change on resume; test_train.py resumes runs of this version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from language_model.files import ROOT
from language_model.model.gpt import Dropout
from language_model.runs.folder import read_config, read_result, read_settings
from language_model.runs.moved_names import MODULES, MOVED, with_current_names
from language_model.runs.resume import can_change_on_resume

# A run of commit 0a1ae00 (before the package had folders), killed in its last epoch. Where it was written stands as
# PROJECT, FOLDER and CACHE in its config.
HALF_RUN = ROOT / "tests" / "stored_half_run"
# What the same command logged there when nothing interrupted it: the mean training loss of each epoch.
LOSSES = [3.5634, 2.9202, 2.5746]


@pytest.fixture
def half_run(tmp_path: Path) -> Path:
    folder = tmp_path / "half"
    shutil.copytree(HALF_RUN, folder)
    config = (folder / "config.yaml").read_text()
    for name, path in (("PROJECT", ROOT), ("FOLDER", folder), ("CACHE", tmp_path / "corpora")):
        config = config.replace(name, path.as_posix())
    (folder / "config.yaml").write_text(config)
    return folder


def rounded_dropout(self: Dropout, x: torch.Tensor) -> torch.Tensor:
    """Dropout as that version had it, with p rounded to a multiple of 1/256: 0.1 was 0.1016."""
    if not self.training:
        return x
    dropped = round(self.p * 256)
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),)).view(torch.int8)
    keep = bits[: x.numel()].view(x.shape) >= dropped - 128
    return x * keep.to(x.dtype).mul_(256 / (256 - dropped))


def test_a_run_of_an_earlier_version_resumes(train, half_run: Path) -> None:
    """Its dropout is exact from here on, so that its losses are not quite those it would have had."""
    run = train(f"resume={half_run}", name="half", tiny=False)
    assert run.losses == pytest.approx(LOSSES, abs=0.01)
    assert run.result["steps"] == 90


def test_with_its_dropout_it_resumes_to_what_it_would_have_come_to(
    train, half_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dropout, "forward", rounded_dropout)
    run = train(f"resume={half_run}", name="half", tiny=False)
    assert "resuming from" in run.output
    assert run.losses == pytest.approx(LOSSES, abs=2e-4)
    assert run.result["steps"] == 90
    assert run.config["model"]["_target_"] == "language_model.model.gpt.GPT"
    assert run.column("step")[-1] == 89
    earlier = next((HALF_RUN / "tensorboard").iterdir())
    assert (half_run / earlier.name).is_file()  # moved to where event files are now
    assert not list((half_run / "tensorboard").iterdir())


def test_another_setting_of_an_earlier_version_is_refused(train, half_run: Path) -> None:
    with pytest.raises(SystemExit, match=r"optimizer.lr=0.01 then, 0.02 now"):
        train(f"resume={half_run}", "optimizer.lr=0.02", name=None, tiny=False)


def test_every_moved_name_is_one_of_today() -> None:
    import pkgutil

    for new in (*MODULES.values(), *MOVED.values()):
        assert pkgutil.resolve_name(f"language_model.{new}")


def test_names_of_earlier_versions_are_read_as_those_of_today(tmp_path: Path) -> None:
    old = {
        "model": {"_target_": "language_model.gpt.GPT", "attention": "plain"},
        "data": {"path": "a=b"},
        "trainer": {},
        "optimizer": {},
    }
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    model = {"_target_": "language_model.model.gpt.GPT", "attention": "unfused"}
    assert read_config(tmp_path).model == model
    assert read_settings(tmp_path)["data.path"] == "a=b"
    overrides = ["model.attention=plain", "data.path=plain", "optimizer._target_=language_model.optim.muon", "seed=1"]
    assert with_current_names(overrides) == [
        "model.attention=unfused", "data.path=plain",
        "optimizer._target_=language_model.training.optimizer.muon", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("++model.attention='plain'", "++model.attention='unfused'"),
        ("+x={_target_:language_model.callbacks.Sample}", "+x={_target_:language_model.training.callbacks.Sample}"),
        ("language_model.checkpoint.Last", "language_model.training.checkpoint.LastCheckpoint"),
        ("language_model.data.datamodule.TextData", "language_model.data.datamodule.TextData"),
        ({"model.attention": ["plain", "fused"]}, {"model.attention": ["unfused", "fused"]}),
        (3, 3),
    ],
)  # fmt: skip
def test_names_are_found_wherever_a_user_could_have_typed_them(old, new) -> None:
    assert with_current_names(old) == new
    assert with_current_names(new) == new


def test_the_uniform_baseline_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"guessing_loss": 3.76}))
    assert read_result(tmp_path) == {"uniform_baseline": 3.76}
    assert read_result(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("key", "can_change"),
    [("trainer.max_epochs", True), ("callbacks.sample.prompt", True), ("optimizer.lr", False), ("seed", False)],
)
def test_how_a_run_is_watched_may_change_and_what_it_computes_not(key: str, can_change: bool) -> None:
    assert can_change_on_resume(key) == can_change
