"""Sampling: tokens that a network finds likely after others."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """What can be sampled from: (1, T) int64 -> logits (1, T, V), for T up to max_seq_len.

    If it has a `new_cache`, as GPT has, it is called with a cache too, and then with the new tokens only.
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
    """Yield up to max_new_tokens ids, each drawn after all before it.

    The draw has a generator of its own, so that it changes no other random state. The network sees the last
    `max_seq_len` tokens, and should be in eval mode. Until there are so many, keys and values are cached; from then on
    each new token moves all positions, and all is computed anew.

    Args:
        network: the network to sample from.
        tokens: the prompt, (T,) int64 with T >= 1, on the network's device.
        max_new_tokens: how many tokens to draw.
        temperature: divides the logits; below 1 is safer, above 1 wilder, 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; None for all.
        top_p: draw from the likeliest tokens that together have this probability (arXiv:1904.09751); None for all.
        seed: the same seed draws the same tokens.
        vocab_size: how many of the network's V tokens there are, when it has more to be a round number; None for V.
        end_of_text: the token after which to stop, itself not yielded; None to go on.
        use_cache: False computes everything anew for each token: slower, and the same.

    Raises:
        ValueError: an empty prompt, a negative temperature, top_k below 1, or top_p not above 0 and up to 1.
    """
    if tokens.numel() == 0:
        raise ValueError("the prompt is empty; at least one token is needed")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} leaves no token; allowed: 1 and up, or null for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is no probability; allowed: above 0, up to 1, or null for all")
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


def stream_decode(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids as they come, a character that takes several tokens when it is whole."""
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
    """Draw a token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True, stable=True)
        probabilities[order[ordered.cumsum(-1) - ordered >= top_p]] = 0.0  # those before it are enough
    return int(torch.multinomial(probabilities, 1, generator=generator))
