"""What comes after training: load_run and generate.py, from a run's folder alone. evaluate.py: test_evaluate.py."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, Run, run_script
from omegaconf import OmegaConf

from language_model.model.gpt import GPT
from language_model.runs import folder as run
from language_model.runs.config import ConfigError
from language_model.runs.load import load_run

STORED = Path(__file__).parent / "stored_run"


@pytest.fixture
def script(capsys: pytest.CaptureFixture):
    """Run a script in this process; return what it prints."""

    def start(name: str, *arguments: str) -> str:
        run_script(name, *arguments)
        return capsys.readouterr().out

    return start


def refused(script, name: str, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        script(name, *arguments)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory, corpora: str) -> Run:
    folder = tmp_path_factory.mktemp("original")
    text = folder / "text.txt"
    text.write_text("Всё смешалось в доме Облонских. " * 60, encoding="utf-8")
    overrides = ["data=text", f"data.path={text}", "data.batch_size=8", "optimizer.lr=0.01", "tokenizer=byte"]
    run_script("train.py", *TINY, corpora, f"folder={folder / 'run'}", *overrides)
    return Run(folder / "run")


@pytest.fixture
def trained(original: Run, tmp_path: Path) -> Run:
    """Return a copy of the run, for each test its own, at a fraction of the time of a training."""
    return Run(Path(shutil.copytree(original.folder, tmp_path / "run")))


def test_a_stored_run_of_the_first_format_loads() -> None:
    """What was saved when checkpoints had format 1 gives the logits that it gave then."""
    loaded = load_run(STORED, "last")
    assert torch.load(loaded.checkpoint, weights_only=True)["format"] == 1
    assert not loaded.network.training
    tokens = torch.from_numpy(loaded.tokenizer.encode("Shall I")).long()
    with torch.no_grad():
        logits = loaded.network(tokens[None])[0, -1]
    expected = torch.tensor(json.loads((STORED / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.model.d_model == 8


def test_a_run_is_loaded_as_it_was_trained(trained: Run) -> None:
    loaded = load_run(trained.folder, "last")
    weights = trained.checkpoint("last")["state_dict"]
    assert all(torch.equal(weight, weights[f"network.{name}"]) for name, weight in loaded.network.state_dict().items())
    assert load_run(str(trained.folder)).checkpoint.name == "best.ckpt"
    assert load_run(trained.folder, str(trained.folder / "checkpoints" / "last.ckpt")).checkpoint.name == "last.ckpt"


def test_the_best_run_is_one_on_the_same_data(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "outputs" / "runs"
    for name, best, path in (("a", 3.0, "x"), ("b", 2.0, "x"), ("c", 1.0, "y"), ("d", 2.5, "x")):
        shutil.copytree(trained.folder, runs / name)
        result = trained.result | {"best": best}
        (runs / name / "result.json").write_text(json.dumps(result))
        config = (trained.folder / "config.yaml").read_text().replace(trained.config["data"]["path"], path)
        (runs / name / "config.yaml").write_text(config)
    monkeypatch.setattr(run, "RUNS", runs)
    monkeypatch.setattr(run, "SWEEPS", tmp_path / "none")
    assert load_run("best").folder == runs / "b"


@pytest.mark.parametrize(
    ("trained_with", "precision", "loaded_with"), [("fused", "bf16-mixed", "unfused"), ("unfused", "32-true", "fused")]
)
def test_attention_is_that_of_the_machine_that_loads(
    trained: Run, tmp_path: Path, trained_with: str, precision: str, loaded_with: str
) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "elsewhere"))
    config = OmegaConf.load(folder / "config.yaml")
    config.model.attention, config.trainer.precision = trained_with, precision
    OmegaConf.save(config, folder / "config.yaml")
    assert load_run(folder, "last").config.model.attention == loaded_with
    assert load_run(folder, "last", as_trained=True).config.model.attention == trained_with


def test_generation_goes_on_from_the_prompt(trained: Run, script, tmp_path: Path, monkeypatch) -> None:
    arguments = [f"run={trained.folder}", "max_new_tokens=30", "accelerator=cpu"]
    said = script("generate.py", *arguments, "prompt=Всё", "seed=1")
    assert said.startswith("Всё")
    assert len(said) > 10
    (tmp_path / "prompt.txt").write_text("Всё", encoding="utf-8")
    assert script("generate.py", *arguments, f"prompt_file={tmp_path / 'prompt.txt'}", "seed=1") == said
    monkeypatch.setattr(sys, "stdin", io.StringIO("Всё"))
    assert script("generate.py", *arguments, "prompt=-", "seed=1") == said
    assert script("generate.py", *arguments, "prompt=Всё", "seed=2") != said
    both = script("generate.py", *arguments, "prompt=Всё", "seed=1", "num_samples=2")
    assert both.startswith(said.rstrip("\n"))
    assert "-" * 80 in both
    greedy = [script("generate.py", *arguments, "prompt=Всё", "temperature=0", f"seed={i}") for i in (1, 2)]
    assert greedy[0] == greedy[1]
    assert script("generate.py", *arguments, "prompt=Всё", "top_p=1e-9") == greedy[0]
    assert len(script("generate.py", *arguments)) > 10  # with no prompt at all


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=nothing"], "run=nothing: no such run"),
        (["prompt=''"], "prompt: it is empty; at least one token is needed"),
        (["prompt=Shall 1"], "prompt: character '1' (U+0031) at position 6 is not among the tokenizer's 43"),
        (["temperature=-1"], "temperature=-1: input should be greater than or equal to 0"),
        (["top_k=0"], "top_k=0: input should be greater than 0"),
        (["top_p=0"], "top_p=0: input should be greater than 0"),
        (["top_p=2"], "top_p=2: input should be less than or equal to 1"),
        (["max_new_tokens=0"], "max_new_tokens=0: input should be greater than 0"),
        (["num_samples=0"], "num_samples=0: input should be greater than 0"),
        (["prompt_file=nothing.txt"], "prompt_file: nothing.txt: no such file"),
        (["prompt=a", "prompt_file=b"], "prompt and prompt_file: one of them is enough"),
        (["checkpoint=nothing.ckpt"], "checkpoint=nothing.ckpt: nothing.ckpt does not exist; available: last"),
        (["accelerator=abacus"], "accelerator=abacus: "),
        (["tmperature=1"], "tmperature: unknown key; did you mean temperature?"),
    ],
)
def test_generation_refuses(script, arguments: list[str], says: str) -> None:
    assert says in refused(script, "generate.py", f"run={STORED}", "checkpoint=last", *arguments)


def test_a_run_that_judged_no_weights_gives_its_last_ones(
    train, script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    run_without = train("callbacks.best=null", "data.val_fraction=0.1")
    assert load_run(run_without.folder).checkpoint.name == "last.ckpt"
    said = script("evaluate.py", f"run={run_without.folder}", "accelerator=cpu")
    assert "best.ckpt does not exist, as the run judged no weights; taking last.ckpt" in said
    assert script("generate.py", f"run={run_without.folder}", "max_new_tokens=3", "prompt=Shall").startswith("Shall")


def test_a_best_checkpoint_that_was_removed_is_missed(trained: Run) -> None:
    (trained.folder / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint=best: .*best.ckpt does not exist; available: last"):
        load_run(trained.folder)


@pytest.mark.parametrize("name", ["generate.py", "evaluate.py"])
def test_a_checkpoint_of_another_network_is_refused_in_one_line(
    trained: Run, shared_run: Run, script, name: str
) -> None:
    theirs = shared_run.folder / "checkpoints" / "last.ckpt"
    assert f"of another run than {trained.folder}: add run={shared_run.folder}" in refused(
        script, name, f"run={trained.folder}", f"checkpoint={theirs}"
    )
    other = shutil.copy(theirs, trained.folder / "other.ckpt")
    message = refused(script, name, f"run={trained.folder}", f"checkpoint={other}")
    assert "other.ckpt belongs to another network: " in message
    assert re.search(r": \S+ has the shape \(43, 16\) there and \(\d+, 16\) here$", message)


@pytest.mark.parametrize("name", ["generate.py", "evaluate.py"])
def test_a_damaged_checkpoint_is_refused_in_one_line(trained: Run, script, name: str) -> None:
    file = trained.folder / "checkpoints" / "best.ckpt"
    content = bytearray(file.read_bytes())
    first, *_ = trained.checkpoint("best")["state_dict"].values()
    content[content.index(first.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    assert "checkpoint: " in (message := refused(script, name, f"run={trained.folder}"))
    assert "best.ckpt is damaged: the checksum of archive/data/0 differs" in message


@pytest.mark.parametrize("node", ["model", "data", "trainer"])
def test_a_config_that_lacks_a_node_is_refused(trained: Run, node: str) -> None:
    config = OmegaConf.load(trained.folder / "config.yaml")
    for value in (None, "text", 3):
        config[node] = value
        OmegaConf.save(config, trained.folder / "config.yaml")
        with pytest.raises(ConfigError, match=rf"config.yaml is damaged, or not a run's config: no {node}"):
            load_run(trained.folder)


def test_the_longest_context_of_a_network_that_does_not_say_is_the_runs(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = GPT.__init__

    def without_length(self: GPT, *args: object, **settings: object) -> None:
        made(self, *args, **settings)
        del self.max_seq_len

    monkeypatch.setattr(GPT, "__init__", without_length)
    assert load_run(trained.folder).network.max_seq_len == 16
