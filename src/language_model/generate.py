"""Sampling: tokens that a network finds likely after others."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """What can be sampled from: (1, T) int64 -> logits (1, T, V), for T up to max_seq_len."""

    max_seq_len: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits."""


@torch.inference_mode()
def generate(
    network: Network,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids, each drawn after all before it.

    The draw has a generator of its own, so that it changes no other random state. The network sees the last
    `max_seq_len` tokens, and should be in eval mode.

    Args:
        network: the network to sample from.
        tokens: the prompt, (T,) int64 with T >= 1, on the network's device.
        max_new_tokens: how many tokens to draw.
        temperature: divides the logits; below 1 is safer, above 1 wilder, 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; None for all.
        seed: the same seed draws the same tokens.
        vocab_size: how many of the network's V tokens there are, when it has more to be a round number; None for V.

    Raises:
        ValueError: an empty prompt, a negative temperature, or top_k below 1.
    """
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; at least one token is needed")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token; allowed: 1 and up, or null for all")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = network(tokens[None, -network.max_seq_len :])[0, -1, :vocab_size].float().cpu()  # (V,)
        if temperature == 0:
            token = logits.argmax()
        else:
            if top_k is not None and top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[0]
        tokens = torch.cat((tokens, token[None].to(tokens.device)))
        yield int(token)
