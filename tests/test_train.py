"""The script as a user runs it: mostly in this process, where coverage sees it, and the rest in one of its own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, Run, Script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from language_model.model.gpt import GPT
from language_model.runs.folder import RUNS
from language_model.runs.load import load_run
from language_model.training.callbacks import Sample


def refused(train, *overrides: str, **settings) -> str:
    with pytest.raises(SystemExit) as stopped:
        train(*overrides, **settings)
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_a_run_says_what_it_does_and_leaves_a_whole_folder(shared_run: Run) -> None:
    tiny = shared_run
    out = tiny.output
    for line in (
        "corpus   sonnets.txt: 1,331 tokens, vocabulary 43",
        "windows  1,315 of 16 tokens, stride 1",
        "steps    8 of 41 batches an epoch, 16 in all (2 epochs), 512 tokens a step",
        "loss     uniform baseline ln 43 = 3.7612, untrained 3.7",
        "Epoch   0 | Loss: ",
        "Epoch   1 | Loss: ",
        "best     train/loss_epoch ",
        "gradient norm before clipping: largest ",
        "Shall I",
        "look     tensorboard --logdir ",
        "longer   python ",
    ):
        assert line in out
    assert "warning" not in out.lower()
    names = {str(path.relative_to(tiny.folder)) for path in tiny.folder.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        ".lock", "config.yaml", "overrides.yaml", "tokenizer.json", "metrics.csv", "train.log", "result.json",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
    }  # fmt: skip
    assert tiny.result["status"] == "finished"
    assert tiny.result["steps"] == 16
    assert tiny.result["epochs"] == 2
    assert tiny.result["tokens"] == 16 * 512
    assert tiny.result["metrics"]["train/loss_epoch"] == pytest.approx(tiny.losses[-1])
    assert tiny.result["best"] == pytest.approx(min(tiny.losses))
    assert tiny.result["uniform_baseline"] == pytest.approx(math.log(43))
    assert 0 <= tiny.result["clipped_share"] <= 1
    assert tiny.result["versions"]["torch"]
    assert tiny.config["vocab_size"] == 43
    assert tiny.config["total_steps"] == 16
    assert tiny.config["monitor"] == "train/loss_epoch"
    assert tiny.config["trainer"]["precision"] in ("bf16-mixed", "32-true")
    assert "${" not in (tiny.folder / "config.yaml").read_text()
    assert "Epoch   1 | Loss: " in (tiny.folder / "train.log").read_text()
    assert tiny.checkpoint("last")["global_step"] == 16
    assert tiny.checkpoint("best")["global_step"] in (8, 16)


def test_tensorboard_has_the_metrics_the_settings_and_the_sample(train) -> None:
    tiny = train("callbacks.sample.prompt=Shall")
    events = EventAccumulator(str(tiny.folder))
    events.Reload()
    assert {"train/loss", "train/loss_epoch", "watch/lr", "watch/grad_norm", "watch/tokens_per_sec"} <= set(
        events.Tags()["scalars"]
    )
    assert [point.step for point in events.Scalars("train/loss")] == [3, 7, 11, 15]
    assert len(events.Scalars("train/loss_epoch")) == 2
    assert [point.value for point in events.Scalars("watch/lr")] == pytest.approx(tiny.column("lr"))
    assert "hp_metric" not in events.Tags()["scalars"]
    text = events.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert tiny.result["sample"] in text
    assert tiny.result["sample"].startswith("Shall")
    assert "_hparams_/session_start_info" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"Best train/loss_epoch" in content
    assert b"optimizer.lr" in content
    assert b"model.d_model" in content


def test_the_seed_decides_everything(shared_run: Run, train) -> None:
    first, again, other = shared_run, train(name="b"), train("seed=1", name="c")
    assert first.losses == again.losses
    assert first.losses[0] != other.losses[0]
    assert first.result["untrained_loss"] != other.result["untrained_loss"]
    weights, same = first.checkpoint("last")["state_dict"], again.checkpoint("last")["state_dict"]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first.result["sample"] == again.result["sample"]


def test_your_own_text_is_validated_and_the_best_is_kept(train, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Всё смешалось в доме Облонских. " * 100, encoding="utf-8")
    mine = train("data=text", f"data.path={text}", "data.batch_size=8", "trainer.max_epochs=3", "optimizer.lr=0.01")
    assert mine.config["monitor"] == "val/loss"
    assert "2,880 tokens and 320 for validation, vocabulary 2" in mine.output
    assert "Val loss: " in mine.output
    losses = mine.column("val/loss")
    assert len(losses) == 3
    assert mine.result["best"] == pytest.approx(min(losses))
    assert mine.result["metrics"]["val/perplexity"] == pytest.approx(math.exp(losses[-1]))
    assert mine.result["metrics"]["val/bits_per_byte"] < mine.result["metrics"]["val/loss"] / math.log(2) / 1.5
    assert mine.result["sample"].startswith("Всё смешалось")


def test_validation_in_the_middle_of_an_epoch(train, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("abcdefgh" * 500, encoding="utf-8")
    mine = train(
        "data=text", f"data.path={text}", "trainer.val_check_interval=3", "callbacks.early_stopping.patience=1"
    )
    assert "Step 3 | Loss: " in mine.output
    assert mine.result["status"] == "finished"
    unseen = train("data=text", f"data.path={text}", "trainer.limit_val_batches=0", name="unseen")
    assert unseen.config["monitor"] == "train/loss_epoch"


def test_early_stopping_by_patience(train) -> None:
    stopped = train(
        "trainer.max_epochs=20", "callbacks.early_stopping.patience=2", "callbacks.early_stopping.min_delta=100"
    )
    assert stopped.result["epochs"] == 3  # the first is the best, and two did not improve
    assert "stopped  after epoch 2: " in stopped.output


def test_a_run_limited_by_steps(train) -> None:
    limited = train("trainer.max_epochs=-1", "trainer.max_steps=11", "callbacks.last.every_n_steps=5")
    assert limited.result["steps"] == 11
    assert limited.config["total_steps"] == 11
    assert limited.checkpoint("last")["global_step"] == 11
    endless = train("trainer.max_epochs=-1", "trainer.max_time=00:00:00:01", "schedule=constant", name="time")
    assert endless.result["status"] == "finished"
    assert endless.config["total_steps"] is None


def same_end(one: Run, other: Run) -> bool:
    weights, expected = one.checkpoint("last")["state_dict"], other.checkpoint("last")["state_dict"]
    return one.losses == other.losses and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_of_the_same_name_trains_on_to_a_later_end(train) -> None:
    same = ["model.dropout=0.3", "total_steps=32"]
    whole = train(*same, "trainer.max_epochs=4", name="whole")
    train(*same, "trainer.max_epochs=2")
    longer = train(*same, "trainer.max_epochs=4", "trainer.log_every_n_steps=4", "data.num_workers=1")
    assert "resuming from " in longer.output
    assert same_end(longer, whole)
    assert longer.column("train/loss") == whole.column("train/loss")


def test_resume_takes_a_runs_own_settings(train, tmp_path: Path) -> None:
    whole = train("model.dropout=0.3", "total_steps=32", "trainer.max_epochs=4", name="whole")
    part = train("model.dropout=0.3", "total_steps=32", name="part")
    train(f"resume={part.folder}", "trainer.max_epochs=4", tiny=False, name=None)
    assert same_end(Run(part.folder), whole)
    overrides = yaml.safe_load((part.folder / "overrides.yaml").read_text())
    assert [o for o in overrides if "max_epochs" in o] == ["trainer.max_epochs=4"]
    assert "resume=nothing: no such run" in refused(train, "resume=nothing", tiny=False, name=None)
    message = refused(train, f"resume={part.folder}", "model.d_model=32", tiny=False, name=None)
    assert "part was trained with other settings: model.d_model=16 then, 32 now" in message


def test_a_finished_run_says_so_and_stays_as_it_is(train) -> None:
    first = train()
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    again = train()
    assert f"best     train/loss_epoch {first.result['best']:.4f}" in again.output
    assert "Epoch" not in again.output
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def test_a_checkpoint_file_starts_a_run_of_its_own(train) -> None:
    half = train("total_steps=32", name="half")
    resume = f"resume={half.folder / 'checkpoints' / 'last.ckpt'}"
    rest = train("total_steps=32", resume, "trainer.max_epochs=4", name="rest")
    whole = train("total_steps=32", "trainer.max_epochs=4", name="whole")
    assert half.losses + rest.losses == whole.losses
    assert "was trained for 16 steps already, and the run ends at 16" in refused(train, resume)
    assert "out.bias has the shape (16,) there and (32,) here" in refused(
        train, resume, "trainer.max_epochs=4", "model.d_model=32"
    )
    assert "has the shape (43, 16) there and (256, 16) here" in refused(
        train, resume, "trainer.max_epochs=4", "tokenizer=byte"
    )
    text = half.folder.parent / "other.txt"
    text.write_text("".join(chr(200 + i % 43) for i in range(2_000)), encoding="utf-8")
    other = ["data=text", f"data.path={text}", "trainer.max_epochs=4"]
    assert "was trained with another tokenizer" in refused(train, resume, *other)


def test_what_slurms_signal_left_is_gone_on_from(train) -> None:
    """Lightning saves hpc_ckpt_1.ckpt in the run's folder then, and would prefer it to all that comes later."""
    same = ["model.dropout=0.3", "total_steps=32"]
    whole = train(*same, "trainer.max_epochs=4", name="whole")
    part = train(*same)
    last = part.folder / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    last.write_bytes(b"of an hour ago")
    os.utime(last, (1, 1))
    (part.folder / "hpc_ckpt_1.ckpt").write_bytes(content)
    longer = train(*same, "trainer.max_epochs=4")
    assert same_end(longer, whole)
    assert not list(part.folder.glob("hpc_ckpt*"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_damaged_and_foreign_checkpoints(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = train("total_steps=32")
    last = part.folder / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[:1_000])
    longer = train("total_steps=32", "trainer.max_epochs=3")
    assert "last.ckpt is damaged, or not a checkpoint" in longer.output
    assert "resuming from run/checkpoints/best.ckpt" in longer.output
    for name in ("last", "best"):
        torch.save({"state_dict": Evil()}, part.folder / "checkpoints" / f"{name}.ckpt")
    message = refused(train, "total_steps=32", "trainer.max_epochs=5")
    assert "last.ckpt holds more than numbers and text, which could run code when loaded: refused" in message
    assert not (tmp_path / "evil").exists()
    for name in ("last", "best"):
        (part.folder / "checkpoints" / f"{name}.ckpt").unlink()
    assert "last.ckpt does not exist: no checkpoint to resume from" in refused(
        train, "total_steps=32", "trainer.max_epochs=5"
    )


def test_a_folder_of_something_else_is_left_alone(train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "exists and is not a run's folder; choose another name" in refused(train)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(train, tmp_path: Path) -> None:
    message = refused(
        train, "optimizer=sgd", "optimizer.lr=1e30", "optimizer.fused=false", "trainer.gradient_clip_val=null",
        "schedule=constant", "trainer.precision=32-true",
    )  # fmt: skip
    assert "the gradient of step 1 is not finite: loss " in message
    facts = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert facts["step"] == 1
    assert facts["lr"] == 1e30
    assert len(facts["texts"]) == 32
    assert all(len(text) == 16 for text in facts["texts"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_run_that_is_stopped_early_goes_back_to_its_best_weights(train) -> None:
    ended = train("optimizer.lr=1", "schedule=constant", "trainer.max_epochs=50", "callbacks.early_stopping.patience=2")
    assert ended.result["restored_best"]
    assert ended.result["epochs"] < 50
    best, last = (ended.checkpoint(name)["state_dict"] for name in ("best", "last"))
    assert not all(best[name].equal(last[name]) for name in best)  # so that it can go on from the last ones
    assert "restored the best weights, those after step " in ended.output
    loaded = load_run(ended.folder, "best")
    opening = ended.result["sample"][: len("Shall I")]
    assert ended.result["sample"] == Sample(max_new_tokens=8).generate_sample(loaded.network, loaded.tokenizer, opening)


def test_only_training_is_compiled(train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def compiled(function, **options):
        return lambda *inputs, **more: (seen.append(function.__name__), function(*inputs, **more))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    tiny = train("compile=true", "data.val_fraction=0.1", "model.n_layers=2")
    assert seen == ["train", "train", "cross_entropy"] * 16  # both blocks and the loss, in each of the steps
    assert ", compiled" in tiny.output
    assert train("data.val_fraction=0.1", "model.n_layers=2", name="eager").losses == tiny.losses


def test_how_the_arithmetic_is_done_is_said_and_can_be_overridden(train) -> None:
    overrides = ["trainer.precision=32", "model.dropout=0"]
    assert "precision 32-true, attention fused, optimizer fused, not compiled\n" in train(*overrides).output
    overrides += ["model.attention=unfused", "optimizer.fused=false"]
    assert (
        "precision 32-true, attention unfused, optimizer not fused, not compiled\n"
        in train(*overrides, name="other").output
    )
    assert "attention unfused" in train("trainer.precision=bf16-mixed", "model.dropout=0", name="bf16").output


def test_a_network_that_cannot_be_compiled_says_so(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GPT, "compile_for_training")
    says = "error: compile=true: language_model.model.gpt.GPT has no compile_for_training; set it to false"
    assert refused(train, "compile=true") == says


def test_compiling_without_a_compiler_is_refused(train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "compile=true: this machine lacks a C++ compiler" in refused(train, "compile=true")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_resumes_to_the_same_bits(train) -> None:
    whole = train("compile=true", "model.dropout=0.1", name="whole")
    eager = train("compile=false", "model.dropout=0.1", name="eager")
    assert whole.losses == pytest.approx(eager.losses, rel=0.02)
    train("compile=true", "model.dropout=0.1", "trainer.max_epochs=1", "total_steps=16", name="parts")
    parts = train("compile=true", "model.dropout=0.1", "trainer.max_epochs=2", "total_steps=16", name="parts")
    assert parts.losses == whole.losses
    ours, theirs = parts.checkpoint("last")["state_dict"], whole.checkpoint("last")["state_dict"]
    assert ours.keys() == theirs.keys() == eager.checkpoint("last")["state_dict"].keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_takes_steps(train, tmp_path: Path, experiment: str) -> None:
    corpus = [f"data.path={ROOT / 'src' / 'language_model' / 'sonnets.txt'}"]
    if experiment == "gpt2_124m":
        np.arange(20_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
        corpus = [f"data.train_path={tmp_path / 'tokens.bin'}", "trainer.accumulate_grad_batches=2"]
    tiny = train(f"experiment={experiment}", *corpus, "trainer.max_steps=4", "hydra.mode=RUN", "compile=false")
    assert tiny.result["status"] == "finished"
    assert (tiny.folder / "exercise.png").exists() == experiment.startswith("exercise_")


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "warmup_linear"])
def test_other_optimizers_and_schedules_learn(train, optimizer: str, schedule: str) -> None:
    learned = train(f"optimizer={optimizer}", f"schedule={schedule}", "optimizer.lr=0.01", "trainer.max_epochs=4")
    assert learned.losses[-1] < learned.result["untrained_loss"] - 0.2


def test_a_model_class_of_ones_own(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Mine(nn.Sequential):\n"
        "    def __init__(self, vocab_size: int, d_model: int, max_seq_len: int):\n"
        "        super().__init__(nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size))\n"
        "        self.max_seq_len = max_seq_len\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(
        "_target_: mine.Mine\nvocab_size: ${vocab_size}\nd_model: 8\nmax_seq_len: 16\n"
    )
    mine = train(
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "model=mine", "trainer.max_epochs=2",
        "schedule.warmup_steps=2", "trainer.limit_train_batches=4", "trainer.accelerator=cpu", tiny=False,
    )  # fmt: skip
    assert "model    731 parameters" in mine.output


def test_a_strange_start_is_warned_of(train, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_model.model.gpt import GPT

    monkeypatch.setattr(GPT, "init_weights", lambda self, zero_init: None)
    assert "is far from the uniform baseline" in train("model.d_model=64", "model.tie_embeddings=true").output


def test_a_quick_test_writes_nothing(train, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train("trainer.fast_dev_run=true", f"folder={tmp_path / 'run'}", name=None)
    said = capsys.readouterr().out
    assert "1 in all, as trainer.fast_dev_run says" in said
    assert "folder   none, as trainer.fast_dev_run says" in said
    assert list(tmp_path.iterdir()) == []
    broken = ["optimizer=sgd", "optimizer.lr=1e30", "optimizer.fused=false", "schedule=constant"]
    refused(train, "trainer.fast_dev_run=5", "trainer.precision=32-true", *broken, f"folder={tmp_path / 'run'}")
    assert list(tmp_path.iterdir()) == []
    run = train()
    before = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")}
    train("trainer.fast_dev_run=true", "trainer.max_epochs=3")  # a run of this name is not resumed
    assert {file: file.stat().st_mtime_ns for file in run.folder.rglob("*")} == before


def test_switched_off_parts(train) -> None:
    callbacks = ("best", "last", "every", "early_stopping", "console", "throughput", "gradient_norm", "sample")
    bare = train(
        *(f"callbacks.{name}=null" for name in callbacks), "logger.csv=null", "logger.tensorboard=null",
        "trainer.gradient_clip_val=null", "trainer.max_epochs=1", "trainer.limit_train_batches=3", name="bare",
    )  # fmt: skip
    assert bare.result["status"] == "finished"
    assert {path.name for path in bare.folder.iterdir()} == {
        ".lock", "config.yaml", "overrides.yaml", "tokenizer.json", "train.log", "result.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.n_heads=3"], "model.n_heads=3 does not divide d_model=16; allowed: 1, 2, 4, 8, 16"),
        (["data.path=nothing.txt"], "data.path=nothing.txt: no such file or directory"),
        (["data=bin"], "data.train_path: a value is needed"),
        (["data=text", "data.path=[]"], "data.path=[]: input should be a valid string; or: list"),
        (["tokenizer=bpe", "tokenizer.vocab_size=9"], "tokenizer.vocab_size=9: input should be greater than or equal"),
        (["tokenizer=file", "tokenizer.path=nothing.json"], "data: tokenizer.path=nothing.json: no such file"),
        (["tokenizer=ids"], "data: token ids are for data=bin; text needs another tokenizer"),
        (["tokenizer=abacus"], "tokenizer=abacus: there is no such file in conf/tokenizer; choose from bpe, byte"),
        (["data.cache=/dev/null/x"], "data.cache=/dev/null/x: not a directory"),
        (["data.batch_size=5000"], "data.batch_size=5000: the training data has 1,315 windows, too few"),
        (["model.max_seq_len=2000"], "data.seq_len=2000: the training text, 1,331 characters"),
        (["schedule.warmup_steps=17"], "schedule.warmup_steps=17 is longer than the run of total_steps=16"),
        (["trainer.precision=8"], "trainer.precision=8: allowed: 32-true, bf16-mixed, "),
        (["trainer.accelerator=cuda"], "trainer.accelerator=cuda: this machine has none; allowed: auto, cpu"),
        (["trainer.accelerator=abacus"], "trainer.accelerator=abacus: allowed: auto, cpu, gpu, cuda, mps"),
        (["trainer.max_epochs=-1"], "total_steps: the schedule needs an end"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: allowed: 1 and up; -1 for no limit"),
        (["monitor=val/loss"], "monitor=val/loss: no callback logs it"),
        (["callbacks.sample.prompt='Shall 1'"], "callbacks.sample.prompt: character '1' (U+0031) at position 6"),
        (["resume=nothing"], "resume=nothing: "),
        (["vocab_size=42"], "vocab_size=42: the tokenizer has 43 tokens"),
        (["optimizer=sgd", "optimizer.momentum=-1"], "optimizer.momentum=-1: allowed: 0 and up"),
        (["trainer.max_time=soon"], "trainer.max_time=soon: allowed: days:hours:minutes:seconds"),
        (["trainer.precision=16-mixed", "optimizer.fused=true"], "optimizer.fused=true"),
        (["trainer.precision=16", "optimizer.fused=true"], "optimizer.fused=true"),
        (["model.dropout=null"], "model.dropout=null: input should be a valid number"),
        (["model.attention=flash"], "model.attention=flash: input should be 'unfused' or 'fused'"),
    ],
)  # fmt: skip
def test_what_cannot_work_leaves_nothing_behind(train, tmp_path: Path, overrides: list[str], says: str) -> None:
    if overrides == ["trainer.accelerator=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has what the test expects to miss")
    assert refused(train, *overrides).startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_on_record(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from language_model.training.module import LanguageModel

    def crash(self, batch, batch_idx):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LanguageModel, "training_step", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        train()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == "RuntimeError: out of memory"


def test_from_another_directory_as_a_user_types_it(script: Script, tmp_path: Path) -> None:
    """No folder given: it goes to the project's outputs, and the printed command goes on from there."""
    name = f"test_{os.getpid()}"
    folder = RUNS / name
    try:
        done = script("train.py", *TINY, f"name={name}", "model.dropout=0")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert list(tmp_path.iterdir()) == []
        assert Run(folder).result["status"] == "finished"
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


def test_help_and_config_are_readable(script: Script) -> None:
    said = script("train.py", "--help").stdout
    assert "experiment=modern" in said
    assert "model: baby, gpt2" in said
    assert "d_model: 64" in said
    printed = yaml.safe_load(script("train.py", "--cfg", "job").stdout)
    assert printed["optimizer"]["lr"] == 3e-4


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_stops_a_run_with_its_status_and_a_checkpoint(tmp_path: Path, sent: int, status: int) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        *TINY,
        f"folder={tmp_path}/run",
        "trainer.max_epochs=100000",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which a shell's & turns off
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # some steps
    process.send_signal(sent)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert "resume with: python" in said
    stopped = Run(tmp_path / "run")
    assert stopped.result["status"] == "interrupted"
    assert stopped.checkpoint("last")["global_step"] == stopped.result["steps"] > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each run")
@pytest.mark.parametrize(
    ("arguments", "count"),
    [(["2"], 2), pytest.param(["20"], 20, marks=pytest.mark.slow), pytest.param(["--end"], 15, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_runs_come_to_the_same_bits(arguments: list[str], count: int, tmp_path: Path) -> None:
    """SIGKILL, SIGTERM and Ctrl-C at many moments, within saves and after the training too; see kills.py."""
    script = [sys.executable, str(ROOT / "tests" / "kills.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=1_200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} of {count} killed and resumed runs came to the same bits" in done.stdout


@pytest.mark.slow
def test_the_chapters_run_comes_to_what_the_readme_says(train) -> None:
    chapter = train("trainer.precision=32-true", tiny=False)
    assert chapter.result["steps"] == 1_950
    assert chapter.losses[0] == pytest.approx(3.5, abs=0.1)
    assert 0.55 < chapter.result["best"] < 0.75
    assert chapter.result["untrained_loss"] == pytest.approx(math.log(43), abs=0.05)


@pytest.mark.slow
def test_the_modern_recipe_beats_the_loss_the_chapter_prints(train) -> None:
    modern = train("experiment=modern", tiny=False)
    assert modern.result["best"] < 0.12
    assert "Shall I compare thee to a summer's day?" in modern.result["sample"]


@pytest.mark.slow
def test_two_processes_train_as_one(train, script: Script, tmp_path: Path) -> None:
    """Data-parallel over two CPU processes with half the batch each: the same windows, so the same losses."""
    alike = [*TINY, "model.dropout=0.0", "trainer.precision=32-true", "model.tie_embeddings=true"]
    done = script(
        "train.py", *alike, f"folder={tmp_path}/two", "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=16"
    )
    assert done.returncode == 0, done.stderr
    two = Run(tmp_path / "two")
    one = train(*alike, name="one")
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert done.stderr == ""
    assert done.stdout.count("Epoch   1 | Loss") == 1
