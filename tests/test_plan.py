"""The plan of a run, as a notebook uses it; test_train.py does the same through the script."""

import re
from pathlib import Path

import pytest
from conftest import TINY

import language_model
from language_model.runs.config import ConfigError


def test_a_plan_says_what_will_be_done_and_creates_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = language_model.plan(*TINY, f"folder={folder}")
    assert (run.steps, run.config.total_steps, run.config.vocab_size) == (16, 16, 43)
    assert run.config.monitor == "train/loss_epoch"
    assert run.config.trainer.precision in ("32-true", "bf16-mixed")
    assert run.overrides == TINY
    assert run.checkpoint is None
    assert not run.is_finished
    assert not folder.exists()


def test_a_plan_is_carried_out_once_and_then_finished(tmp_path: Path) -> None:
    overrides = (*TINY, f"folder={tmp_path / 'run'}")
    result = language_model.fit(language_model.plan(*overrides))
    assert result["status"] == "finished"
    assert result["steps"] == 16
    again = language_model.plan(*overrides)
    assert again.is_finished
    assert again.checkpoint == tmp_path / "run" / "checkpoints" / "last.ckpt"
    file = tmp_path / "run" / "result.json"
    before = file.read_text()
    assert language_model.fit(again)["metrics"] == result["metrics"]  # which does nothing
    assert file.read_text() == before
    longer = language_model.plan(*overrides, "trainer.max_epochs=3", "total_steps=16")
    assert not longer.is_finished
    assert longer.steps == 24
    network, tokenizer, *_ = language_model.load_run(tmp_path / "run")
    assert tokenizer.vocab_size == network.head.out_features == 43


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("model.d_model=15", "model.n_heads=2 does not divide d_model=15"),
        ("monitor=val/loss", "monitor=val/loss: no callback logs it"),
        ("vocab_size=5", "vocab_size=5: the tokenizer has 43 tokens"),
        ("schedule.warmup_steps=999", "schedule.warmup_steps=999 is longer than the run"),
        ("trainer.max_epochs=-1", "total_steps: the schedule needs an end"),
        ("model.d_modle=8", "model.d_modle: unknown key; did you mean d_model?"),
        ("model=smal", "model=smal: there is no such file in conf/model; choose from baby"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(tmp_path: Path, override: str, error: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(error)):
        language_model.plan(*TINY, f"folder={tmp_path / 'run'}", override)
    assert not (tmp_path / "run").exists()


def test_what_a_notebook_does_not_find() -> None:
    with pytest.raises(AttributeError, match="plam"):
        _ = language_model.plam


def test_a_plan_takes_what_the_command_line_takes(tmp_path: Path) -> None:
    run = language_model.plan(*TINY, f"folder={tmp_path / 'run'}", "callbacks.sample.prompt=Shall 'I")
    assert run.config.callbacks.sample.prompt == "Shall 'I"


def test_a_plan_is_carried_out_only_once(tmp_path: Path) -> None:
    run = language_model.plan(*TINY, f"folder={tmp_path / 'run'}")
    language_model.fit(run)
    files = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="carried out already: make a new one"):
        language_model.fit(run)
    assert {file: file.read_bytes() for file in files} == files


def test_two_plans_of_one_folder_do_not_overwrite_each_other(tmp_path: Path) -> None:
    folder = f"folder={tmp_path / 'run'}"
    first, second = language_model.plan(*TINY, folder), language_model.plan(*TINY, folder, "model.d_ff=8")
    language_model.fit(first)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"was trained with other settings: model\.d_ff=16 then, 8 now"):
        language_model.fit(second)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize("content", ["{", "[1]", "text: [", "nothing"])
@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str, content: str) -> None:
    overrides = (*TINY, f"folder={tmp_path / 'run'}")
    language_model.fit(language_model.plan(*overrides))
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged") as error:
        language_model.plan(*overrides)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_files_of_a_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = (*TINY, f"folder={tmp_path / 'run'}")
    language_model.fit(language_model.plan(*overrides))
    before = (tmp_path / "run" / "config.yaml").read_text()
    run = language_model.plan(*overrides, "trainer.max_epochs=3", "total_steps=16")

    def full(path: Path, content: str, **_: object) -> None:
        path.write_bytes(content[:10].encode())
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"folder: .*overrides.yaml could not be written: the disk is full"):
        language_model.fit(run)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert not list((tmp_path / "run").glob("*.tmp"))
