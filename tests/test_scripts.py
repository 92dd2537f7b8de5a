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
import torch
from conftest import ROOT, TINY, Script
from omegaconf import OmegaConf
from torch.nn.functional import cross_entropy

from language_model import plan
from language_model.runs.config import build

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


@pytest.fixture
def nanogpt(goals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("nanogpt")
    monkeypatch.setattr(module, "run_in_new_process", lambda function, *arguments: function(*arguments))
    return module


# Five batches in an epoch: with two for a step, the last step of an epoch has one. With SGD and a large rate, and
# without clipping, a gradient of half the size changes the losses.
FIVE_BATCHES = [
    "trainer.limit_train_batches=1.0", "data.stride=16", "data.batch_size=16", "model.dropout=0", "optimizer=sgd",
    "trainer.precision=32-true", "trainer.gradient_clip_val=1e9", "optimizer.lr=1", "optimizer.momentum=0",
]  # fmt: skip


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_plain_loop_does_what_the_run_does(train, goals: ModuleType, accumulated: int) -> None:
    run = train(*FIVE_BATCHES, f"trainer.accumulate_grad_batches={accumulated}")
    loop = goals.plain_loop(str(run.folder))
    assert loop["num_steps"] == run.result["steps"]
    assert loop["loss"] == pytest.approx(sum(run.losses) / 2, rel=1e-5)
    assert 0 < loop["optimizer_seconds"] < loop["training_seconds"]


def test_a_step_of_the_plain_loop_has_the_gradient_of_one_large_batch(
    goals: ModuleType, corpora: str, tmp_path: Path
) -> None:
    planned = plan(*TINY, *FIVE_BATCHES, corpora, "trainer.accumulate_grad_batches=2")
    OmegaConf.save(planned.config, tmp_path / "config.yaml", resolve=True)
    config, losses, step = planned.config, [], 0
    torch.manual_seed(config.seed)
    data, network = build(config, "data"), build(config, "model")
    optimizer, schedule = torch.optim.SGD(network.parameters(), lr=1), build(config, "schedule")
    for epoch in range(config.trainer.max_epochs):
        loader = data.train_dataloader()
        loader.batch_sampler.epoch = partial(int, epoch)
        batches = list(loader)
        for few in (batches[:2], batches[2:4], batches[4:]):
            inputs, targets = (torch.cat(parts) for parts in zip(*few, strict=True))
            optimizer.param_groups[0]["lr"] = schedule(step)
            loss = cross_entropy(network(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(few)
            step += 1
    loop = goals.plain_loop(str(tmp_path))
    assert loop["num_steps"] == step == 6
    assert loop["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_nanogpts_recipe_runs_on_any_text(nanogpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 different characters, and not the 65 of tiny Shakespeare."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i % 100) for i in range(3_000)), encoding="utf-8")
    for name, value in {"STEPS": 250, "C": 32, "B": 4}.items():
        monkeypatch.setattr(nanogpt, name, value)
    done = nanogpt.run_nanogpt(str(text), None)
    assert done["loss"] < 0.9 * math.log(100)
    assert 0 < done["training_seconds"] < done["command_seconds"]
    train, val, vocab_size = nanogpt.split_tokens(str(text))
    assert (len(train), len(val), train[:3].tolist(), vocab_size) == (2_700, 300, [0, 1, 2], 100)


STAND_IN = {
    "model.py": """
import torch
from torch.nn.functional import cross_entropy
class GPTConfig:
    def __init__(self, vocab_size): self.vocab_size = vocab_size
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(config.vocab_size))
    def forward(self, inputs, targets):
        logits = self.logits.expand(*inputs.shape, -1)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())
""",
    "train.py": """
import pickle, sys
import numpy as np
import torch
from pathlib import Path
folder = Path(sys.argv[-1].removeprefix("--out_dir="))
vocab_size = pickle.loads(Path("data/shakespeare_char/meta.pkl").read_bytes())["vocab_size"]
counts = np.bincount(np.fromfile("data/shakespeare_char/train.bin", np.uint16), minlength=vocab_size)
saved = {"model_args": {"vocab_size": vocab_size}, "model": {"logits": torch.from_numpy(counts).float().log()}}
torch.save(saved, folder / "ckpt.pt")
for step, ms in enumerate((10, 20, 900, 30)):
    print(f"iter {step}: loss 1.0, time {ms}.00ms, mfu 1%")
""",
}


def test_a_checkouts_loss_is_that_of_its_weights_over_the_whole_split(nanogpt: ModuleType, tmp_path: Path) -> None:
    """nanoGPT's place is taken by a network of letter frequencies, whose loss is known."""
    (tmp_path / "checkout" / "data" / "shakespeare_char").mkdir(parents=True)
    for name, code in STAND_IN.items():
        (tmp_path / "checkout" / name).write_text(code)
    (tmp_path / "text.txt").write_text("aaab" * 500)
    done = nanogpt.run_nanogpt(str(tmp_path / "text.txt"), str(tmp_path / "checkout"))
    predicted = "aaab" * 50
    expected = [-math.log(0.75 if letter == "a" else 0.25) for letter in predicted[1:]]
    assert done["loss"] == pytest.approx(sum(expected) / len(expected))
    assert done["training_seconds"] == pytest.approx(0.010 + 0.020 + 0.025 + 0.030)  # 900 ms had an evaluation in it


def test_a_recipes_loss_is_judged_against_nanogpts_of_the_same_run(
    goals: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("not tiny Shakespeare")
    config = OmegaConf.create({"rounds": 2, "path": str(text), "nanogpt": None})
    seconds = {"training_seconds": 10.0, "command_seconds": 12.0}
    losses = iter([1.4, 1.5, 1.4, 1.5, 1.4, 1.5])
    monkeypatch.setattr(goals, "train", lambda *_: seconds | {"loss": next(losses)})
    monkeypatch.setattr(goals, "run_nanogpt", lambda *_: seconds | {"loss": 1.46})
    (*_, reached), _ = goals.time_to_loss(config)
    assert reached == "1 to 1; 10.0 s over 10.0 s; val/loss 1.4500 ± 0.0707 against 1.4600"
    monkeypatch.setattr(goals, "run_nanogpt", lambda *_: seconds | {"loss": 1.44})
    (*_, missed), _ = goals.time_to_loss(config)
    assert missed.endswith("1.4500 ± 0.0707, not reached against 1.4400")
    (row,) = goals.recipe_loss(3, config)
    assert row[2:4] == ("no goal for this text", "1.4500 ± 0.0707")
    assert row[4] == "whole command 12 s (12 to 12), steps 10 s; nanoGPT 1.4400 in 12 s"


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("goals=[10]", "goals=[10]: there are 1 to 9"),
        ("goals=[]", "goals=[]: there are 1 to 9"),
        ("goals=8", "goals=8: "),
        ("rounds=0", "rounds=0: "),
        ("path=nothing.txt", "path: nothing.txt does not exist"),
        ("path={tmp}/short.txt", "path: {tmp}/short.txt has 5 characters; nanoGPT's recipe needs more than 640"),
        ("path={tmp}/picture.png", "path: 'utf-8' codec can't decode byte 0xff in position 0"),
        ("nanogpt=nowhere", "nanogpt: nowhere/train.py does not exist"),
    ],
)
def test_a_wrong_setting_of_the_benchmark_is_refused(
    goals: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: str, says: str
) -> None:
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "picture.png").write_bytes(b"\xff" * 1000)
    argument = argument.replace("{tmp}", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["goals.py", f"path={ROOT / 'README.md'}", argument])
    with pytest.raises(SystemExit) as stopped:
        goals.main()
    assert str(stopped.value).startswith(f"error: {says.replace('{tmp}', str(tmp_path))}")


@pytest.mark.parametrize("name", ["chapter", "data", "generate"])
def test_no_rounds_are_refused(goals: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "rounds=0"])
    with pytest.raises(SystemExit, match="error: rounds=0: input should be greater than 0"):
        runpy.run_path(str(ROOT / "scripts" / "benchmarks" / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
def test_the_benchmark_as_a_user_runs_it(script: Script, tmp_path: Path) -> None:
    sonnets = ROOT / "src" / "language_model" / "sonnets.txt"
    done = script("benchmarks/goals.py", "goals=[8,9]", "rounds=1", f"path={sonnets}", "table=table.md")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| 9 | `scripts/train.py --help` | ≤ 1 s |" in table
    assert "| goal | what | wanted | reached | spread |" in done.stdout
