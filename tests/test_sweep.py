"""Sweeps: planned, done, gone on with and summed up; the runs themselves are made up where they do not matter."""

import csv
import json
import os
import queue
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Jobs, Run, Script, Sweep, refused_sweep

from language_model.runs.config import ConfigError
from language_model.sweeps import job, summary
from language_model.sweeps.sweep import no_slurm


def test_a_sweep_does_every_combination_and_sums_it_up(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    jobs.outcome = lambda config: config.optimizer.lr * 100 + config.seed
    jobs.best = lambda config: 9 - jobs.outcome(config)  # says the opposite, and decides nothing
    said = multirun("optimizer.lr=1e-2,3e-2", "seed=1,3", "data.batch_size=8")
    assert jobs.done == [f"optimizer.lr={lr},seed={seed}" for lr in (0.01, 0.03) for seed in (1, 3)]
    assert "4 jobs, 0 of them finished" in said
    assert "[4/4] optimizer.lr=0.03,seed=3: final train/loss_epoch 6.0000, finished in 2.0 s\n" in said
    page = (tmp_path / "sweep" / "summary.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| 0")] == [
        "| 0.01 | 3.0000 ± 1.4142 | 6.0000 ± 1.4142 | 2 | 2.0 s |",
        "| 0.03 | 5.0000 ± 1.4142 | 4.0000 ± 1.4142 | 2 | 2.0 s |",
    ]
    final, best = "train/loss_epoch at the end of the run (mean ± s.d.)", "best of the run's epochs (mean ± s.d.)"
    assert f"| optimizer.lr | {final} | {best} | seeds | time a job |" in page
    again = "scripts/train.py optimizer.lr=0.01 seed=1 data.batch_size=8"
    assert again in page
    assert again in said
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [(row["optimizer.lr"], row["seed"], float(row["final"])) for row in rows] == [
        ("0.01", "1", 2.0), ("0.01", "3", 4.0), ("0.03", "1", 4.0), ("0.03", "3", 6.0),
    ]  # fmt: skip
    assert "data.batch_size" not in rows[0]  # does not vary


@pytest.mark.slow
def test_a_sweep_typed_again_does_what_is_left(multirun: Sweep, jobs: Jobs) -> None:
    jobs.outcome = lambda config: "out of memory" if config.seed == 2 else float(config.seed)
    message = refused_sweep(multirun, "optimizer.lr=1e-2", "seed=1,2,3")
    assert message == "error: 1 of 3 jobs did not finish; the same command tries them again"
    assert jobs.done == ["seed=1", "seed=2", "seed=3"]  # one that fails stops no other
    jobs.done.clear()
    jobs.outcome = lambda config: float(config.seed)
    multirun("optimizer.lr=1e-2", "seed=1,2,3")
    assert jobs.done == ["seed=2"]  # is tried again
    jobs.done.clear()
    multirun("optimizer.lr=1e-2", "seed=1,2,3,4")
    assert jobs.done == ["seed=4"]  # was added
    jobs.done.clear()
    multirun("optimizer.lr=1e-2,2e-2", "seed=1,2,3,4")  # what was the same for all is swept over now
    assert jobs.done == [f"optimizer.lr=0.02,seed={seed}" for seed in (1, 2, 3, 4)]
    jobs.done.clear()
    multirun("optimizer.lr=1e-2", "seed=2,3", "trainer.max_epochs=60")  # a part of it, to a later end
    assert jobs.done == ["seed=2", "seed=3"]


def test_the_failures_are_told_with_their_reasons(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    jobs.outcome = lambda config: "out of memory" if config.seed < 3 else 1.0
    refused_sweep(multirun, "seed=1,2,3")
    page = (tmp_path / "sweep" / "summary.md").read_text()
    assert "1 of 3 jobs finished." in page
    assert "- `seed=1`: out of memory" in page
    assert "| 1.0000 ± " not in page
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").read_text().splitlines()))
    assert [(row["seed"], row["status"], row["error"]) for row in rows] == [
        ("3", "finished", ""), ("1", "failed", "out of memory"), ("2", "failed", "out of memory"),
    ]  # fmt: skip


def test_another_sweep_under_the_same_name_is_refused(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun("optimizer.lr=1e-2,2e-2", "seed=1")
    jobs.done.clear()
    before = {file: file.read_bytes() for file in (tmp_path / "sweep").rglob("*") if file.is_file()}
    for overrides, found in (
        (["optimizer.lr=1e-2,2e-2", "seed=2"], "seed=1 then, 2 now; choose another name"),
        (["optimizer.lr=1e-2,2e-2"], "seed=1 then, (not set) now"),
        (["optimizer.lr=1e-2,2e-2", "seed=1", "model=nano"], "model=(not set) then, nano now"),
        (["seed=1,2"], "optimizer.lr=0.01,0.02 then, (not set) now"),
    ):
        assert found in refused_sweep(multirun, *overrides)
    assert jobs.done == []
    assert before == {file: file.read_bytes() for file in (tmp_path / "sweep").rglob("*") if file.is_file()}


def test_a_finished_job_whose_settings_have_changed_is_refused(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun("seed=1,2")
    file = tmp_path / "sweep" / "seed=1" / "config.yaml"
    file.write_text(file.read_text().replace("d_model: 64", "d_model: 32"))  # as if conf/ had been edited since
    assert "was trained with other settings: model.d_model=32 then, 64 now" in refused_sweep(multirun, "seed=1,2")


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["optimizer.lr=1e-3,abc"], "optimizer.lr=abc: "),
        (["optimizer.lr=1e-3,-1"], "optimizer.lr=-1: input should be greater than 0"),
        (["optimizer.rate=1,2"], "optimizer.rate: unknown key"),
        (["model=small,tiny"], "model=tiny: there is no such file in conf/model"),
        (["seed=range(0,101)"], "hydra.sweeper.max_jobs=100: these are 101 jobs or more"),
        (["seed=range(0,1000000000)"], "hydra.sweeper.max_jobs=100: these are 101 jobs"),
        (["hydra.sweeper.max_jobs=0", "seed=1,2"], "hydra.sweeper.max_jobs=0: input should be greater than 0"),
        (["hydra.sweeper.max_jobs=many", "seed=1,2"], "hydra.sweeper.max_jobs=many: "),
        (["name=a,b"], "name=a,b: a sweep has one name"),
        (["monitor=train/loss_epoch,val/loss"], "monitor=train/loss_epoch,val/loss: a sweep has one monitor"),
        (["folder=here", "seed=1,2"], "folder: not for a sweep; the same command resumes it"),
        (["resume=latest,other"], "resume: not for a sweep; the same command resumes it"),
        (["optimizer.lr=interval(1e-4,1e-2)"], "a search space needs hydra/sweeper=search"),
        (["hydra/launcher=cluster", "seed=1,2"], "hydra/launcher=cluster: there is no such file"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_job(
    multirun: Sweep, jobs: Jobs, tmp_path: Path, overrides: list[str], found: str
) -> None:
    assert found in refused_sweep(multirun, *overrides)
    assert jobs.done == []
    assert not (tmp_path / "sweep").exists()


def test_a_machine_without_slurm_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="this machine has no SLURM"), no_slurm():
        raise RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?')


@pytest.mark.slow
def test_the_picture(multirun: Sweep, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multirun("optimizer.lr=1e-2,1e-3,1e-4", "model.position=learned,rotary", "seed=1,2")
    monkeypatch.undo()
    for row in summary.read(tmp_path / "sweep"):
        (row.folder / "metrics.csv").write_text("step,train/loss_epoch\n0,3.0\n9,2.0\n")
    summary.update(tmp_path / "sweep")
    assert (tmp_path / "sweep" / "summary.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["step,train/loss_epoch\nabc,3.0\n", "train/loss_epoch\n3.0\n"])
def test_a_damaged_file_of_metrics_is_named(
    multirun: Sweep, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    multirun("seed=1,2")
    monkeypatch.undo()
    (tmp_path / "sweep" / "seed=1" / "metrics.csv").write_text(content)
    with pytest.raises(ConfigError, match=r"summary.png: .*seed=1/metrics.csv is damaged: "):
        summary.update(tmp_path / "sweep")


def test_a_default_that_is_typed_later_does_not_count_twice(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun("seed=1,2")
    multirun("seed=1,2", "data.batch_size=32,8")  # 32 is the default
    rows = summary.read(tmp_path / "sweep")
    assert [(group.setting, len(group.rows)) for group in summary.groups(rows)] == [
        ({"data.batch_size": "32"}, 2), ({"data.batch_size": "8"}, 2),
    ]  # fmt: skip


def test_jobs_of_different_metrics_have_no_best(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    multirun("seed=1", "data.batch_size=4,8")
    file = tmp_path / "sweep" / "data.batch_size=8" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"monitor": "val/loss", "metrics": {"val/loss": 0.1}}))
    rows = summary.update(tmp_path / "sweep")
    assert summary.best(rows) is None
    page = (tmp_path / "sweep" / "summary.md").read_text()
    assert "| data.batch_size | metric | at the end of the run | best of the run | time a job |" in page
    assert "| 8 | val/loss | 0.1000 |" in page


def test_a_folder_that_is_no_sweep_is_refused(multirun: Sweep, jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    assert "exists and is not a sweep" in refused_sweep(multirun, "seed=1,2")
    assert list((tmp_path / "sweep").iterdir()) == []


def test_jobs_of_one_name_get_folders_of_their_own(multirun: Sweep, jobs: Jobs) -> None:
    jobs.outcome = lambda config: 1.0
    multirun("callbacks.sample.prompt='a b','a?b'", "seed=1")
    assert len(set(jobs.done)) == 2
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._=,+-") for name in jobs.done)


def test_a_sweep_of_an_experiment(multirun: Sweep, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The exercises name their values; typed ones come first."""
    said = multirun("experiment=exercise_1_learning_rate", "optimizer.lr=1e-2,1e-3")
    assert jobs.done == ["optimizer.lr=0.01", "optimizer.lr=0.001"]
    assert "LR=1e-02 → Final loss: " in said
    assert "hydra.mode=RUN" in summary.command(summary.read(tmp_path / "sweep")[0])


def test_a_sweep_of_real_runs(script: Script, tmp_path: Path) -> None:
    overrides = [*TINY, f"hydra.sweep.dir={tmp_path}/sweep", "optimizer.lr=1e30,1e-3", "seed=1"]
    done = script("train.py", "-m", *overrides)
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 2 jobs did not finish; the same command tries them again\n"
    assert "warning: [1/2] optimizer.lr=1e+30: the gradient of step " in done.stdout
    assert [row.status for row in summary.read(tmp_path / "sweep")] == ["finished", "failed"]
    assert not (tmp_path / "sweep" / "optimizer.lr=0.001" / "stderr.txt").exists()


def test_jobs_beside_each_other_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with job.reserve_gpu(tmp_path) as none:
        assert none == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with job.reserve_gpu(tmp_path) as only:
        assert only == {}  # as it is
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with job.reserve_gpu(tmp_path) as first, job.reserve_gpu(tmp_path) as second, job.reserve_gpu(tmp_path) as third:
        assert [gpu["CUDA_VISIBLE_DEVICES"] for gpu in (first, second)] == ["2", "5"]
        assert third["CUDA_VISIBLE_DEVICES"] in ("2", "5")
    with job.reserve_gpu(tmp_path) as again:
        assert again == {"CUDA_VISIBLE_DEVICES": "2"}


def a_process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("", None),
        ("import sys; sys.exit('error: seed=1: wrong')", "ended with status 1"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("import sys; sys.exit(143)", None),  # interrupted: neither finished nor failed
    ],
)
def test_how_a_job_ended_is_known_by_its_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, error: str | None
) -> None:
    monkeypatch.setattr(job, "start_process", lambda *_: a_process(code))
    assert job.run_in_subprocess(tmp_path, "BasicLauncher", {}) == error
    assert not (tmp_path / "stderr.txt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_an_interrupted_sweep_stops_its_job_first(monkeypatch: pytest.MonkeyPatch) -> None:
    process = a_process("import sys; sys.stdin.read()")  # until it is stopped
    wait = process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait(60)

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.wait_for(process, parent=None)
    assert process.returncode == -signal.SIGTERM


def test_a_job_stops_itself_when_its_sweep_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, the_sweeps = os.pipe()
    read = os.read
    killed: queue.Queue[tuple[int, int]] = queue.Queue()
    monkeypatch.setattr(os, "read", lambda file, size: read(ours if file == 0 else file, size))
    monkeypatch.setattr(os, "kill", lambda *process_and_signal: killed.put(process_and_signal))
    job.stop_with_parent()
    assert killed.empty()
    os.close(the_sweeps)  # as the system does when the sweep's process ends, however it does
    assert killed.get(timeout=60) == (os.getpid(), signal.SIGTERM)
    os.close(ours)


def command(folder: Path, *overrides: str) -> list[str]:
    cache = f"data.cache={folder.parent / 'corpora'}"
    return [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", f"hydra.sweep.dir={folder}", cache, *overrides]


def wait_for(file: Path, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    assert file.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_stops_a_sweep_with_its_status_and_a_checkpoint(tmp_path: Path, sent: int, status: int) -> None:
    overrides = [*TINY, "trainer.max_epochs=100000", "seed=1,2"]
    with subprocess.Popen(command(tmp_path / "sweep", *overrides), stdout=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "sweep" / "seed=1" / "checkpoints" / "last.ckpt", process)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == status
    assert "was interrupted; the same command resumes it" in said
    assert json.loads((tmp_path / "sweep" / "seed=1" / "result.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "sweep" / "seed=2" / "config.yaml").exists()


TWELVE = [*TINY, "trainer.max_epochs=40", "callbacks.last.every_n_steps=20", "model.n_heads=1,2", "seed=1,2,3,4,5,6"]
TIMES = ("seconds", "train/tokens_per_sec")


def rows_of(folder: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_sweep_killed_three_times_comes_to_the_same_summary(tmp_path: Path, script: Script) -> None:
    assert subprocess.run(command(tmp_path / "whole", *TWELVE)).returncode == 0
    luck = random.Random(0)
    for _ in range(3):
        with subprocess.Popen(command(tmp_path / "killed", *TWELVE)) as process:
            time.sleep(luck.uniform(8, 40))
            process.kill()
    assert subprocess.run(command(tmp_path / "killed", *TWELVE)).returncode == 0
    assert len(rows_of(tmp_path / "killed")) == 12
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    # The seventh job is what it is alone, to the last bit.
    seventh = tmp_path / "whole" / "model.n_heads=2,seed=1"
    overrides = [each for each in TWELVE if "," not in each]
    assert script("train.py", *overrides, "model.n_heads=2", "seed=1", f"folder={tmp_path}/alone").returncode == 0
    assert Run(tmp_path / "alone").losses == Run(seventh).losses
    ours, theirs = Run(tmp_path / "alone").checkpoint("last"), Run(seventh).checkpoint("last")
    assert all(ours["state_dict"][name].equal(theirs["state_dict"][name]) for name in ours["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_jobs_side_by_side_come_to_the_same(tmp_path: Path, launcher: str) -> None:
    """With one thread each, as two jobs on two cores have."""
    overrides = [*TINY, "seed=1,2", "model.n_heads=1,2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one_by_one = subprocess.run(command(tmp_path / "serial", *overrides), env=environment)
    at_once = subprocess.run(command(tmp_path / "parallel", *overrides, f"hydra/launcher={launcher}"), env=environment)
    assert one_by_one.returncode == at_once.returncode == 0
    assert len(rows_of(tmp_path / "parallel")) == 4
    assert rows_of(tmp_path / "parallel") == rows_of(tmp_path / "serial")


@pytest.mark.slow
def test_data_parallel_jobs_in_a_sweep(tmp_path: Path) -> None:
    overrides = [*TINY, "trainer.devices=2", "trainer.strategy=ddp", "seed=1,2"]
    done = subprocess.run(command(tmp_path / "sweep", *overrides), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["finished", "finished"]
    assert sorted(path.name for path in (tmp_path / "sweep").glob("*/")) == ["seed=1", "seed=2"]
