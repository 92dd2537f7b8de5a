import pytest
import torch
from torch import Tensor

from language_model.generate import generate


class Counting(torch.nn.Module):
    """Finds the token after the last one likeliest, by far or just so."""

    max_seq_len = 4

    def __init__(self, certainty: float = 100.0) -> None:
        super().__init__()
        self.certainty = certainty
        self.lengths: list[int] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return self.certainty * torch.nn.functional.one_hot((tokens + 1) % 7, 7).float()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_likeliest_token_follows(temperature: float) -> None:
    assert list(generate(Counting(), torch.tensor([2]), 8, temperature)) == [3, 4, 5, 6, 0, 1, 2, 3]


def test_the_network_sees_no_more_than_its_context() -> None:
    network = Counting()
    list(generate(network, torch.tensor([0, 1]), 5))
    assert network.lengths == [2, 3, 4, 4, 4]


def test_draws_follow_the_probabilities_at_the_temperature() -> None:
    drawn = torch.tensor(list(generate(Counting(0.0), torch.tensor([0]), 3_000, seed=3)))
    assert torch.bincount(drawn, minlength=7).div(3_000).sub(1 / 7).abs().max() < 0.03
    counted = list(generate(Counting(2.0), torch.tensor([0]), 3_000, temperature=0.5, seed=3))
    expected = torch.tensor([4.0, 0, 0, 0, 0, 0, 0]).softmax(0)[0].item()
    follows = sum((b - a) % 7 == 1 for a, b in zip([0, *counted], counted, strict=False)) / 3_000
    assert follows == pytest.approx(expected, abs=0.03)


def test_top_k_leaves_k_tokens() -> None:
    class Ramp(Counting):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.arange(7.0).expand(1, tokens.shape[1], 7) / 10

    assert set(generate(Ramp(), torch.tensor([0]), 200, top_k=3)) == {4, 5, 6}
    assert set(generate(Ramp(), torch.tensor([0]), 200, top_k=100)) == set(range(7))


def test_the_seed_decides_and_no_other_random_state_moves() -> None:
    before = torch.get_rng_state()
    a, b, c = (list(generate(Counting(0.0), torch.tensor([0]), 20, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tokens": torch.tensor([], dtype=torch.int64)}, "the prompt is empty"),
        ({"temperature": -0.1}, "temperature=-0.1 is negative"),
        ({"top_k": 0}, "top_k=0 leaves no token"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        next(generate(**{"network": Counting(), "tokens": torch.tensor([0]), "max_new_tokens": 1} | arguments))
