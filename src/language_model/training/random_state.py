"""The state of every random generator, for resuming exactly."""

import random
from typing import Any

import numpy as np
import torch

RandomState = tuple[torch.Tensor, torch.Tensor | None, tuple, Any]


def get_random_state() -> RandomState:
    """Return the state of every generator that a run may use: torch's, this GPU's, Python's, numpy's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=True)


def to_plain_values(state: RandomState) -> dict[str, Any]:
    """Return a random state as tensors and plain values, which a checkpoint can hold."""
    torch_state, cuda, (version, internal, gauss), (name, keys, *rest) = state
    return {
        "torch": torch_state,
        "cuda": cuda,
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore every generator."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
