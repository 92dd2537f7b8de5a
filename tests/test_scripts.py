"""scripts/prepare.py and the benchmarks, as a user runs them."""

import hashlib
import importlib
import json
import math
import runpy
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, Script

POEM = "Во дни сомнений, во дни тягостных раздумий\n" * 100


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run scripts/prepare.py in this process."""

    def start(*overrides: str) -> str:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(sys, "argv", ["prepare.py", f"data.cache={tmp_path / 'cache'}", *overrides])
        runpy.run_path(str(ROOT / "scripts" / "prepare.py"), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_a_corpus_is_prepared_and_its_size_printed(run, tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text(POEM, encoding="utf-8")
    said = run(f"data.path={tmp_path / 'poem.txt'}")
    assert [line.strip("│ ").split() for line in said.splitlines() if "│" in line] == [
        ["documents", "│", "1", "│", "1"],
        ["characters", "│", "3,870", "│", "430"],
        ["bytes", "│", "7,020", "│", "780"],
        ["tokens", "│", "3,870", "│", "430"],
        ["bytes", "a", "token", "│", "1.81", "│", "1.81"],
    ]
    assert "vocabulary 22, saved in " in said
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(f"data.path={tmp_path / 'poem.txt'}") == said
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_token_files_need_no_preparation(run, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(10_000))
    with pytest.raises(SystemExit, match="error: data: only text can be prepared"):
        run("data=bin", f"data.train_path={tmp_path / 'train.bin'}")


def test_a_corpus_that_is_downloaded(run, tmp_path: Path) -> None:
    folder = tmp_path / "served" / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    (folder / "input.txt").write_text(POEM, encoding="utf-8")
    sha256 = hashlib.sha256(POEM.encode()).hexdigest()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/data/tinyshakespeare/input.txt"
        with pytest.raises(SystemExit, match=r"its sha256 is .* download it by hand"):
            run("data=tinyshakespeare", f"data.url={url}")  # the checksum is that of the real corpus
        assert list((tmp_path / "cache").iterdir()) == []
        assert "3,870" in run("data=tinyshakespeare", f"data.url={url}", f"data.sha256={sha256}")
        server.shutdown()
        thread.join()
    assert "3,870" in run("data=tinyshakespeare", f"data.url={url}", f"data.sha256={sha256}")  # with no server


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_memory_stays_bounded(script: Script, tmp_path: Path) -> None:
    """What the benchmark measures, at small sizes; the limits are those for 2 GB and 100 GB."""
    figures = tmp_path / "figures.json"
    done = script(
        "benchmarks/data.py",
        "text_gb=0.02",
        "tokens_gb=100",
        "rounds=1",
        f"folder={tmp_path}/files",
        f"figures={figures}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert all(0 < prepared["mb"] < 200 for prepared in found["prepare"].values())
    assert all(loaded["mb"] < 50 for loaded in found["load"].values())
    assert list(tmp_path.iterdir()) == [figures]


@pytest.fixture
def goals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))  # as `python scripts/benchmarks/goals.py` has it
    return importlib.import_module("goals")


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_plain_loop_does_what_the_run_does(train, goals: ModuleType, accumulated: int) -> None:
    accumulate = f"trainer.accumulate_grad_batches={accumulated}"
    run = train("trainer.max_epochs=1", "model.dropout=0", "trainer.precision=32-true", accumulate)
    loop = goals.plain_loop(str(run.folder))
    assert loop["num_steps"] == run.result["steps"]
    assert loop["loss"] == pytest.approx(run.losses[0], rel=1e-5)
    assert 0 < loop["optimizer_seconds"] < loop["training_seconds"]


def test_nanogpt_loop_learns(goals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(33 + i % 65) for i in range(3_000))
    (tmp_path / "text.txt").write_text(text)
    nanogpt = importlib.import_module("nanogpt")
    monkeypatch.setattr(nanogpt, "STEPS", 110)
    done = nanogpt.nanogpt_loop(str(tmp_path / "text.txt"))
    assert done["loss"] < 0.9 * math.log(65)
    train, val = nanogpt.split_tokens(str(tmp_path / "text.txt"))
    assert (len(train), len(val), train[:3].tolist()) == (2_700, 300, [0, 1, 2])


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("goals=[10]", "goals=[10]: there are 1 to 9"),
        ("goals=[]", "goals=[]: there are 1 to 9"),
        ("goals=8", "goals=8: "),
        ("rounds=0", "rounds=0: "),
        ("path=nothing.txt", "path: nothing.txt does not exist"),
        ("nanogpt=nowhere", "nanogpt: nowhere/train.py does not exist"),
    ],
)
def test_a_wrong_setting_of_the_benchmark_is_refused(goals: ModuleType, monkeypatch, argument: str, says: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", f"path={ROOT / 'README.md'}", argument])
    with pytest.raises(SystemExit) as stopped:
        goals.main()
    assert str(stopped.value).startswith(f"error: {says}")


@pytest.mark.slow
def test_the_benchmark_as_a_user_runs_it(script: Script, tmp_path: Path) -> None:
    sonnets = ROOT / "src" / "language_model" / "sonnets.txt"
    done = script("benchmarks/goals.py", "goals=[8,9]", "rounds=1", f"path={sonnets}", "table=table.md")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| 9 | `scripts/train.py --help` | ≤ 1 s |" in table
    assert "| goal | what | wanted | reached | spread |" in done.stdout
