"""What test_train.py does not reach through a whole run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import Run, run_script
from test_module import Bigram

from language_model.data.datamodule import TextData
from language_model.data.tokenizer import CharTokenizer
from language_model.runs.announce import describe_final, untrained_loss
from language_model.runs.config import ROOT
from language_model.training.module import LanguageModel


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (
            {"metrics": {"train/loss_epoch": 1.5, "val/loss": 1.53}, "validated_step": 1500, "validated_share": 1.0},
            "train/loss_epoch 1.5000 (mean of the last epoch), val/loss 1.5300 (step 1,500)",
        ),
        (
            {"metrics": {"val/loss": 1.53}, "validated_step": 15, "validated_share": 0.125},
            "val/loss 1.5300 (step 15, 12.5% of the split)",
        ),
        (
            {"metrics": {"train/loss_epoch": 1.5}, "unfinished_epoch": {"loss": 1.4, "steps": 3}},
            "training loss 1.4000 (mean over the last 3 steps of an unfinished epoch)",
        ),
        ({"metrics": {"val/loss": 1.53}}, "val/loss 1.5300"),  # of an earlier version
        ({"metrics": {}}, "no loss was logged"),
    ],
)
def test_the_final_figures_say_what_they_are_of(result: dict, says: str) -> None:
    assert describe_final(result) == says


def test_the_last_lines_say_what_they_are_of(train, tmp_path: Path) -> None:
    sampled = "callbacks.sample.prompt=Shall"
    run = train(
        "data.val_fraction=0.3", "data.batch_size=4", "trainer.max_steps=11", "trainer.val_check_interval=5",
        "trainer.limit_val_batches=0.5", sampled,
    )  # fmt: skip
    assert run.result["validated_step"] == 11
    assert run.column("val/loss")[-1] == run.result["metrics"]["val/loss"]
    share = 100 * run.result["validated_share"]
    assert f"val/loss {run.column('val/loss')[-1]:.4f} (step 11, {share:.3g}% of the split); " in run.output
    assert re.search(
        r"\ntime     .* s to step 11, all starts of this run together; .* tokens/s, without validations and", run.output
    )
    assert "\ngradient norm before clipping: largest " in run.output
    assert "\nsample   prompt 'Shall', temperature 0.8, last weights (step 11):\n" in run.output


def test_a_result_that_is_written_later_says_the_same(train) -> None:
    """Of a run that ended inside an epoch, and was killed before it could write its result."""
    same = ["data.val_fraction=0.3", "data.batch_size=4", "trainer.max_steps=11", "trainer.limit_val_batches=0.5"]
    before = train(*same).result
    (train(*same).folder / "result.json").unlink()
    after = train(*same).result
    figures = ("validated_step", "validated_share", "unfinished_epoch", "metrics", "sample", "sample_description")
    assert {name: after[name] for name in figures} == {name: before[name] for name in figures}
    assert before["unfinished_epoch"]["steps"] == 3


def test_an_interval_across_epochs_may_be_longer_than_the_run(train) -> None:
    """Which is validated at its end; within epochs, Lightning would refuse it later."""
    longer = ["data.val_fraction=0.3", "trainer.val_check_interval=100"]
    run = train(*longer, "trainer.check_val_every_n_epoch=null")
    assert run.result["validated_step"] == run.result["steps"] == 16
    with pytest.raises(SystemExit, match=r"interval=100: an epoch has 8 batches; allowed: 1 to 8, or"):
        train(*longer, name="refused")


def test_a_metric_of_epochs_that_was_never_logged_saves_nothing(train) -> None:
    """Though the run validates: Lightning's own would fail."""
    run = train("monitor=train/loss_epoch", "data.val_fraction=0.3", "trainer.max_steps=5")
    assert run.result["validated_step"] == 5
    assert "best" not in run.result
    assert "best     none is saved: train/loss_epoch was not logged" in run.output


def test_measuring_the_untrained_loss_changes_nothing(tmp_path: Path) -> None:
    sonnets = str(ROOT / "src" / "language_model" / "sonnets.txt")
    data = TextData(sonnets, CharTokenizer.from_texts, str(tmp_path), seq_len=8, batch_size=4)

    class Wide(Bigram):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(43, 43)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return self.dropout(self.table(tokens))

    module = LanguageModel(Wide(), lambda _: torch.optim.SGD([]), lambda _: 1.0, data.tokenizer)
    weights, state = module.network.table.weight.clone(), torch.get_rng_state()
    first = untrained_loss(module, data, torch.device("cpu"))
    assert untrained_loss(module, data, torch.device("cpu")) == first
    assert torch.equal(module.network.table.weight, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    with torch.no_grad():
        module.network.table.weight.zero_()
    assert abs(untrained_loss(module, data, torch.device("cpu")) - torch.tensor(43.0).log().item()) < 1e-5


@pytest.mark.parametrize(
    ("ended_by", "twice"),
    [
        ([], ["trainer.max_epochs=4"]),
        (["trainer.max_steps=5000"], ["trainer.max_epochs=4"]),
        (["trainer.max_steps=11", "trainer.max_epochs=50"], ["trainer.max_steps=22"]),
        (["trainer.max_steps=16"], ["trainer.max_steps=32", "trainer.max_epochs=4"]),
    ],
)
def test_the_last_line_is_a_command_that_trains_longer(
    train, capsys: pytest.CaptureFixture, ended_by: list[str], twice: list[str]
) -> None:
    first = train(*ended_by)
    line = next(line for line in first.output.splitlines() if line.startswith("longer   "))
    _, _, script, *arguments = shlex.split(line)
    assert arguments[1:] == twice
    run_script(Path(script).name, *arguments)
    assert Run(first.folder).result["steps"] == 2 * first.result["steps"]


def test_a_run_that_stopped_early_is_not_told_to_train_longer(train) -> None:
    early = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=100", "trainer.max_epochs=9"]
    assert "\nlonger " not in train(*early).output
