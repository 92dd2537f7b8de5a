"""Tokens to shifted windows, and the order of the windows in training."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from language_model.data.token_files import TokenFile

IGNORE_INDEX = -100  # targets with this value count in no loss (cross_entropy's default)

Tokens = np.ndarray | TokenFile


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Every window of token sequences as a pair (inputs, targets), the targets shifted by one, each (seq_len,) int64.

    Window i of a sequence starts at its token i, so it has len(tokens) - seq_len windows; the next sequence's follow.
    Tokens are read when a window is accessed.
    """

    def __init__(self, parts: Sequence[Tokens], seq_len: int) -> None:
        self.parts = parts
        self.seq_len = seq_len
        self.views = [sliding_window_view(np.asarray(part), seq_len + 1) for part in parts if len(part) > seq_len]
        self.ends = np.cumsum([len(view) for view in self.views])

    def __reduce__(self) -> tuple:
        return type(self), (self.parts, self.seq_len)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__(np.array([index]))
        return inputs[0], targets[0]

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gather a whole batch at once: indices (B,) -> inputs, targets, each (B, seq_len)."""
        if len(self.views) == 1:
            batch = self.views[0][indices].astype(np.int64)
        else:
            batch = np.empty((len(indices), self.seq_len + 1), np.int64)
            part_of_window = np.searchsorted(self.ends, indices, side="right")
            for i in np.unique(part_of_window):
                view = self.views[i]
                batch[part_of_window == i] = view[indices[part_of_window == i] - self.ends[i] + len(view)]
        windows = torch.from_numpy(batch)
        return windows[:, :-1], windows[:, 1:]


class WindowsInOrder(Windows):
    """Windows without overlap, in order: each token but a sequence's first is predicted once.

    The last window of a sequence is padded; padding has the target IGNORE_INDEX.
    """

    def __init__(self, parts: Sequence[Tokens], seq_len: int) -> None:
        self.parts = parts
        self.seq_len = seq_len
        self.ends = np.cumsum([-(-(len(part) - 1) // seq_len) for part in parts])

    def __getitems__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gather a whole batch at once: indices (B,) -> inputs, targets, each (B, seq_len)."""
        batch = np.full((len(indices), self.seq_len + 1), IGNORE_INDEX, np.int64)
        part_of_window = np.searchsorted(self.ends, indices, side="right")
        for row, i, index in zip(batch, part_of_window, indices, strict=True):
            start = (index - (self.ends[i - 1] if i else 0)) * self.seq_len
            window = np.asarray(self.parts[i])[start : start + self.seq_len + 1]
            row[: len(window)] = window
        windows = torch.from_numpy(batch)
        return windows[:, :-1].clamp(min=0), windows[:, 1:]


def permute(positions: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return the values at these positions of a permutation of 0 to n - 1: int64, of the same shape.

    The permutation is a function of (n, keys), and only these values are computed: by a Feistel network on pairs
    (left, right) of numbers, one round for each key. Values outside 0 to n - 1 go through the network again (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    sizes = (math.isqrt(n - 1) + 1, -(-n // (math.isqrt(n - 1) + 1)))  # of left and right; their product is at least n

    def feistel(numbers: np.ndarray) -> np.ndarray:
        halves = list(np.divmod(numbers, sizes[1]))
        for i, key in enumerate(keys):
            this, other = i % 2, 1 - i % 2
            halves[this] = (halves[this] + splitmix64(halves[other], key) % sizes[this]) % sizes[this]
        return halves[0] * sizes[1] + halves[1]

    result = feistel(np.asarray(positions, np.uint64))
    while (outside := result >= n).any():
        result[outside] = feistel(result[outside])
    return result.astype(np.int64)


def splitmix64(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return a hash of each number, uint64: the last steps of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = numbers + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ShuffledBatches(Sampler[np.ndarray]):
    """The window indices (B,) of each training batch, one epoch at a time, without the last partial batch.

    Windows start `stride` tokens apart, the same number of them from an offset that is random in each epoch: 0 to
    stride - 1, or `stride` more where that many windows still fit, so that over the epochs every window has its turn.
    The order is a function of (seed, epoch) alone. Of every `world_size` batches, the process `rank` takes the one
    with its number. A resumed epoch starts after the batches that are `done`.

    Raises:
        ValueError: there are too few windows for one batch of each process.
    """

    def __init__(
        self,
        num_starts: int,
        stride: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        done: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_windows = num_starts // stride  # the same number from every offset
        self.num_starts = num_starts
        self.stride = stride
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.done = done
        self.rank = rank
        self.world_size = world_size
        if not self.num_windows:
            raise ValueError(f"stride={stride}: the training data has only {num_starts:,} windows; at most that many")
        if not len(self):
            each = f" on each of {world_size} devices" if world_size > 1 else ""
            allowed = f"at most {self.num_windows // world_size}" if self.num_windows >= world_size else "fewer devices"
            raise ValueError(
                f"batch_size={batch_size}: the training data has {self.num_windows:,} windows, too few for one batch"
                f"{each}; {allowed}, or a smaller data.stride or data.seq_len"
            )

    def __len__(self) -> int:
        return self.num_windows // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        number, *keys = np.random.SeedSequence((self.seed, self.epoch())).generate_state(9, np.uint64)
        later, offset = (int(part) for part in np.divmod(number, np.uint64(self.stride)))
        if later % 2 and offset + self.stride * self.num_windows < self.num_starts:
            offset += self.stride  # else the last windows would have no turn
        chunk = max(1, 4096 // self.batch_size)  # batches that are computed together
        for first in range(self.done(), len(self), chunk):
            batches = np.arange(first, min(first + chunk, len(self))) * self.world_size + self.rank
            positions = batches[:, None] * self.batch_size + np.arange(self.batch_size)
            yield from offset + self.stride * permute(positions, self.num_windows, np.array(keys))


def check_training(num_tokens: int, seq_len: int, what: str = "the training data") -> None:
    """Raise ValueError if there are too few tokens for one window; `what` has them."""
    if num_tokens <= seq_len:
        allowed = f"allowed: at most {num_tokens - 1}" if num_tokens > 1 else "more text is needed"
        raise ValueError(
            f"seq_len={seq_len}: {what} has {num_tokens:,} tokens, too few for one window and its shifted target, "
            f"{seq_len + 1:,} tokens; {allowed}"
        )


def check_validation(num_tokens: int, what: str) -> None:
    """Raise ValueError if there are too few tokens for one prediction; `what` has them."""
    if num_tokens < 2:
        raise ValueError(
            f"{what} has too few tokens, {num_tokens}: at least 2 are needed, one to predict from the other"
        )
