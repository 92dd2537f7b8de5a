"""What several test files share."""

import contextlib
import csv
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from language_model.files import write_json
from language_model.runs.monitor import choose_mode
from language_model.sweeps import job, summary

ROOT = Path(__file__).resolve().parents[1]

# Small enough that a run takes a second: the flow is under test, not the loss.
TINY = [
    "model.d_model=16", "model.n_heads=2", "model.n_layers=1", "model.d_ff=16", "model.max_seq_len=16",
    "trainer.max_epochs=2", "trainer.limit_train_batches=8", "trainer.log_every_n_steps=4",
    "trainer.accelerator=cpu", "callbacks.sample.max_new_tokens=8",
    "schedule.warmup_steps=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_machine_for_all() -> Iterator[None]:
    """Give every process one thread: the same sums on every machine, and no two tests fight over a core.

    What a test sets in the environment stays within this session.
    """
    before = dict(os.environ)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    yield
    os.environ.clear()
    os.environ.update(before)


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a script as a user does, from a directory that is not the project's."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


class Run:
    """A run's folder, read back."""

    def __init__(self, folder: Path, output: str = "") -> None:
        self.folder = folder
        self.output = output
        self.result = json.loads((folder / "result.json").read_text())
        self.config = yaml.safe_load((folder / "config.yaml").read_text())

    def column(self, name: str) -> list[float]:
        """A column of metrics.csv, without the rows where it is empty."""
        rows = csv.DictReader((self.folder / "metrics.csv").read_text().splitlines())
        return [float(row[name]) for row in rows if row[name]]

    @property
    def losses(self) -> list[float]:
        return self.column("train/loss_epoch")

    def checkpoint(self, name: str) -> dict:
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def run_script(name: str, *arguments: str) -> None:
    """Run a script in this process, where its modules are imported already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the override that keeps prepared corpora out of the project's outputs, in one place for all runs."""
    return f"data.cache={tmp_path_factory.getbasetemp() / 'corpora'}"


@pytest.fixture
def train(tmp_path: Path, corpora: str, capsys: pytest.CaptureFixture):
    """Run scripts/train.py in this process, writing to a folder of the test's."""

    def start(*overrides: str, name: str | None = "run", tiny: bool = True) -> Run | None:
        folder = tmp_path / (name or "")
        constant = any(
            o.startswith(("schedule=constant", "experiment=exercise_")) for o in overrides
        )  # which has no warmup to set
        arguments = [*(TINY[:-1] if constant else TINY if tiny else []), corpora]
        arguments += [*([f"folder={folder}"] if name else []), *overrides]
        run_script("train.py", *arguments)
        return Run(folder, capsys.readouterr().out) if name else None

    return start


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory, corpora: str) -> Run:
    """Train once, with TINY and no other overrides, for all tests that read a run and change nothing in it."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_script("train.py", *TINY, corpora, f"folder={folder}")
    return Run(folder, output.getvalue())


Sweep = Callable[..., str]


class Accuracy(L.Callback):
    """Logs a made-up metric of which a higher value is better, at the end of each epoch: it rises by 0.1 a step."""

    def __init__(self, name: str = "train/accuracy") -> None:
        self.name = name

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log(self.name, 0.1 * trainer.global_step)


ACCURACY = ["+callbacks.accuracy._target_=conftest.Accuracy", "monitor=train/accuracy"]


class Jobs:
    """Made-up runs: what each comes to is a function of its config."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.outcome: Callable[[DictConfig], float | str] = lambda config: config.optimizer.lr
        self.best: Callable[[DictConfig], float | str] = lambda config: self.outcome(config)  # during the run
        self.config: DictConfig

    def run_job(self, config: DictConfig) -> None:
        self.config = config
        real_run_job(config)

    def run_in_subprocess(self, folder: Path, launcher: str, environment: dict[str, str]) -> str | None:
        self.done.append(folder.name)
        OmegaConf.save(self.config, folder / "config.yaml", resolve=True)
        came_to = self.outcome(self.config)
        metric = self.config.monitor or "train/loss_epoch"
        mode = choose_mode("monitor_mode", metric, self.config.monitor_mode)
        result = {
            "steps": 10,
            "epochs": 1,
            "uniform_baseline": 4.0,
            "seconds": 2.0,
            "monitor": metric,
            "monitor_mode": mode,
        }
        result |= {"best": self.best(self.config), "metrics": {metric: came_to}}
        if isinstance(came_to, str):
            result = {"status": "failed", "error": came_to}
        write_json(folder / "result.json", {"status": "finished"} | result)
        return came_to if isinstance(came_to, str) else None


real_run_job = job.run_job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made_up = Jobs()
    monkeypatch.setattr(job, "run_job", made_up.run_job)
    monkeypatch.setattr(job, "run_in_subprocess", made_up.run_in_subprocess)
    monkeypatch.setattr(summary, "plot_sweep", lambda series, metric, file: None)  # takes half a second
    return made_up


@pytest.fixture
def multirun(capsys: pytest.CaptureFixture, tmp_path: Path) -> Sweep:
    """Run scripts/train.py -m in this process; return what it says."""

    def start(*overrides: str) -> str:
        run_script("train.py", "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides)
        return capsys.readouterr().out

    return start


def refused_sweep(multirun: Sweep, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        multirun(*overrides)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message
