import pytest
import torch
from torch import nn

from language_model.gpt import GPT
from language_model.optim import adamw


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
