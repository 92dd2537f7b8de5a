import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from language_model.model.dropout import Dropout
from language_model.model.gpt import GPT, rotary_angles, rotate

SIZES = {"vocab_size": 11, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "max_seq_len": 12}
PARTS = [
    dict(zip(("position", "norm", "activation", "qk_norm", "bias", "tie_embeddings", "zero_init"), parts, strict=True))
    for parts in itertools.product(
        ("learned", "rotary"), ("layernorm", "rmsnorm"), ("gelu", "relu2", "swiglu"),
        (False, True), (False, True), (False, True), (False, True),
    )
]  # fmt: skip


def scrambled(**options) -> GPT:
    """A network whose every weight is away from its start, so that nothing is zero or one by luck."""
    network = GPT(**SIZES | options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def gpt2_with_the_weights_of(network: GPT, **config) -> GPT2LMHeadModel:
    oracle = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=network.token_embedding.num_embeddings, n_positions=network.max_seq_len,
            n_embd=network.token_embedding.embedding_dim, n_layer=len(network.blocks),
            n_head=network.blocks[0].attention.n_heads, n_inner=network.blocks[0].feed_forward.up.out_features,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **config,
        )
    ).eval()  # fmt: skip
    ours = network.state_dict()
    theirs = {
        "transformer.wte.weight": ours["token_embedding.weight"],
        "transformer.wpe.weight": ours["position_embedding.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        "lm_head.weight": ours["head.weight"],
    }
    names = {
        "ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
        "ln_2": "feed_forward_norm", "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.out",
    }  # fmt: skip
    for i, (their_name, our_name) in itertools.product(range(len(network.blocks)), names.items()):
        weight = ours[f"blocks.{i}.{our_name}.weight"]
        theirs[f"transformer.h.{i}.{their_name}.weight"] = weight if "ln" in their_name else weight.T
        theirs[f"transformer.h.{i}.{their_name}.bias"] = ours[f"blocks.{i}.{our_name}.bias"]
    oracle.load_state_dict(theirs)
    return oracle


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_with_gpt2s_parts_the_logits_are_transformers_gpt2s(tie_embeddings: bool) -> None:
    network = scrambled(vocab_size=101, d_model=48, n_heads=4, d_ff=96, tie_embeddings=tie_embeddings)
    tokens = torch.randint(101, (3, 12))
    expected = gpt2_with_the_weights_of(network, tie_word_embeddings=tie_embeddings)(tokens).logits
    torch.testing.assert_close(network(tokens), expected, rtol=1e-5, atol=1e-5)


def test_plain_attention_gives_the_fused_kernels_result() -> None:
    fused, plain = (scrambled(position="rotary", qk_norm=True, attention=how) for how in ("fused", "unfused"))
    plain.load_state_dict(fused.state_dict())
    tokens = torch.randint(11, (2, 9))
    torch.testing.assert_close(plain(tokens), fused(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(str(part) for part in parts.values()))
def test_every_combination_of_parts_learns_and_sees_only_the_past(parts: dict) -> None:
    network = scrambled(**parts)
    assert (network.head.weight is network.token_embedding.weight) == parts["tie_embeddings"]
    assert parts["bias"] or not any(name.endswith("bias") for name, _ in network.named_parameters())
    # The logits at t change with the tokens up to t (by gradient), and not with those after.
    one_hot = F.one_hot(torch.randint(11, (7,)), 11).float().requires_grad_()
    network.token_embedding.forward = lambda tokens: (one_hot @ network.token_embedding.weight)[None]
    logits = network(torch.zeros(1, 7, dtype=torch.int64))
    assert logits.shape == (1, 7, 11)
    weights = torch.randn(11)
    for t in range(7):
        (gradient,) = torch.autograd.grad((logits[0, t] * weights).sum(), one_hot, retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert reached.tolist() == [True] * (t + 1) + [False] * (6 - t)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_the_order_of_earlier_tokens_matters(position: str) -> None:
    network = scrambled(position=position)
    a, b = network(torch.tensor([[1, 2, 3, 4]])), network(torch.tensor([[2, 1, 3, 4]]))
    assert (a[0, -1] - b[0, -1]).abs().max() > 1e-3


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rotation = rotary_angles(50, 8).double()
    q, k = rotate(q.expand(1, 1, 50, 8), rotation), rotate(k.expand(1, 1, 50, 8), rotation)
    scores = (q @ k.transpose(-2, -1))[0, 0]
    for distance in range(-40, 41):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert scores[0].std() > 0.01


def test_rotary_turns_by_the_published_angles() -> None:
    cos, sin = rotary_angles(4, 4)
    angles = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(cos, torch.stack((angles.cos(), (angles / 100).cos()), dim=1))
    torch.testing.assert_close(sin, torch.stack((angles.sin(), (angles / 100).sin()), dim=1))


@pytest.mark.parametrize("vocab_size", [2, 43, 1_000, 50_257])
@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_untrained_loss_is_that_of_guessing(vocab_size: int, zero_init: bool, tie_embeddings: bool) -> None:
    network = GPT(vocab_size, 64, 4, 4, 256, 64, zero_init=zero_init, tie_embeddings=tie_embeddings)
    tokens = torch.randint(vocab_size, (4, 65))
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # A tied head finds the token it has just read a little likelier, which shows where there are few others.
    assert loss.item() == pytest.approx(math.log(vocab_size), abs=0.2 if tie_embeddings else 0.05)


def test_initial_weights_are_gpt2s() -> None:
    network = GPT(1_000, 128, 4, 8, 512, 64, tie_embeddings=False)
    assert network.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert network.blocks[3].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    for matrix in (network.blocks[3].attention.out, network.blocks[3].feed_forward.out):
        assert matrix.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # 0.02 / sqrt(2 * 8)
        assert not matrix.bias.any()


def test_qk_norm_makes_the_scores_blind_to_the_length_of_queries_and_keys() -> None:
    network = scrambled(qk_norm=True, bias=False)
    tokens = torch.randint(11, (2, 9))
    logits = network(tokens)
    with torch.no_grad():
        network.blocks[0].attention.qkv.weight[:32] *= 7.0  # queries and keys
    torch.testing.assert_close(network(tokens), logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        network.blocks[0].attention.qkv.weight[32:] *= 7.0  # values
    assert (network(tokens) - logits).abs().max() > 0.01


def test_with_zero_init_an_untied_head_guesses_evenly() -> None:
    network = GPT(**SIZES, zero_init=True, tie_embeddings=False)
    assert not network(torch.randint(11, (2, 9))).any()


def test_with_zero_init_every_block_starts_as_the_identity() -> None:
    network = GPT(**SIZES, zero_init=True)
    x = torch.randn(2, 5, 16)
    assert torch.equal(network.blocks[0](x), x)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-xl", 1_557_611_200)]
)
def test_gpt2_presets_have_the_published_size(preset: str, parameters: int) -> None:
    from hydra import compose, initialize_config_dir

    from language_model.runs.config import ROOT, build

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [f"model={preset}", "vocab_size=50257"])
    with torch.device("meta"):
        network = build(config, "model")
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_heads": 3}, "n_heads=3 does not divide d_model=16; allowed: 1, 2, 4, 8, 16"),
        ({"n_heads": 16, "position": "rotary"}, "even head size"),
    ],
)
def test_impossible_sizes_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GPT(**SIZES | options)


def test_a_sequence_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens is longer than max_seq_len=12"):
        GPT(**SIZES)(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_dropout_drops_exactly_p(p: float) -> None:
    """Over 4,000 masks of 251 values: a mask's share is one of two multiples of 1/256, and their mean is p."""
    dropout, x = Dropout(p), torch.ones(251)
    masks = torch.stack([dropout(x) for _ in range(4_000)])
    dropped = masks == 0
    assert masks[~dropped].unique().tolist() == pytest.approx([1 / (1 - p)])
    lower = math.floor(256 * p) / 256
    spread = (p - lower) * (lower + 1 / 256 - p) + p * (1 - p) / 251  # of a mask's share: threshold, then values
    assert dropped.float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(spread / 4_000))
    each = dropped.float().mean(0)  # no place in the mask is dropped more often than another
    assert (each - p).abs().max() < 5 * math.sqrt(p * (1 - p) / 4_000)


@settings(max_examples=50, deadline=None)
@given(p=st.floats(0, 1, exclude_max=True), shape=st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_dropout_works_for_every_p_and_shape(p: float, shape: list[int]) -> None:
    x = torch.ones(shape, dtype=torch.float64)
    kept = Dropout(p)(x)
    assert kept.shape == x.shape
    assert all(value in (0, pytest.approx(1 / (1 - p))) for value in kept.unique().tolist())


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore")
def test_compiled_dropout_draws_the_same_masks() -> None:
    """Also where one process compiles it with several p."""
    x = torch.ones(3, 1_003)
    for p in (0.001, 0.1, 0.5, 0.999):
        dropout = Dropout(p)
        compiled = torch.compile(lambda x, each=dropout: each(x), options={"fallback_random": True})
        torch.manual_seed(1)
        expected = dropout(x)
        torch.manual_seed(1)
        assert compiled(x).equal(expected)


def test_normalised_queries_and_keys_have_the_epsilon_of_the_blocks() -> None:
    """Queries and keys so small that the epsilon decides: by the formula of RMSNorm with the blocks' 1e-6."""
    network = scrambled(qk_norm=True, norm="rmsnorm", bias=False, n_layers=1)
    attention, epsilon = network.blocks[0].attention, network.blocks[0].attention_norm.eps
    assert epsilon == network.norm.eps == 1e-6
    with torch.no_grad():
        attention.qkv.weight[: 2 * 16] *= 1e-3
    x = torch.randn(1, 5, 16)
    q, k, v = attention.qkv(x).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (each / (each.square().mean(-1, keepdim=True) + epsilon).sqrt() for each in (q, k))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    expected = attention.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 5, 16))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_independent_and_reaches_the_gradient() -> None:
    x = torch.ones(1_000, 64, requires_grad=True)
    kept = Dropout(0.5)(x)
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())  # what was dropped gets no gradient, what stayed its scale
    centred = (kept.detach() - 1).view(-1, 64)
    correlations = centred.T @ centred / 1_000 - torch.eye(64)
    assert correlations.abs().max() < 0.2
    assert torch.equal(Dropout(0.5).eval()(x), x)
    torch.manual_seed(1)
    first = Dropout(0.5)(x)
    torch.manual_seed(1)
    assert torch.equal(Dropout(0.5)(x), first)


def test_operations_are_those_of_gpt_2() -> None:
    """By hand for 124M: 12 blocks of 12 x 768² weights and the tied head, and attention's two products."""
    with torch.device("meta"):
        gpt2 = GPT(50257, 768, 12, 12, 3072, 1024)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert gpt2.flops_per_token(1024) == 6 * weights + 12 * 12 * 768 * 1024
    # As counted by torch while it runs: forward and backward, attention in full.
    small = GPT(11, 16, 2, 3, 24, 12, tie_embeddings=False, attention="unfused")  # whose products are counted
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        small(tokens).sum().backward()
    assert counter.get_total_flops() == small.flops_per_token(12) * 24
