"""The LightningDataModules: text or token files as batches of windows for training and validation."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader

from language_model.data.prepare import MakeTokenizer, prepare
from language_model.data.text_files import NonEmpty, PathOrPaths, TextFiles, download, errors_name
from language_model.data.token_files import token_files
from language_model.data.tokenizer import Tokenizer
from language_model.data.windows import (
    ShuffledBatches,
    Tokens,
    Windows,
    WindowsInOrder,
    check_training,
    check_validation,
)
from language_model.files import cached_fact


class TokenData(L.LightningDataModule):
    """Token sequences as batches (inputs, targets), each (B, T) int64: shuffled for training, in order for validation.

    Args:
        name: for messages.
        tokenizer: the one that made the tokens.
        train: the training tokens, in one or several sequences.
        val: the validation tokens; empty for no validation.
        seq_len: window length T, in tokens.
        batch_size: windows in a batch B, on each device.
        stride: tokens from one training window to the next.
        num_workers: processes that load batches; 0 is fastest for memory-mapped tokens.
        seed: of the order of the windows.

    Raises:
        ValueError: from `train_batch_sampler`, if there are too few windows for a batch.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        train: Sequence[Tokens],
        val: Sequence[Tokens],
        seq_len: int,
        batch_size: int,
        stride: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.stride = stride
        self.num_workers = num_workers
        self.seed = seed
        self.train_windows = Windows(train, seq_len)
        self.val_windows = WindowsInOrder(val, seq_len) if val else None
        self.num_train_tokens = sum(map(len, train))
        self.num_val_tokens = sum(map(len, val))
        first = np.asarray((*train, *val)[0])[:100]
        beginning = tokenizer.decode(first[first != tokenizer.end_of_text]).rstrip("\ufffd")  # a character cut in half
        words = re.search(r"\S+(\s+\S+)?", beginning)
        self.default_prompt = words[0][:40] if words else beginning[:1]  # the first two words

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split."""
        return self.val_windows is not None

    def train_batch_sampler(self) -> ShuffledBatches:
        """Return the order of the training batches for this process of the trainer."""
        trainer = self.trainer

        def done() -> int:
            """Return the number of this epoch's batches that were done before the run resumed."""
            return trainer.fit_loop.epoch_loop.batch_progress.current.completed if trainer else 0

        return ShuffledBatches(
            len(self.train_windows),
            self.stride,
            self.batch_size,
            self.seed,
            epoch=lambda: trainer.current_epoch if trainer else 0,
            done=done,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def train_dataloader(self) -> DataLoader:
        """Return batches of shuffled windows."""
        return self._loader(self.train_windows, self.train_batch_sampler())

    def val_dataloader(self) -> DataLoader | list:
        """Return the whole validation split once, in order, windows without overlap; an empty list without a split."""
        if self.val_windows is None:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        indices = range(rank, len(self.val_windows), world_size)
        batches = [np.array(indices[i : i + self.batch_size]) for i in range(0, len(indices), self.batch_size)]
        return self._loader(self.val_windows, batches)

    def _loader(self, windows: Windows, batches: ShuffledBatches | list[np.ndarray]) -> DataLoader:
        return DataLoader(
            windows,
            batch_sampler=batches,  # type: ignore[arg-type]  # arrays of indices, not lists
            collate_fn=identity_collate,  # type: ignore[arg-type]  # __getitems__ returns a batch, not a list
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # iterating would use the global one
        )


def identity_collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batch, which is already collated."""
    return batch


def check_apart(train: Sequence[Path], val: Sequence[Path]) -> None:
    """Raise ValueError if a file is for both training and validation."""
    both = {file.resolve() for file in train} & {file.resolve() for file in val}
    for file in val:
        if file.resolve() in both:
            raise ValueError(f"val_path={file}: training reads this file too; validation needs another, or null")


class TextData(TokenData):
    """Text as shifted windows of its tokens.

    Args:
        path: a file, a folder, a glob, or a list of these: plain text, .jsonl, or either with .gz; see TextFiles.
        tokenizer: makes the tokenizer, given the training text and `end_of_text`.
        cache: folder for prepared corpora and downloads.
        url: where to download the text if `path` is None.
        sha256: checksum of the download.
        val_path: text for validation, as `path`.
        val_fraction: without `val_path`, the share of the characters, at the end of the text, used for validation; 0
            for none.
        field: the key of the text in a line of a .jsonl file.
        encoding: of the files.
        newlines: keep or normalise.
        end_of_text: whether each document ends with a token for that; None: if there are .jsonl files.
        seq_len, batch_size, stride, num_workers, seed: see TokenData.

    Raises:
        OSError, ValueError: the text cannot be downloaded, read, tokenized or written, or is too short.
    """

    def __init__(
        self,
        path: PathOrPaths | None,
        tokenizer: MakeTokenizer,
        cache: NonEmpty,
        seq_len: PositiveInt,
        batch_size: PositiveInt,
        stride: PositiveInt = 1,
        val_path: PathOrPaths | None = None,
        val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        field: NonEmpty = "text",
        encoding: str = "utf-8",
        newlines: Literal["keep", "normalise"] = "keep",
        end_of_text: bool | None = None,
        url: NonEmpty | None = None,
        sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        if path is None:
            if url is None or sha256 is None:
                raise ValueError("path=null: set data.path=..., or data.url and data.sha256 of a text to download")
            path = str(download(url, sha256, Path(cache)))
        text = functools.partial(TextFiles, field=field, encoding=encoding, newlines=newlines)
        train, val = text(path), None if val_path is None else text(val_path, parameter="val_path")
        check_apart(train.files, val.files if val else [])
        ends = train.has_jsonl if end_of_text is None else end_of_text

        def check_split(split: str, facts: dict[str, int]) -> None:
            if split == "val":
                with errors_name("val_fraction", val_fraction) if val is None else errors_name("val_path", val_path):
                    check_validation(facts["tokens"], "the validation text")
            else:
                rest = f" (data.val_fraction={val_fraction} takes the rest)" if val is None and val_fraction else ""
                what = f"the training text, {facts['characters']:,} characters of {train.name}{rest},"
                check_training(facts["tokens"], seq_len, what)
                ShuffledBatches(facts["tokens"] - seq_len, stride, batch_size, seed, epoch=lambda: 0)

        self.corpus = prepare(train, val, val_fraction, tokenizer, ends, Path(cache), check_split)
        tokens = [self.corpus.train], [] if self.corpus.val is None else [self.corpus.val]
        sizes = (seq_len, batch_size, stride, num_workers, seed)
        super().__init__(train.name, self.corpus.tokenizer, *tokens, *sizes)


class BinData(TokenData):
    """Token files for nanoGPT (uint16 only) or llm.c (a header, then uint16 or uint32).

    Args:
        train_path: a file, a folder's glob, or a list of these; windows do not cross from one file to the next.
        val_path: the same, for validation; None for none.
        tokenizer: makes the tokenizer; there is no text to learn from.
        cache: folder for facts about large files.
        seq_len, batch_size, stride, num_workers, seed: see TokenData.

    Raises:
        OSError, ValueError: a file cannot be read, has another format, has ids beyond the tokenizer's, or is too short.
    """

    def __init__(
        self,
        train_path: PathOrPaths,
        val_path: PathOrPaths | None,
        tokenizer: MakeTokenizer,
        cache: NonEmpty,
        seq_len: PositiveInt,
        batch_size: PositiveInt,
        stride: PositiveInt = 1,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        train = token_files(train_path, "train_path")
        val = [] if val_path is None else token_files(val_path, "val_path")
        check_apart([file.path for file in train], [file.path for file in val])
        name = ", ".join(file.path.name for file in train[:2]) + (", ..." if len(train) > 2 else "")
        largest = {f: cached_fact("largest_id", f.path, Path(cache), f.largest_id) for f in (*train, *val)}
        made = tokenizer(NoText(max(largest[file] for file in train)), False)
        for file in (*train, *val):
            if largest[file] >= made.vocab_size:
                raise ValueError(
                    f"{file.path} has the id {largest[file]:,}; the tokenizer's go from 0 to {made.vocab_size - 1:,}"
                )
        for file in val:
            with errors_name("val_path", val_path):
                check_validation(len(file), str(file.path))
        check_training(max(map(len, train)), seq_len)
        super().__init__(name, made, train, val, seq_len, batch_size, stride, num_workers, seed)
        self.train_batch_sampler()  # raises if there are too few windows


class NoText:
    """In place of the training text, which token files do not have: only the largest id is known."""

    num_characters = 0

    def __init__(self, largest_id: int) -> None:
        self.largest_id = largest_id

    def __iter__(self) -> Any:
        raise ValueError(
            "token files have no text to learn a tokenizer from: use tokenizer=file, with its path, or tokenizer=ids"
        )

    def with_validation(self) -> Any:
        """Raise the same error."""
        return iter(self)
