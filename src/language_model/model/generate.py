"""Sampling: new tokens from the probabilities that a network gives."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """A network to sample from: (1, T) int64 -> logits (1, T, V), for T up to max_seq_len.

    If it has `new_cache`, as GPT has, it is also called with a cache, and then with the new tokens only.
    """

    max_seq_len: int

    def __call__(self, tokens: Tensor, *cache: Any) -> Tensor:
        """Return the logits."""


@torch.inference_mode()
def generate(
    network: Network,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids, each sampled given all before it; the network should be in eval mode.

    The network sees the last `max_seq_len` tokens. Keys and values are cached until the text is longer than that; then
    each new token shifts all positions, and everything is computed again. No other random state is changed.

    Args:
        network: the network to sample from.
        tokens: the prompt, (T,) int64 with T >= 1, on the network's device.
        max_new_tokens: number of tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only; None for all.
        top_p: sample from the most likely tokens with this total probability (arXiv:1904.09751); None for all.
        seed: the same seed gives the same tokens.
        vocab_size: number of real tokens, if the network's V is padded; None for V.
        end_of_text: stop at this token, without yielding it; None never to stop.
        use_cache: False computes everything again for each token: slower, with the same result.

    Raises:
        ValueError: an empty prompt, or a setting out of its range, as `check_sampling` says.
    """
    check_sampling(tokens, temperature, top_k, top_p, seed)
    generator = torch.Generator().manual_seed(seed)
    cache = network.new_cache() if use_cache and hasattr(network, "new_cache") else None
    for _ in range(max_new_tokens):
        if cache is not None and len(tokens) <= network.max_seq_len:
            logits = network(tokens[None, cache.length :], cache)
        else:
            logits = network(tokens[None, -network.max_seq_len :])
        token = sample_token(logits[0, -1, :vocab_size].float().cpu(), temperature, top_k, top_p, generator)
        if token == end_of_text:
            return
        yield token
        tokens = torch.cat((tokens, tokens.new_tensor([token])))


def check_sampling(tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Raise ValueError for settings that cannot be sampled with."""
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; at least one token is needed")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: allowed: finite numbers from 0 on; 0 takes the most likely token")
    if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
        raise ValueError(f"top_k={top_k}: allowed: whole numbers from 1 on, or null for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: allowed: above 0, up to 1, or null for all")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: allowed: 0 to 2**64 - 1")


def stream_decode(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as they arrive; a character of several tokens when it is complete."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 8:  # more than any character has
            yield text
            pending = []
    if pending:
        yield decode(pending)


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Sample a token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None and top_p < 1:  # a sum of all is 1 only up to rounding
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= top_p]] = 0.0  # those before it are enough
    return int(torch.multinomial(probabilities, 1, generator=generator))
