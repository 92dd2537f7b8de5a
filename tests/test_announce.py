"""What test_train.py does not reach through a whole run."""

from pathlib import Path

import torch
from test_module import Bigram

from language_model.data.datamodule import TextData
from language_model.data.tokenizer import CharTokenizer
from language_model.runs.announce import untrained_loss
from language_model.runs.config import ROOT
from language_model.training.module import LanguageModel


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
