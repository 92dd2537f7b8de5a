"""Optimizers that do more than torch's own.

An optimizer is anything callable with ``network.named_parameters()`` and its settings, so that every class in
``torch.optim`` works from a file in ``conf/optimizer`` alone.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: PositiveFloat,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: PositiveFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
    decay_matrices_only: bool = False,
    fused: bool = True,
) -> torch.optim.AdamW:
    """Return torch's AdamW (arXiv:1711.05101), weight decay on every parameter or on matrices only.

    Args:
        named_parameters: names and parameters of the network.
        lr: peak learning rate.
        betas: decay rates of the running means of the gradient and of its square.
        eps: added to the root of the second mean.
        weight_decay: share of a weight that a step of rate 1 would remove.
        decay_matrices_only: leave out biases, norms and all else with fewer than two dimensions.
        fused: one kernel for all parameters (not with float16 precision: gradients there must be unscaled first).
    """
    named_parameters = list(named_parameters)
    vectors = [pair for pair in named_parameters if pair[1].ndim < 2] if decay_matrices_only else []
    matrices = [pair for pair in named_parameters if pair[1].ndim >= 2] if vectors else named_parameters
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
