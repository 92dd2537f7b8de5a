"""``run=best``: which runs are ranked, and by what."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_script

from language_model.runs import folder
from language_model.runs.config import ConfigError
from language_model.runs.load import best_run
from language_model.terminal import log

SETTINGS: dict[str, Any] = {
    "monitor": "val/loss",
    "data": {"path": "x", "seq_len": 8, "batch_size": 4, "stride": 8, "seed": 0, "num_workers": 0},
    "trainer": {"limit_val_batches": 1.0, "overfit_batches": 0.0, "limit_train_batches": 1.0, "fast_dev_run": False},
}


class Runs:
    """Folders of made-up runs, each newer than those before."""

    def __init__(self, place: Path) -> None:
        self.place, self.number = place, 0

    def add(self, name: str, best: Any, **settings: Any) -> Path:
        run = self.place / name
        run.mkdir(parents=True)
        config = {
            key: value | settings.get(key, {}) if isinstance(value, dict) else value for key, value in SETTINGS.items()
        }
        config |= {key: value for key, value in settings.items() if not isinstance(value, dict)}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "result.json").write_text(json.dumps({"best": best}))
        (run / "tokenizer.json").write_text(settings.get("letters", "abc"))
        self.number += 1
        os.utime(run / "config.yaml", (self.number, self.number))
        return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setattr(folder, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(folder, "SWEEPS", tmp_path / "sweeps")
    monkeypatch.setattr(log, "propagate", True)
    log.setLevel(logging.INFO)
    return Runs(tmp_path / "runs")


def test_only_runs_that_were_measured_alike_are_ranked(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    others: list[dict[str, Any]] = [
        {"trainer": {"limit_val_batches": 5}},
        {"trainer": {"overfit_batches": 2}},
        {"trainer": {"fast_dev_run": True}},
        {"data": {"path": "y"}},
        {"data": {"seq_len": 4}},
        {"data": {"newlines": "normalise"}},
        {"monitor": "val/perplexity"},
        {"monitor_mode": "max"},
        {"letters": "ab"},
    ]
    for number, settings in enumerate(others):
        runs.add(f"other{number}", 0.1, **settings)
    wanted = runs.add("wanted", 2.0, data={"batch_size": 2, "stride": 1, "seed": 5, "num_workers": 2})
    runs.add("worse", 3.0)
    runs.add("latest", None)
    assert best_run() == wanted
    said = "wanted: val/loss 2.0000 of best.ckpt, the lowest of 2 runs measured alike; 10 others are not ranked"
    assert said in caplog.text


def test_with_a_share_of_the_batches_their_size_counts(runs: Runs) -> None:
    share = {"limit_val_batches": 5}
    runs.add("larger", 1.0, trainer=share, data={"batch_size": 8})
    latest = runs.add("latest", 2.0, trainer=share)
    assert best_run() == latest


def test_the_training_loss_depends_on_the_training_windows(runs: Runs) -> None:
    runs.add("fewer", 1.0, monitor="train/loss_epoch", trainer={"limit_train_batches": 3})
    runs.add("denser", 1.0, monitor="train/loss_epoch", data={"stride": 1})
    latest = runs.add("latest", 2.0, monitor="train/loss_epoch")
    assert best_run() == latest


def test_the_highest_is_the_best_where_that_is_the_mode(runs: Runs) -> None:
    accuracy = {"monitor": "val/accuracy", "monitor_mode": "max"}
    high = runs.add("high", 0.9, **accuracy)
    runs.add("low", 0.2, **accuracy)
    assert best_run() == high


def test_generate_says_which_run_it_is_beside_the_text(runs: Runs, capfd: pytest.CaptureFixture) -> None:
    run = Path(shutil.copytree(ROOT / "tests" / "stored_run", runs.place / "stored"))
    (run / "result.json").write_text('{"best": 1.5}')
    run_script("generate.py", "run=best", "checkpoint=last", "prompt=Shall", "max_new_tokens=1", "accelerator=cpu")
    said = capfd.readouterr()
    assert said.err.endswith(
        "train/loss_epoch 1.5000 of best.ckpt, the lowest of 1 runs measured alike; 0 others are not ranked\n"
    )
    assert said.out.startswith("Shall")
    assert len(said.out.splitlines()) <= 2


def test_a_damaged_result_is_left_out(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    runs.add("damaged", "abc")
    good = runs.add("good", 2.0)
    assert best_run() == good
    assert "result.json is damaged: best=abc: input should be a valid number; this run is left out" in caplog.text


def test_no_run_with_a_best_checkpoint(runs: Runs) -> None:
    runs.add("latest", None)
    with pytest.raises(ConfigError, match="run=best: no run has a best checkpoint by val/loss"):
        best_run()
