"""Means over many values, kept on their device."""

import torch
from torch import Tensor


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many tokens: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Mean:
    """A weighted mean, kept on the device of its values, so that adding to it does not wait."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weight: Tensor | float = 0.0

    def add(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add a value with its weight."""
        self.total = self.total + value.to(accumulation_dtype(value.device)) * weight
        self.weight = self.weight + weight

    @property
    def value(self) -> Tensor:
        """The mean of the added values."""
        return torch.as_tensor(self.total / self.weight)
