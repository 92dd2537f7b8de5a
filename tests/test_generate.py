import pytest
import torch
from conftest import run_script
from torch import Tensor

from language_model.model.generate import generate, sample_token, stream_decode
from language_model.model.gpt import GPT


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
        ({"temperature": -0.1}, "temperature=-0.1: allowed"),
        ({"temperature": float("nan")}, "temperature=nan: allowed"),
        ({"temperature": float("inf")}, "temperature=inf: allowed"),
        ({"top_k": 0}, "top_k=0: allowed"),
        ({"top_k": 2.5}, "top_k=2.5: allowed"),
        ({"top_k": float("nan")}, "top_k=nan: allowed"),
        ({"top_p": 0}, "top_p=0: allowed"),
        ({"top_p": float("nan")}, "top_p=nan: allowed"),
        ({"seed": -1}, "seed=-1: allowed"),
        ({"seed": 2**64}, "seed=18446744073709551616: allowed"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        next(generate(**{"network": Counting(), "tokens": torch.tensor([0]), "max_new_tokens": 1} | arguments))


@pytest.fixture(scope="module", params=["learned", "rotary"])
def gpt(request: pytest.FixtureRequest) -> GPT:
    """A network with opinions, though it has learned nothing."""
    torch.manual_seed(0)
    network = GPT(
        vocab_size=40, d_model=32, n_heads=4, n_layers=3, d_ff=64, max_seq_len=24, dropout=0.1,
        position=request.param, norm="rmsnorm", activation="gelu", qk_norm=True, bias=True, tie_embeddings=False,
        zero_init=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    return network


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.8}])
@pytest.mark.parametrize("prompt_length", [1, 7, 24, 30])
def test_the_cache_changes_no_token(gpt: GPT, sampling: dict, prompt_length: int) -> None:
    """Greedy and sampled, up to the context's length and past it."""
    prompt = torch.randint(40, (prompt_length,), generator=torch.Generator().manual_seed(1))
    cached = list(generate(gpt, prompt, 40, **sampling, seed=3))
    assert cached == list(generate(gpt, prompt, 40, **sampling, seed=3, use_cache=False))
    assert len(set(cached)) > 1 or sampling == {"temperature": 0}


def test_cached_logits_are_the_plain_ones(gpt: GPT) -> None:
    tokens = torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(2))
    cache = gpt.new_cache()
    with torch.no_grad():
        parts = [gpt(tokens[:, start:end], cache) for start, end in ((0, 5), (5, 6), (6, 20), (20, 24))]
        torch.testing.assert_close(torch.cat(parts, dim=1), gpt(tokens), rtol=1e-4, atol=1e-5)
        assert cache.length == 24
        with pytest.raises(ValueError, match="a sequence of 25 tokens is longer than max_seq_len=24"):
            gpt(tokens[:, :1], cache)


def test_top_p_leaves_the_likeliest_that_are_enough() -> None:
    class Fixed(Counting):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0, 0]).log().expand(1, tokens.shape[1], 7)

    for top_p, left in ((0.1, {0}), (0.4, {0}), (0.5, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3, 4})):
        assert set(generate(Fixed(), torch.tensor([0]), 300, top_p=top_p)) == left


def test_top_p_of_one_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the sum of the likely tokens is 1 before the unlikely ones are added."""
    seen: list[Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *args, **more: (seen.append(p.clone()), draw(p, *args, **more))[1]
    )
    logits = torch.tensor([0.0, -18.0, -18.0])
    for top_p in (None, 1.0):
        sample_token(logits, 1.0, None, top_p, torch.Generator())
    assert seen[0].sum() == seen[0][0] == 1
    assert seen[1].equal(seen[0])
    assert (seen[1] > 0).all()


def test_it_stops_at_the_end_of_a_text_and_within_the_vocabulary() -> None:
    assert list(generate(Counting(), torch.tensor([2]), 8, 0, end_of_text=5)) == [3, 4]
    assert max(generate(Counting(0.0), torch.tensor([0]), 200, vocab_size=3)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        "seed=1e20", "seed=-1", "seed=nan", "temperature=nan", "temperature=inf", "temperature=-1", "top_k=nan",
        "top_k=inf", "top_k=0", "top_p=nan", "top_p=inf", "top_p=0", "top_p=1.1", "accelerator=abc", "accelerator=",
    ],
)  # fmt: skip
def test_the_script_refuses_what_cannot_be_sampled_with_by_its_key(wrong: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script("generate.py", wrong)
    message = str(stopped.value)
    assert "\n" not in message
    assert message.startswith(f"error: {wrong.partition('=')[0]}=")
    if wrong == "accelerator=abc":
        assert all(choice in message for choice in ("auto", "cpu", "gpu", "cuda", "mps"))


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_a_device_that_the_machine_lacks_is_refused(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(SystemExit, match=f"accelerator={accelerator}: this machine has none; allowed: auto, cpu"):
        run_script("generate.py", f"accelerator={accelerator}")


def test_characters_are_streamed_whole() -> None:
    text = "aé学👩!"
    ids = list(text.encode())

    def decode(some: list[int]) -> str:
        return bytes(some).decode("utf-8", "replace")

    assert list(stream_decode(decode, ids)) == list(text)
    assert list(stream_decode(decode, ids[:-2])) == ["a", "é", "学", "\ufffd"]
    assert "".join(stream_decode(decode, [0xFF] * 20 + [97])).endswith("a")
