"""What several test files share."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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
    """Give tests two threads wherever they run, and keep what they set in the environment to themselves."""
    before = dict(os.environ)
    torch.set_num_threads(2)
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
