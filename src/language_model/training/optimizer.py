"""AdamW with parameter groups, and Muon.

An optimizer is any function of ``network.named_parameters()`` and settings that returns one, so every class in
``torch.optim`` needs only a file in ``conf/optimizer``.
"""

import math
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

Beta = Annotated[float, Field(ge=0, lt=1)]


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: PositiveFloat,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: PositiveFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
    decay_matrices_only: bool = False,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Return torch's AdamW (arXiv:1711.05101), with weight decay on all parameters or on matrices only.

    Args:
        named_parameters: names and parameters of the network.
        lr: peak learning rate.
        betas: decay rates of the moving averages of the gradient and of its square.
        eps: added to the square root of the second average.
        weight_decay: a step multiplies a weight by 1 − lr × weight_decay.
        decay_matrices_only: no decay on biases, norms and other parameters with fewer than two dimensions.
        fused: one kernel for all parameters (impossible with float16, whose gradients must be unscaled first); None for
            torch's choice.
    """
    named_parameters = list(named_parameters)
    vectors = [pair for pair in named_parameters if pair[1].ndim < 2] if decay_matrices_only else []
    matrices = [pair for pair in named_parameters if pair[1].ndim >= 2] if vectors else named_parameters
    groups = [{"params": matrices, "weight_decay": weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def muon(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: PositiveFloat,
    momentum: Beta = 0.95,
    weight_decay: NonNegativeFloat = 0.0,
    ns_steps: PositiveInt = 5,
    not_muon: tuple[str, ...] = ("*embedding*", "head*"),
    stacked: dict[str, PositiveInt] | None = None,
    adamw_lr: PositiveFloat = 4e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.99),
    eps: PositiveFloat = 1e-8,
    adamw_weight_decay: NonNegativeFloat = 0.0,
    fused: bool | None = None,
) -> "Muon":
    """Return Muon for the matrices inside the blocks, with AdamW for all other parameters.

    Args:
        named_parameters: names and parameters of the network.
        lr: peak learning rate of Muon; AdamW's rate follows the same schedule, in proportion.
        momentum: decay rate of the moving average of the gradient.
        weight_decay: a step multiplies a matrix by 1 − lr × weight_decay.
        ns_steps: Newton-Schulz iterations.
        not_muon: name patterns of matrices for AdamW: the embeddings and the output head.
        stacked: name patterns of parameters that hold several matrices stacked by rows, with their number.
        adamw_lr: peak learning rate of AdamW.
        betas: AdamW's, as in `adamw`.
        eps: added to the square root of the second average.
        adamw_weight_decay: of AdamW's matrices; its vectors have none.
        fused: AdamW's, as in `adamw`.
    """
    groups: dict[tuple[bool, int, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        by_muon = parameter.ndim == 2 and not any(fnmatch(name, pattern) for pattern in not_muon)
        number = next((n for pattern, n in (stacked or {}).items() if by_muon and fnmatch(name, pattern)), 1)
        decay = weight_decay if by_muon else adamw_weight_decay * (parameter.ndim >= 2)
        group = {"params": [], "muon": by_muon, "stacked": number, "weight_decay": decay}
        group |= {"lr": lr, "momentum": momentum, "ns_steps": ns_steps} if by_muon else {"lr": adamw_lr}
        groups.setdefault((not by_muon, number, decay), group)["params"].append(parameter)
    ordered = [groups[key] for key in sorted(groups)]  # Muon's first: the schedule is that of the first group
    if not ordered[0]["muon"]:
        raise ValueError("not_muon: leaves no matrix for Muon")
    return Muon(ordered, lr=lr, betas=betas, eps=eps, fused=fused)


class Muon(torch.optim.AdamW):
    """Muon (kellerjordan.github.io/posts/muon) in the groups marked ``muon``, AdamW in the others: one optimizer.

    Muon's update is the matrix's momentum with all singular values brought near 1, as in torch.optim.Muon, but
    matrices of one shape are computed as one batch.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        self._step_matrices([group for group in groups if group["muon"]])
        return loss

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        found_inf = getattr(
            self, "found_inf", None
        )  # as in torch's optimizers: 1 if this step must not change the weights
        done = 1.0 if found_inf is None else 1 - found_inf
        for group in groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad if found_inf is None else p.grad.where(found_inf == 0, 0.0) for p in parameters]
            for p in parameters:
                if not self.state[p]:  # AdamW expects a step in every state that it loads
                    self.state[p] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"])  # Nesterov's
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * done)
            for parameter, update in zip(parameters, updates, strict=True):
                for matrix, its_update in zip(
                    parameter.chunk(group["stacked"]), update.chunk(group["stacked"]), strict=True
                ):
                    shape = tuple(sorted(matrix.shape))
                    by_shape.setdefault((*shape, group["ns_steps"]), []).append((matrix, its_update, group))
        for (*_, ns_steps), members in by_shape.items():
            wide = torch.stack([update if update.size(0) <= update.size(1) else update.mT for _, update, _ in members])
            steps = newton_schulz(wide, ns_steps).to(wide.dtype) * done
            for (matrix, _, group), step in zip(members, steps, strict=True):
                rows, columns = matrix.shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                matrix.add_(step if rows <= columns else step.mT, alpha=-rate)


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Return matrices (N, R, C), R ≤ C, with their singular values brought near 1, in bfloat16.

    Each iteration maps a singular value s to 3.4445 s − 4.775 s³ + 2.0315 s⁵ (Keller Jordan's coefficients).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
