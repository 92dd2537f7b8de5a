"""evaluate.py: the figures of a trained run, on its own text and on others."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Run, run_script
from omegaconf import OmegaConf

from language_model.runs.load import load_run

TEXT = "Всё смешалось в доме Облонских.\r\n" * 60
FIGURES = ("loss", "perplexity", "bits_per_byte")


def train_in_float32(folder: Path, corpora: str, *overrides: str) -> Run:
    """Train on TEXT, whose last tenth is for validation."""
    (folder / "text.txt").write_bytes(TEXT.encode())
    settings = ["data=text", f"data.path={folder / 'text.txt'}", "data.batch_size=8", "tokenizer=byte"]
    rates = ["optimizer.lr=0.01", "trainer.precision=32-true"]
    run_script("train.py", *TINY, corpora, f"folder={folder / 'run'}", *settings, *rates, *overrides)
    return Run(folder / "run")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, corpora: str) -> Run:
    return train_in_float32(tmp_path_factory.mktemp("original"), corpora)


@pytest.fixture
def trained(original: Run, tmp_path: Path) -> Run:
    """Return a copy of the run, for each test its own."""
    return Run(Path(shutil.copytree(original.folder, tmp_path / "run")))


Evaluate = Callable[..., tuple[dict, str]]


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture) -> Evaluate:
    """Run evaluate.py in this process; return the figures that it saves, and what it prints."""

    def start(folder: Path, *arguments: str) -> tuple[dict, str]:
        output = tmp_path / "figures.json"
        capsys.readouterr()
        cache = f"data.cache={tmp_path / 'corpora'}"
        run_script("evaluate.py", f"run={folder}", cache, "accelerator=cpu", f"output={output}", *arguments)
        return json.loads(output.read_text()), capsys.readouterr().out

    return start


def change_config(folder: Path, **settings: object) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")


@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_evaluation_gives_the_figures_that_training_logged(
    tmp_path: Path, corpora: str, evaluate: Evaluate, attention: str
) -> None:
    sizes = ["model.d_model=32", "model.n_heads=4", "model.n_layers=2", "model.max_seq_len=24", "data.batch_size=2"]
    trained = train_in_float32(tmp_path, corpora, *sizes, f"model.attention={attention}", "model.dropout=0.1")
    figures, said = evaluate(trained.folder, "checkpoint=last")
    for name in FIGURES:
        assert figures[name] == trained.result["metrics"][f"val/{name}"]  # to the last digit
    assert figures["tokens"] == len(TEXT[int(len(TEXT) * 0.9) :].encode()) - 1  # the first one is predicted from none
    assert figures["step"] == trained.result["steps"]
    assert "last.ckpt, step 16, on text.txt, the validation split" in said
    assert f"loss (nats a token) │ {trained.result['metrics']['val/loss']:.4f}" in said
    assert f"tokens predicted    │ {figures['tokens']:,}" in said


def test_no_limit_of_the_run_limits_the_evaluation(trained: Run, evaluate: Evaluate) -> None:
    whole, _ = evaluate(trained.folder)
    limits = {"fast_dev_run": True, "overfit_batches": 1, "max_time": "00:00:00:00", "limit_val_batches": 1}
    change_config(trained.folder, **{f"trainer.{key}": value for key, value in limits.items()})
    assert evaluate(trained.folder)[0] == whole
    change_config(trained.folder, **{"trainer.fast_dev_run": False, "trainer.limit_val_batches": 0})
    assert evaluate(trained.folder)[0] == whole


def loss_by_hand(folder: Path, content: bytes) -> tuple[float, int]:
    """The mean loss in windows of 16 tokens, and the number of tokens predicted."""
    loaded = load_run(folder)
    ids = torch.from_numpy(loaded.tokenizer.encode(content.decode()).copy()).long()
    nats = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        with torch.no_grad():
            nats += float(F.cross_entropy(loaded.network(window[None, :-1])[0], window[1:], reduction="sum"))
    return nats / (len(ids) - 1), len(ids) - 1


def test_evaluation_on_another_text_by_hand(trained: Run, evaluate: Evaluate, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes("Облонских\r\nсмешалось\rв доме".encode())
    figures, said = evaluate(trained.folder, f"data.path={other}")
    loss, num_tokens = loss_by_hand(trained.folder, other.read_bytes())
    assert figures["tokens"] == num_tokens
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert "best.ckpt, step 16, on other.txt, the whole text" in said
    change_config(trained.folder, **{"data.newlines": "normalise"})
    loss, fewer = loss_by_hand(trained.folder, "Облонских\nсмешалось\nв доме".encode())
    figures, _ = evaluate(trained.folder, f"data.path={other}")
    assert figures["tokens"] == fewer == num_tokens - 1
    assert figures["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_token_that_ends_a_document_counts_as_in_training(tmp_path: Path, corpora: str, evaluate: Evaluate) -> None:
    trained = train_in_float32(tmp_path, corpora, "data.end_of_text=true")
    figures, _ = evaluate(trained.folder, f"data.path={tmp_path / 'text.txt'}")
    assert figures["tokens"] == len(TEXT.encode())  # all of them but the first, and the end


def test_a_run_without_validation_is_measured_on_its_training_text(shared_run: Run, evaluate: Evaluate) -> None:
    figures, said = evaluate(shared_run.folder)
    assert "on sonnets.txt, the training text: the run has no validation split" in said
    assert figures["measured_on"] == "the training text: the run has no validation split"
    assert figures["tokens"] == 1_330
    assert figures["data"] == "sonnets.txt"
    text = shared_run.config["data"]["path"]
    assert evaluate(shared_run.folder, f"data.path={text}")[0] == figures | {"measured_on": "the whole text"}


def test_nothing_is_written_where_the_runs_config_says(trained: Run, evaluate: Evaluate, tmp_path: Path) -> None:
    change_config(
        trained.folder, **{"data.cache": str(tmp_path / "home"), "trainer.default_root_dir": str(tmp_path / "t")}
    )
    evaluate(trained.folder)
    evaluate(trained.folder, f"data.path={trained.config['data']['path']}")
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"run", "corpora", "figures.json"}


def test_the_figures_replace_a_link_and_not_what_it_points_to(trained: Run, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (trained.folder / "evaluation.json").symlink_to(precious)
    run_script("evaluate.py", f"run={trained.folder}", f"data.cache={tmp_path / 'corpora'}", "accelerator=cpu")
    assert precious.read_text() == "mine"
    assert json.loads((trained.folder / "evaluation.json").read_text())["step"] == 16


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run=nothing"], "run=nothing: no such run"),
        (["run=[1]"], "run=[1]: "),
        (["run="], "run=: "),
        (["checkpoint=first"], "checkpoint=first: first does not exist; available: best, last"),
        (["data.path=nothing.txt"], "data.path=nothing.txt: no such file"),
        (["data.path=a.txt"], "data.path=a.txt: the text has too few tokens, 1"),
        (["data.path="], "data.path=: "),
        (["data.path=[]"], "data.path=[]: "),
        (["data.path=/dev/zero"], "data.path=/dev/zero: it is not a regular file"),
        (["data.path=https://a.org/b.txt"], "data.path=https://a.org/b.txt: it is an address"),
        (["data.cache="], "data.cache=: "),
        (["output=missing/x.json"], "output=missing/x.json: there is no folder missing"),
        (["output=."], "output=.: it is a folder; allowed: a file"),
        (["output="], "output=: "),
        (["accelerator=abacus"], "accelerator=abacus: input should be 'auto', 'cpu', 'gpu', 'cuda' or 'mps'"),
        (["dta.path=x"], "dta.path: unknown key"),
    ],
)
def test_evaluation_refuses(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_script("evaluate.py", f"run={trained.folder}", f"data.cache={tmp_path / 'corpora'}", *arguments)
    message = str(stopped.value)
    assert message.startswith(f"error: {says}")
    assert "\n" not in message
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "corpora"] == before


def test_another_text_does_not_replace_the_runs_own_figures(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Облонских " * 9, encoding="utf-8")
    arguments = [f"run={trained.folder}", f"data.cache={tmp_path / 'corpora'}", "accelerator=cpu"]
    run_script("evaluate.py", *arguments)
    before = (trained.folder / "evaluation.json").read_text()
    run_script("evaluate.py", *arguments, f"data.path={tmp_path / 'other.txt'}")
    assert (trained.folder / "evaluation.json").read_text() == before
    assert json.loads((trained.folder / "evaluation-other.txt.json").read_text())["data"] == "other.txt"
