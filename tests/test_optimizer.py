import pytest
import torch
from torch import nn

from language_model.model.gpt import GPT
from language_model.training.optimizer import adamw, muon, newton_schulz


def step(decay_matrices_only: bool, weight_decay: float) -> tuple[dict[str, float], torch.optim.Optimizer]:
    """Take one step with no gradient at all, so that only weight decay moves: each parameter's share that is left."""
    network = GPT(11, 16, 2, 1, 24, 12, tie_embeddings=False)
    for parameter in network.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(
        network.named_parameters(), 0.1, weight_decay=weight_decay, decay_matrices_only=decay_matrices_only
    )
    optimizer.step()
    return {name: parameter.mean().item() for name, parameter in network.named_parameters()}, optimizer


def test_weight_decay_on_everything_as_the_chapter_has_it() -> None:
    left, optimizer = step(decay_matrices_only=False, weight_decay=0.5)
    assert list(left.values()) == pytest.approx([0.95] * len(left))
    assert len(optimizer.param_groups) == 1


def test_weight_decay_on_matrices_only() -> None:
    left, _ = step(decay_matrices_only=True, weight_decay=0.5)
    assert {name for name, share in left.items() if share == 1.0} == {
        name for name in left if name.endswith("bias") or "norm" in name
    }
    assert left["token_embedding.weight"] == left["blocks.0.attention.qkv.weight"] == pytest.approx(0.95)


def test_a_step_is_torchs_own() -> None:
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = (
        adamw(ours.named_parameters(), **settings, fused=False),
        torch.optim.AdamW(theirs.parameters(), **settings),
    )
    for _ in range(5):
        x = torch.randn(4, 5)
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def gradients(network: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def gpt(**parts) -> GPT:
    torch.manual_seed(0)
    return GPT(11, 16, 2, 2, 24, 12, tie_embeddings=False, **parts)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_are_stepped_as_torchs_muon_does(weight_decay: float) -> None:
    ours, theirs = gpt(), gpt()
    mine = muon(ours.named_parameters(), 0.02, weight_decay=weight_decay, adamw_lr=0.003, adamw_weight_decay=0.1)
    inside = {name for name, p in theirs.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    parameters = dict(theirs.named_parameters())
    oracles = [
        torch.optim.Muon([parameters[name] for name in inside], 0.02, weight_decay=weight_decay),
        torch.optim.AdamW(
            [
                {"params": [p for n, p in parameters.items() if n not in inside and p.ndim == 2], "weight_decay": 0.1},
                {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.003, betas=(0.9, 0.99), eps=1e-8,
        ),
    ]  # fmt: skip
    for seed in range(5):
        for network in (ours, theirs):
            gradients(network, seed)
        mine.step()
        for oracle in oracles:
            oracle.step()
    assert inside
    for name, parameter in ours.named_parameters():  # bfloat16 sums in another order
        close = {"rtol": 0.02, "atol": 0.002} if name in inside else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(parameter, parameters[name], **close)


def test_stacked_matrices_are_taken_one_by_one() -> None:
    whole, parts = nn.Linear(6, 12, bias=False), [nn.Linear(6, 4, bias=False) for _ in range(3)]
    for part, weight in zip(parts, whole.weight.detach().chunk(3), strict=True):
        part.weight.data.copy_(weight)
    gradients(whole, 0)
    for part, gradient in zip(parts, whole.weight.grad.chunk(3), strict=True):
        part.weight.grad = gradient
    muon([("qkv", whole.weight)], 0.1, stacked={"q*": 3}).step()
    muon([(str(i), part.weight) for i, part in enumerate(parts)], 0.1).step()
    torch.testing.assert_close(whole.weight, torch.cat([part.weight for part in parts]))


def test_the_rates_of_both_parts_follow_one_schedule() -> None:
    optimizer = muon(gpt().named_parameters(), 0.02, adamw_lr=0.004)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    assert optimizer.param_groups[0]["muon"]
    gradients_of = [p for group in optimizer.param_groups for p in group["params"]]
    for p in gradients_of:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    schedule.step()
    assert {(group["muon"], group["lr"]) for group in optimizer.param_groups} == {(True, 0.01), (False, 0.002)}


def test_muon_goes_on_from_its_state_to_the_same_bits() -> None:
    networks = [gpt(), gpt()]
    whole, stopped = (muon(network.named_parameters(), 0.02) for network in networks)
    for seed in range(4):
        if seed == 2:
            state = stopped.state_dict()
            stopped = muon(networks[1].named_parameters(), 0.02)
            stopped.load_state_dict(state)
        for network, optimizer in zip(networks, (whole, stopped), strict=True):
            gradients(network, seed)
            optimizer.step()
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(a, b)


def test_newton_schulz_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 20)
    values = torch.linalg.svdvals(newton_schulz(matrices, 5).float())
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_without_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="not_muon: leaves no matrix for Muon"):
        muon(gpt().named_parameters(), 0.02, not_muon=("*",))
