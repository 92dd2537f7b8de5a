"""One job of a sweep: a run in a process of its own, so that nothing of one job reaches the next."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from language_model.files import ROOT
from language_model.runs.command_line import ONE_LINE, quote_override
from language_model.runs.records import read_job, update_job
from language_model.sweeps import summary
from language_model.terminal import JOB_LABEL

INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit statuses of a run that was stopped from outside


def run_job(config: DictConfig) -> None:
    """Do one job of a sweep, as Hydra's launchers call it, and update the sweep's summary."""
    folder = Path(config.folder)
    update_job(folder, error=None)
    launcher = HydraConfig.get().launcher._target_.rpartition(".")[2]
    wants_own_gpu = launcher == "JoblibLauncher" and config.trainer.devices == "auto"
    environment = reserve_gpu(folder.parent) if wants_own_gpu else nullcontext[dict[str, str]]({})
    with environment as gpu:
        error = run_in_subprocess(folder, launcher, gpu)
    update_job(folder, error=error, ended=time.time())
    summary.update(folder.parent)


@contextmanager
def reserve_gpu(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment that gives a job one GPU: a free one by the locks in `folder`, or if none is, any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    for gpu in visible if len(visible) > 1 else ():
        with suppress(Timeout), FileLock(folder / f".gpu-{gpu}.lock", timeout=0):
            yield {"CUDA_VISIBLE_DEVICES": gpu}
            return
    yield {"CUDA_VISIBLE_DEVICES": visible[os.getpid() % len(visible)]} if len(visible) > 1 else {}


def run_in_subprocess(folder: Path, launcher: str, environment: dict[str, str]) -> str | None:
    """Run a job in a process of its own; return why it failed, None if it finished or was interrupted.

    Args:
        folder: the job's.
        launcher: class name of Hydra's launcher.
        environment: variables for the process, besides this one's.
    """
    errors, parent = folder / "stderr.txt", os.getppid()
    lines: list[str] = []
    with errors.open("w", encoding="utf-8") as stderr:
        process = start_process(folder, launcher, environment, stderr)
        status = wait_for(process, parent if launcher == "JoblibLauncher" else None)
    with suppress(FileNotFoundError):  # the same sweep, started twice, has the same file
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if not lines:
            errors.unlink()
    if status in (0, *INTERRUPTED):
        return None
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return lines[-1].removeprefix("error: ") if lines else f"ended with status {status}"


def start_process(folder: Path, launcher: str, environment: dict[str, str], stderr: Any) -> subprocess.Popen[bytes]:
    """Start the process of a job."""
    job = read_job(folder)
    variables = {**os.environ, **environment, JOB_LABEL: job["label"]}
    for name in ("HYDRA_FULL_ERROR", ONE_LINE):  # `entry_point` sets them while Hydra runs
        variables.pop(name, None)
    script, folder_override = ROOT / "scripts" / "train.py", quote_override(f"folder={folder}", ("folder",))
    return subprocess.Popen(
        [sys.executable, str(script), *job["overrides"], folder_override, "hydra.mode=RUN"],
        env=variables,
        stdin=subprocess.PIPE,  # closes when this process ends, however it does; the job then stops
        stdout=None if launcher == "BasicLauncher" else subprocess.DEVNULL,  # a terminal has room for one bar
        stderr=stderr,
        start_new_session=True,  # Ctrl-C reaches it through this process only, so once
    )


def wait_for(process: subprocess.Popen[bytes], parent: int | None) -> int:
    """Return the process's exit status; when this process is interrupted, or loses its parent, stop that one first."""
    with process:
        try:
            while process.poll() is None:
                if parent is not None and os.getppid() != parent:  # joblib's workers outlive the sweep
                    process.terminate()
                    process.wait()
                    os._exit(1)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode


def stop_with_parent() -> None:
    """In a job's process: stop as on SIGTERM when the sweep's process has ended, however it did."""

    def wait() -> None:
        os.read(0, 1)  # the sweep holds the other end of this pipe and writes nothing: returns when it closes
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
