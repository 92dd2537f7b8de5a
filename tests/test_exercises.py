"""The chapter's exercises, on runs that are made up; their experiments take steps in test_train.py."""

import json
from pathlib import Path

import pytest
import yaml

from language_model.sweeps import exercises


def a_run(folder: Path, settings: dict, metrics: dict[str, list[float]], **result) -> Path:
    """Write what an exercise reads of a run; the metrics have a point for each step of 1, or epoch."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "monitor": "train/loss_epoch"} | settings))
    finished = {"status": "finished", "metrics": {}, "uniform_baseline": 4.0, "seconds": 1.0, "steps": 10, "epochs": 1}
    (folder / "result.json").write_text(json.dumps(finished | result))
    names = list(metrics)
    lines = [f"step,{','.join(names)}"]
    lines += [f"{step},{','.join(map(str, row))}" for step, row in enumerate(zip(*metrics.values(), strict=True))]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def said(folder: Path) -> list[list[str]]:
    page = (folder / "exercise.md").read_text().splitlines()
    assert (folder / "exercise.png").read_bytes().startswith(b"\x89PNG")
    return [[cell.strip() for cell in line.split(" | ")] for line in page if line.startswith("| ")][2:]


def test_exercise_1(tmp_path: Path) -> None:
    losses = {"train/loss_epoch": [3.0, 1.75]}
    runs = [
        a_run(tmp_path / "low", {"optimizer": {"lr": 1e-6}}, {"train/loss_epoch": [3.8, 3.75]}),
        a_run(tmp_path / "mid", {"optimizer": {"lr": 3e-4}}, losses),
        a_run(tmp_path / "high", {"optimizer": {"lr": 1e-2}}, losses, status="failed", error="NonFiniteError: step 7"),
        tmp_path / "never-begun",
    ]
    exercises.learning_rates(tmp_path, runs)
    assert said(tmp_path) == [
        ["| LR=1e-02 → Final loss: NaN", "NaN or very high (training exploded) |"],
        ["| LR=3e-04 → Final loss: 1.7500", "~1.5-2.0 (good convergence) |"],
        ["| LR=1e-06 → Final loss: 3.7500", "~3.7-3.9 (barely learned anything) |"],
    ]


def test_exercise_2(tmp_path: Path) -> None:
    facts = {"steps": 40, "epochs": 2, "seconds": 12.34}
    sizes = (64, 4, 5)
    runs = [
        a_run(tmp_path / str(n), {"data": {"batch_size": n}}, {"train/loss_epoch": [2.0, n / 4]}, **facts)
        for n in sizes
    ]
    exercises.batch_sizes(tmp_path, runs)
    assert [line[0] for line in said(tmp_path)] == [
        "| Batch size= 4 → Loss: 1.0000, Steps/epoch: 20, Time: 12.3s",
        "| Batch size= 5 → Loss: 1.2500, Steps/epoch: 20, Time: 12.3s",
        "| Batch size=64 → Loss: 16.0000, Steps/epoch: 20, Time: 12.3s",
    ]
    assert [line[1][:10] for line in said(tmp_path)] == ["Loss: ~0.8", "– |", "Loss: ~1.5"]


@pytest.mark.parametrize(("clip", "clipped"), [(1.0, "Clipped steps: 2 (20.0%)"), (None, "Clipped steps: 0 (0.0%)")])
def test_exercise_3(tmp_path: Path, clip: float | None, clipped: str) -> None:
    norms = [2.0, 4.0, *[0.5] * 7, 0.25]
    run = a_run(tmp_path / "run", {"trainer": {"gradient_clip_val": clip}}, {"train/grad_norm": norms})
    exercises.gradient_norms(tmp_path, [run])
    assert [line[0].removeprefix("| ") for line in said(tmp_path)] == [
        "Total steps: 10", clipped, "Max gradient norm: 4.0000 (step 2)", "Mean gradient norm: 0.9750",
        "First tenth: 2.0000, last tenth: 0.2500", "Final gradient norm: 0.2500",
    ]  # fmt: skip


def test_exercise_4(tmp_path: Path) -> None:
    losses = {"train/loss_epoch": [3.0, 2.0, 1.0, 1.5, 1.5, 1.5, 1.5]}
    facts = {"stopped_early": "no improvement", "restored_best": True}
    run = a_run(tmp_path / "run", {"trainer": {"max_epochs": 100}}, losses, **facts)
    exercises.early_stopping(tmp_path, [run])
    assert [line[0].removeprefix("| ").replace("\\|", "|") for line in said(tmp_path)] == [
        "Epoch   0 | Loss: 3.0000 | No improvement for: 0 epochs",
        "Epoch   5 | Loss: 1.5000 | No improvement for: 3 epochs",
        "Early stopping at epoch 6!",
        "Best loss: 1.0000, of epoch 2 (weights restored)",
    ]


def test_exercise_4_with_a_metric_of_which_higher_is_better(tmp_path: Path) -> None:
    metrics = {"val/accuracy": [0.1, 0.3, 0.2]}
    settings = {"trainer": {"max_epochs": 3}, "monitor": "val/accuracy", "monitor_mode": "max"}
    exercises.early_stopping(tmp_path, [a_run(tmp_path / "run", settings, metrics)])
    assert said(tmp_path)[-1][0].startswith("| Best loss: 0.3000, of epoch 1")
