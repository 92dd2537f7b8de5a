"""From a text file to batches: text -> token ids -> order of windows -> shifted windows."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from language_model.tokenizer import CharTokenizer

IGNORED = -100  # the target that counts in no loss: cross_entropy's default ignore_index


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Every window of a token sequence as a pair (inputs, targets), the targets shifted by one, each (seq_len,) int64.

    Window i starts at token i, so there are len(tokens) - seq_len of them; ValueError if that leaves none.
    """

    def __init__(self, tokens: Tensor, seq_len: int) -> None:
        if len(tokens) <= seq_len:
            raise ValueError(
                f"{len(tokens):,} tokens are too few for one window of seq_len={seq_len} and its shifted target: "
                f"at least {seq_len + 1} are needed"
            )
        self.windows = tokens.unfold(0, seq_len + 1, 1)  # a view: no token is copied

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor]:
        return self.windows[start, :-1], self.windows[start, 1:]

    def __getitems__(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Gather a whole batch at once: starts (B,) -> inputs, targets, each (B, seq_len)."""
        batch = self.windows[starts]
        return batch[:, :-1], batch[:, 1:]


class ShuffledBatches(Sampler[Tensor]):
    """The starts (B,) of each training batch's windows, one epoch at a time, the last partial batch dropped.

    Windows stand `stride` tokens apart, from an offset drawn anew each epoch. The order is a function of
    (seed, epoch) alone; of every world_size batches, each rank takes the one with its number.
    """

    def __init__(
        self,
        num_starts: int,
        stride: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_windows = num_starts // stride  # as many from every offset
        self.stride = stride
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size
        if not len(self):
            each = f" on each of {world_size} devices" if world_size > 1 else ""
            raise ValueError(f"{self.num_windows:,} windows are too few for one batch of batch_size={batch_size}{each}")

    def __len__(self) -> int:
        return self.num_windows // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        entropy = np.random.SeedSequence((self.seed, self.epoch())).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))
        offset = torch.randint(self.stride, (1,), generator=generator)
        order = torch.randperm(self.num_windows, generator=generator)[: len(self) * self.world_size * self.batch_size]
        batches = (offset + order * self.stride).view(len(self), self.world_size, self.batch_size)
        yield from batches[:, self.rank]


class TextData(L.LightningDataModule):
    """One text file as shifted windows of characters, its tail as the validation split.

    A batch is (inputs, targets), each (B, T) int64.

    Args:
        path: the text file, UTF-8.
        seq_len: window length T, in tokens.
        batch_size: windows in a batch B, on each device.
        stride: tokens from one training window to the next.
        val_fraction: share of the tokens, at the end of the text, that is kept for validation; 0 for none.
        num_workers: processes that prepare batches; 0 is fastest for tokens in memory.
        seed: decides the order of the windows.

    Raises:
        OSError, ValueError: the file cannot be read, is not UTF-8, or is too short for a window or a batch.
    """

    def __init__(
        self,
        path: str,
        seq_len: PositiveInt,
        batch_size: PositiveInt,
        stride: PositiveInt = 1,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.stride = stride
        self.num_workers = num_workers
        self.seed = seed

        text = read_text(self.path)
        num_val = int(len(text) * val_fraction)
        train_text, val_text = text[: len(text) - num_val], text[len(text) - num_val :]
        self.tokenizer = CharTokenizer(train_text)
        self.num_characters = len(text)
        words = re.search(r"\S+(\s+\S+)?", train_text[:100])
        self.opening = words[0] if words else train_text[:1]  # the first two words
        self.train_windows = Windows(torch.tensor(self.tokenizer.encode(train_text)), seq_len)
        self.val_tokens: Tensor | None = None
        if val_fraction > 0:
            try:
                self.val_tokens = torch.tensor(self.tokenizer.encode(val_text), dtype=torch.int64)
                Windows(self.val_tokens, 1)
            except ValueError as error:
                raise ValueError(f"the validation split, the last {num_val:,} characters: {error}") from None
        self.order()  # raises where the data are too few for a batch

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.val_tokens is not None

    def order(self) -> ShuffledBatches:
        """Return the order of the training batches, for this process of this trainer."""
        trainer = self.trainer
        return ShuffledBatches(
            len(self.train_windows),
            self.stride,
            self.batch_size,
            self.seed,
            epoch=lambda: trainer.current_epoch if trainer else 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def train_dataloader(self) -> DataLoader:
        """Return batches of shuffled windows."""
        return self._loader(self.train_windows, self.order())

    def val_dataloader(self) -> DataLoader | list:
        """Return the whole validation split once, in order, windows not overlapping; no loader without a split.

        The last window is filled up to seq_len; what was filled in has the target IGNORED.
        """
        if self.val_tokens is None:
            return []
        num_windows = -(-(len(self.val_tokens) - 1) // self.seq_len)
        filling = num_windows * self.seq_len + 1 - len(self.val_tokens)
        windows = FilledWindows(F.pad(self.val_tokens, (0, filling), value=IGNORED), self.seq_len)
        starts = torch.arange(0, num_windows * self.seq_len, self.seq_len)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(windows, starts[rank::world_size].split(self.batch_size))

    def _loader(self, windows: Windows, batches: ShuffledBatches | tuple[Tensor, ...]) -> DataLoader:
        return DataLoader(
            windows,
            batch_sampler=batches,  # type: ignore[arg-type]  # tensors of starts, not lists
            collate_fn=whole_batch,  # type: ignore[arg-type]  # of __getitems__, not a list
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else iterating draws from the global one
        )


class FilledWindows(Windows):
    """Windows over tokens that end in IGNORED: as inputs these are token 0."""

    def __getitems__(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Gather a whole batch at once: starts (B,) -> inputs, targets, each (B, seq_len)."""
        inputs, targets = super().__getitems__(starts)
        return inputs.clamp(min=0), targets


def whole_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collate what is a batch already."""
    return batch


def read_text(path: Path) -> str:
    """Return the text, line ends as they are; ValueError for an empty file, or naming the byte that is not UTF-8."""
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start:,} is 0x{content[error.start]:02x}") from None
