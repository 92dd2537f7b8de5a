"""A GPT in one file: network, block, attention, feed-forward, and their parts (all but dropout).

The defaults are GPT-2's parts. The options are:

- ``position``: ``learned`` embeddings added to the tokens', or ``rotary`` (arXiv:2104.09864): rotated queries and keys
- ``norm``: ``layernorm`` or ``rmsnorm`` (arXiv:1910.07467)
- ``activation``: ``gelu`` (its tanh form, as GPT-2), ``relu2`` (arXiv:2109.08668) or ``swiglu`` (arXiv:2002.05202)
- ``qk_norm``: queries and keys are normalised before their product (arXiv:2010.04245)
- ``bias``: bias vectors in the linear and layernorm layers
- ``tie_embeddings``: one matrix embeds the tokens and gives the logits (arXiv:1608.05859)
- ``zero_init``: projections into the residual stream start at zero, so each block starts as the identity

Shapes: B batch, T time, C channels (d_model), H heads, D head size (C / H), V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from language_model.model.dropout import Dropout

Probability = Annotated[float, Field(ge=0, lt=1)]
RMS_EPSILON = 1e-6  # added to the mean square in every root mean square norm; layernorm has GPT-2's 1e-5


class GPT(nn.Module):
    """Tokens (B, T) int64 -> logits (B, T, V) of each next token.

    Args:
        vocab_size: number of tokens V.
        d_model: width C of the residual stream.
        n_heads: attention heads H; divides d_model.
        n_layers: blocks.
        d_ff: hidden width of the feed-forward layer (for swiglu, of each half).
        max_seq_len: largest T, in tokens.
        dropout: probability, after the embedding, in attention, and at each block's two outputs.
        attention: ``unfused``, in single operations, or ``fused``, by torch's kernel; None for fused.

    Raises:
        ValueError: n_heads does not divide d_model, or the head size is odd with rotary positions.
    """

    def __init__(
        self,
        vocab_size: PositiveInt,
        d_model: PositiveInt,
        n_heads: PositiveInt,
        n_layers: PositiveInt,
        d_ff: PositiveInt,
        max_seq_len: PositiveInt,
        dropout: Probability = 0.0,
        position: Literal["learned", "rotary"] = "learned",
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        activation: Literal["gelu", "relu2", "swiglu"] = "gelu",
        qk_norm: bool = False,
        bias: bool = True,
        tie_embeddings: bool = True,
        zero_init: bool = False,
        attention: Literal["unfused", "fused"] | None = None,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            divisors = ", ".join(str(n) for n in range(1, d_model + 1) if d_model % n == 0)
            raise ValueError(f"n_heads={n_heads} does not divide d_model={d_model}; allowed: {divisors}")
        if position == "rotary" and d_model // n_heads % 2:
            raise ValueError(f"position=rotary needs an even head size, and d_model / n_heads = {d_model // n_heads}")
        self.max_seq_len = max_seq_len
        self._train_block: Callable[..., Tensor] | None = None  # compiled
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model) if position == "learned" else None
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                make_norm(norm, d_model, bias),
                Attention(d_model, n_heads, max_seq_len, dropout, position == "rotary", qk_norm, bias, attention),
                make_norm(norm, d_model, bias),
                FeedForward(d_model, d_ff, activation, bias),
                dropout,
            )
            for _ in range(n_layers)
        )
        self.norm = make_norm(norm, d_model, bias)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.init_weights(zero_init)
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight

    @torch.no_grad()
    def init_weights(self, zero_init: bool) -> None:
        """Initialise as GPT-2: normal, standard deviation 0.02, for residual projections 0.02 / sqrt(2 n_layers).

        With zero_init, these projections and an untied head start at zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        residual_std = 0.0 if zero_init else 0.02 / math.sqrt(2 * len(self.blocks))
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                nn.init.normal_(module.out.weight, std=residual_std)
        if zero_init:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Map tokens (B, T) int64 to logits (B, T, V); ValueError for more than max_seq_len tokens.

        With a cache, the tokens follow those that are in it, and are added to it.
        """
        start = cache.length if cache else 0
        end = start + tokens.shape[1]
        if self.max_seq_len < end:
            raise ValueError(f"a sequence of {end} tokens is longer than max_seq_len={self.max_seq_len}")
        x = self.token_embedding(tokens)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:end]
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = (
                self._train_block(block, x)
                if self._train_block and self.training
                else block(x, cache and cache.layers[i])
            )
        if cache:
            cache.length = end
        return self.head(self.norm(x))

    def compile_for_training(self, **options: Any) -> None:
        """Compile the training pass of a block, once for all blocks; `options` are torch.compile's.

        Validation and generation, where shapes vary, are not compiled, nor are the embeddings, whose compiled gradient
        differs from run to run.
        """

        def train(block: Block, x: Tensor) -> Tensor:
            return block(x)

        self._train_block = torch.compile(train, **options)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the operations of a training step per token, for sequences of T = `seq_len`: 6 N + 12 L C T.

        N is the number of weights in matrix products (PaLM, arXiv:2204.02311, appendix B), so without embeddings and
        vectors. Attention counts in full, though half of it is masked, as is usual.
        """
        matrices = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        return 6 * sum(weight.numel() for weight in matrices) + 12 * len(self.blocks) * self.head.in_features * seq_len

    def new_cache(self) -> "Cache":
        """Return an empty cache, for sampling token by token."""
        return Cache(len(self.blocks))


class Cache:
    """The keys and values of earlier tokens in each block, so that they are computed once."""

    def __init__(self, n_layers: int) -> None:
        self.length = 0  # tokens in it
        self.layers = [CachedLayer() for _ in range(n_layers)]


class CachedLayer:
    """One block's keys and values, in buffers for max_seq_len tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        self.length = 0

    def add(self, k: Tensor, v: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """Add k and v (B, H, T, D); return all of them (B, H, length, D)."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.keys, self.values = k.new_empty(2, B, H, max_seq_len, D).unbind(0)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Block(nn.Module):
    """One transformer block, pre-norm: attention, then feed-forward, each added to the residual stream."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        ff_norm: nn.Module,
        ff: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = ff_norm
        self.feed_forward = ff
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cached: CachedLayer | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cached))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    causal_mask: Tensor
    rotation: Tensor

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        max_seq_len: int,
        dropout: float,
        rotary: bool,
        qk_norm: bool,
        bias: bool,
        attention: Literal["unfused", "fused"] | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.unfused = attention == "unfused"
        self.rotary = rotary
        self.qk_norm = qk_norm
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = Dropout(dropout)
        mask = torch.full((max_seq_len, max_seq_len), -math.inf).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        if rotary:
            self.register_buffer("rotation", rotary_angles(max_seq_len, d_model // n_heads), persistent=False)

    def forward(self, x: Tensor, cached: CachedLayer | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); position t sees cached positions and 0 to t only."""
        B, T, C = x.shape
        start = cached.length if cached else 0
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, C // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        if self.rotary:
            rotation = self.rotation[:, start : start + T]
            q, k = rotate(q, rotation), rotate(k, rotation)
        if self.qk_norm:
            q, k = (F.rms_norm(each, each.shape[-1:], eps=RMS_EPSILON).to(v.dtype) for each in (q, k))
        dropping = self.training and self.dropout.p > 0
        if cached:
            k, v = cached.add(k, v, len(self.causal_mask))
            mask = self.causal_mask[start : start + T, : start + T].to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.unfused:
            # Softmax computes in float32 anyway; autocast would only add copies.
            with torch.autocast(x.device.type, enabled=False):
                mask = self.causal_mask[:T, :T].to(q.dtype)
                q, k = q.flatten(0, 1), k.flatten(0, 1)  # (B H, T, D)
                scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1]))  # (B H, T, T)
                y = self.dropout(scores.softmax(-1)).view(B, -1, T, T) @ v
        else:
            dropout_p = self.dropout.p if dropping else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two matrices (for swiglu three) applied to each position by itself."""

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(d_model, 2 * d_ff if activation == "swiglu" else d_ff, bias=bias)
        self.out = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.up(x)
        if self.activation == "gelu":
            x = F.gelu(x, approximate="tanh")
        elif self.activation == "relu2":
            x = F.relu(x)
            x = x * x  # on a CPU, its gradient takes half the time of square's
        else:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        return self.out(x)


def make_norm(norm: str, d_model: int, bias: bool) -> nn.Module:
    """Return the normalisation layer called `norm`."""
    return nn.LayerNorm(d_model, bias=bias) if norm == "layernorm" else nn.RMSNorm(d_model, eps=RMS_EPSILON)


def rotary_angles(max_seq_len: int, head_size: int) -> Tensor:
    """Cosines and sines (2, T, D/2) of position × 10000^(-2i/D), arXiv:2104.09864 section 3.2.2."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angles = torch.outer(torch.arange(max_seq_len), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, H, T, D) by its position's angle."""
    cos, sin = rotation.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
