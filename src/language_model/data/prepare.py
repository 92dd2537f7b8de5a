"""Text to token files: tokenized once, in pieces, and cached."""

import functools
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from language_model.data.text_files import TextFiles, check_readable, errors_name
from language_model.data.token_files import TokenFile
from language_model.data.tokenizer import Texts, Tokenizer, UnknownCharacterError
from language_model.data.tokenizer_file import load_tokenizer
from language_model.files import cached_fact, file_stamp, sha256_of
from language_model.terminal import progress

FORMAT = 1  # of a prepared corpus; part of its key
PIECE = 1 << 16  # characters that are encoded as one text
BATCH = 1 << 20  # characters that are encoded together

# The original names of tokenizers, which are part of a prepared corpus's key: earlier corpora stay valid.
ORIGINAL_NAMES = {
    "language_model.data.tokenizer.CharTokenizer.from_texts": "language_model.tokenizer.CharTokenizer.of",
    "language_model.data.tokenizer.ByteTokenizer.from_texts": "language_model.tokenizer.ByteTokenizer.of",
    "language_model.data.bpe.BPETokenizer.train": "language_model.tokenizer.BPETokenizer.train",
    "language_model.data.tokenizer_file.tokenizer_from_file": "language_model.tokenizer.from_file",
}

MakeTokenizer = Callable[[Texts, bool], Tokenizer]
CheckSplit = Callable[[str, dict[str, int]], None]


class Corpus(NamedTuple):
    """A prepared corpus: tokenizer, splits, and the number of characters, bytes, documents and tokens of each."""

    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile | None
    facts: dict[str, dict[str, int]]
    folder: Path


def prepare(
    train: TextFiles,
    val: TextFiles | None,
    val_fraction: float,
    make_tokenizer: MakeTokenizer,
    end_of_text: bool,
    cache: Path,
    check_split: CheckSplit,
) -> Corpus:
    """Tokenize a corpus into a folder in `cache`, or find it there.

    The folder's name ends with a hash of everything that determines its content. It is moved into place when it is
    complete. One of several processes prepares it while the others wait.

    Args:
        train: the text; without `val`, a share `val_fraction` of its characters at the end is for validation.
        val: the text for validation.
        val_fraction: 0 for no validation.
        make_tokenizer: called with the training text, which also gives the validation text, and `end_of_text`.
        end_of_text: whether each document ends with the tokenizer's token for that.
        cache: folder for prepared corpora.
        check_split: called with each split's name (train, val) and facts, as in Corpus; ValueError for too few tokens.

    Raises:
        OSError, ValueError: as TextFiles, the tokenizer and `check_split`, or for lack of space; nothing is left then.
    """
    files = train.files + (val.files if val else [])
    stamps = [file_stamp(file) for file in files]
    settings = corpus_settings(train, val, val_fraction, make_tokenizer, end_of_text, cache)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", train.name)[:40]
    folder = next(cache.glob(f"*-{key}"), cache / f"{name}-{key}")  # whatever the text was called
    with new_folder(folder) as partial:
        if partial is not None:
            facts, tokenizer = tokenize(train, val, val_fraction, make_tokenizer, end_of_text, check_split, partial)
            if [file_stamp(file) for file in files] != stamps:
                raise ValueError(f"{train.name} changed while it was read; start again")
            tokenizer.save(partial / "tokenizer.json")
            content = {"settings": settings, "dtype": smallest_dtype(tokenizer.vocab_size), "splits": facts}
            (partial / "corpus.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    corpus = load_corpus(folder)
    for split, facts_of_split in corpus.facts.items():
        check_split(split, facts_of_split)
    return corpus


def corpus_settings(
    train: TextFiles,
    val: TextFiles | None,
    val_fraction: float,
    make_tokenizer: MakeTokenizer,
    end_of_text: bool,
    cache: Path,
) -> dict[str, Any]:
    """Return everything that determines the content of a prepared corpus; see `prepare`."""

    def checksums(text: TextFiles) -> list[str]:
        return [cached_fact("sha256", file, cache, functools.partial(sha256_of, file)) for file in text.files]

    return {
        "format": FORMAT,
        "train": checksums(train),
        "val": checksums(val) if val else val_fraction,
        "encoding": train.encoding,
        "newlines": train.newlines,
        "field": train.field,
        "end_of_text": end_of_text,
        "tokenizer": describe_maker(make_tokenizer),
    }


def load_corpus(folder: Path) -> Corpus:
    """Return the prepared corpus in a folder."""
    content = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    files = {split: TokenFile(folder / f"{split}.bin", content["dtype"]) for split in content["splits"]}
    return Corpus(
        load_tokenizer(folder / "tokenizer.json"), files["train"], files.get("val"), content["splits"], folder
    )


def tokenize(
    train: TextFiles,
    val: TextFiles | None,
    val_fraction: float,
    make_tokenizer: MakeTokenizer,
    end_of_text: bool,
    check_split: CheckSplit,
    folder: Path,
) -> tuple[dict[str, dict[str, int]], Tokenizer]:
    """Write the splits' token files; return the facts about each split, and the tokenizer."""
    everything = TextRange(train, "reading")
    num_characters = sum(map(len, everything))
    if not num_characters:
        with errors_name(train.parameter, train.path):
            raise ValueError("there is no text in it")
    cut = num_characters if val else int(num_characters * (1 - val_fraction))
    tokenizer = make_tokenizer(TrainingText(train, val, cut), end_of_text)
    ranges = {"train": TextRange(train, "tokenizing", 0, cut)}
    if val or val_fraction:
        ranges["val"] = TextRange(val, "tokenizing") if val else TextRange(train, "tokenizing", cut, num_characters)
    facts = {}
    for split, text_range in ranges.items():
        ending = tokenizer.end_of_text if end_of_text else None
        try:
            facts[split] = encode(text_range, tokenizer, ending, folder / f"{split}.bin")
        except UnknownCharacterError as error:
            part = "the validation text's " if split == "val" else ""
            with errors_name(text_range.files.parameter, text_range.files.path):
                raise ValueError(f"{part}{error}; tokenizer=byte and tokenizer=bpe accept any text") from None
        check_split(split, facts[split])
    return facts, tokenizer


def encode(text_range: "TextRange", tokenizer: Tokenizer, ending: int | None, path: Path) -> dict[str, int]:
    """Write the ids of a text, with `ending` after each document, to a new file; return the facts about it."""
    dtype = np.dtype(smallest_dtype(tokenizer.vocab_size)).newbyteorder("<")
    facts = {"documents": 0, "characters": 0, "bytes": 0, "tokens": 0}
    in_document = False
    with path.open("wb") as file:
        for batch in batches(cut_at_spaces(text_range.pieces())):
            texts = [text for text, _ in batch]
            try:
                encoded = tokenizer.encode_batch(texts)
            except UnknownCharacterError as error:
                raise error.shifted_by(facts["characters"]) from None
            for (text, ends), ids in zip(batch, encoded, strict=True):
                ending_here = [ending] if ends and ending is not None else []
                file.write(np.append(ids, ending_here).astype(dtype).data)
                facts["documents"] += not in_document
                in_document = not ends
                facts["characters"] += len(text)
                facts["bytes"] += len(text.encode("utf-8"))
                facts["tokens"] += len(ids) + len(ending_here)
        file.flush()
        os.fsync(file.fileno())
    return facts


class TextRange:
    """The characters from `start` to `end` of a text, in pieces; each iteration shows a progress bar."""

    def __init__(self, files: TextFiles, what: str, start: int = 0, end: int | None = None) -> None:
        self.files = files
        self.what = what
        self.start = start
        self.end = end
        self.num_characters = (end or 0) - start

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in self.pieces())

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yield (text, ends) as TextFiles does."""
        position = 0
        end = float("inf") if self.end is None else self.end
        with progress(f"{self.what} {self.files.name}", self.files.num_bytes) as advance:
            for text, ends in self.files.pieces(advance):
                first = max(0, self.start - position)
                last = max(0, min(len(text), end - position))
                position += len(text)
                yield text[first : int(last)], ends and self.start < position <= end
                if position > end:
                    return


class TrainingText(TextRange):
    """The characters of a text up to `end`, and those that validation adds: the rest, or a text of its own."""

    def __init__(self, files: TextFiles, val: TextFiles | None, end: int) -> None:
        super().__init__(files, "learning the tokenizer of", 0, end)
        self.val = val

    def with_validation(self) -> Iterator[str]:
        """Yield the pieces of the training text and then of the validation text."""
        for files in (self.files, self.val):
            if files:
                yield from TextRange(files, self.what)


def cut_at_spaces(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield the same text in pieces of at most PIECE characters, cut before a space after a word.

    No tokenizer's word is cut there, so byte pairs are the same as for a document encoded as one text.
    """
    rest = ""
    for text, ends in pieces:
        rest += text
        start = 0
        while len(rest) - start > PIECE:
            end = last_cut(rest, start + 1, start + PIECE)
            yield rest[start:end], False
            start = end
        rest = rest[start:]
        if ends:
            yield rest, True
            rest = ""
    if rest:
        yield rest, False


def last_cut(text: str, start: int, end: int) -> int:
    """Return the last position in start to end before a space (else a newline) after a word; else the end."""
    for white in " ", "\n":
        i = end
        while (i := text.rfind(white, start, i)) > 0:
            if not text[i - 1].isspace():
                return i
    return end


def batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces into batches of about BATCH characters."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def smallest_dtype(vocab_size: int) -> str:
    """Return the smallest dtype for the ids."""
    return "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes `folder` if no error occurs; None if `folder` already exists.

    One process at a time gets it. An error leaves nothing; after a kill, the next process removes the temporary
    folder, whose name ends in .partial.
    """
    if folder.is_dir():
        yield None
        return
    cache = folder.parent
    with errors_name("cache", cache):
        cache.mkdir(parents=True, exist_ok=True)
    lock = cache / f"{folder.name}.lock"
    with FileLock(lock):
        try:
            if folder.is_dir():
                yield None
                return
            for left in cache.glob(f"{glob.escape(folder.name)}.*.partial"):
                shutil.rmtree(left)
            partial = cache / f"{folder.name}.{secrets.token_hex(4)}.partial"
            partial.mkdir()
            try:
                yield partial
                partial.replace(folder)
            except OSError as error:
                raise OSError(error.errno, error.strerror or str(error), error.filename or str(partial)) from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            lock.unlink(missing_ok=True)


def describe_maker(make_tokenizer: MakeTokenizer) -> list:
    """Return what determines a tokenizer besides the text: its function and settings, a file by its content."""
    function = getattr(make_tokenizer, "func", make_tokenizer)
    settings = dict(getattr(make_tokenizer, "keywords", {}))
    if path := settings.get("path"):
        with errors_name("tokenizer.path", path):
            check_readable(Path(path))
        settings["path"] = sha256_of(Path(path))
    name = f"{function.__module__}.{function.__qualname__}"
    return [ORIGINAL_NAMES.get(name, name), settings]
