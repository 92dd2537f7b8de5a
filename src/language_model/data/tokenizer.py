"""Text to token ids and back: the interface of the tokenizers, and characters, bytes and plain ids.

A tokenizer is made by a function of (texts, end_of_text): the training text, from which it may learn, and whether it
needs a token that ends a document.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from pydantic import PositiveInt

from language_model.files import write_text

END_OF_TEXT = "<|endoftext|>"


class Texts(Protocol):
    """The training text in pieces, which can be iterated several times."""

    num_characters: int

    def __iter__(self) -> Any:
        """Start at the first piece."""

    def with_validation(self) -> Iterable[str]:
        """Return the pieces of the training text and then of the validation text."""


class UnknownCharacterError(ValueError):
    """A character that a tokenizer has no token for, and its position in the text."""

    def __init__(self, character: str, position: int, known: int) -> None:
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}) at position {position:,} "
            f"is not among the tokenizer's {known:,} characters"
        )
        self.character, self.position, self.known = character, position, known

    def shifted_by(self, characters: int) -> Self:
        """Return the error for a text that starts this number of characters earlier."""
        return type(self)(self.character, self.position + characters, self.known)


class Tokenizer(ABC):
    """Text to token ids and back. Decoding gives the encoded text unchanged; ValueError for text where it would not.

    Attributes:
        vocab_size: number of tokens V.
        end_of_text: id of the token that ends a document; None without one. No text is encoded to it.
        token_bytes: (V,) int64, the number of UTF-8 bytes of each token; None if tokens have no text.
    """

    vocab_size: int
    end_of_text: int | None
    token_bytes: np.ndarray | None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, (T,); ValueError if it cannot be encoded without loss."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; ValueError for an id that is not a token."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the tokenizer as JSON."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each of several consecutive texts."""
        batch, before = [], 0
        for text in texts:
            try:
                batch.append(self.encode(text))
            except UnknownCharacterError as error:
                raise error.shifted_by(before) from None
            before += len(text)
        return batch

    def save(self, path: Path) -> None:
        """Write the tokenizer to a JSON file, which `load_tokenizer` reads."""
        write_text(path, self.to_json() + "\n")

    @property
    def fingerprint(self) -> str:
        """A short hash: equal only for equal tokenizers."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """Return the ids as a list; ValueError for one that is not a token."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside 0 to {self.vocab_size - 1}")
        return ids


class CharTokenizer(Tokenizer):
    """One token per character (Unicode code point) of an alphabet, in sorted order, as in the chapter."""

    def __init__(self, alphabet: Iterable[str], end_of_text: bool = False) -> None:
        self.characters = sorted(set(alphabet))
        self.vocab_size = len(self.characters) + end_of_text
        self.end_of_text = len(self.characters) if end_of_text else None
        points = np.array([ord(character) for character in self.characters], np.int64)
        self.token_bytes = np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], np.int64)
        if end_of_text:
            self.token_bytes = np.append(self.token_bytes, 0)
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, np.int32)  # by code point
        self._ids[points] = np.arange(len(points))

    @classmethod
    def from_texts(cls, texts: Texts, end_of_text: bool) -> Self:
        """Return the tokenizer of the characters in the training text and the validation text, as nanoGPT's."""
        seen = np.zeros(0x110000, bool)
        for text in texts.with_validation():
            seen[code_points(text)] = True
        return cls(map(chr, np.flatnonzero(seen)), end_of_text)

    def encode(self, text: str) -> np.ndarray:
        """Return one id per character; ValueError names a character outside the alphabet and its position."""
        ids = self._ids[np.minimum(code_points(text), len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            position = int((ids < 0).argmax())
            raise UnknownCharacterError(text[position], position, len(self.characters))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; ValueError for an id that is not a token."""
        return "".join(END_OF_TEXT if i == self.end_of_text else self.characters[i] for i in self.check_ids(ids))

    def to_json(self) -> str:
        """Return the tokenizer as JSON."""
        content = {"type": "char", "characters": self.characters, "end_of_text": self.end_of_text is not None}
        return json.dumps(content, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in self.characters))


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of a text, (T,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: encodes every text, learns nothing."""

    def __init__(self, end_of_text: bool = False) -> None:
        self.vocab_size = 256 + end_of_text
        self.end_of_text = 256 if end_of_text else None
        self.token_bytes = np.array([1] * 256 + [0] * end_of_text, np.int64)

    @classmethod
    def from_texts(cls, texts: Texts, end_of_text: bool) -> Self:
        """Return the tokenizer; the text does not matter."""
        return cls(end_of_text)

    def encode(self, text: str) -> np.ndarray:
        """Return one id per byte."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, with U+FFFD for invalid UTF-8; ValueError for an id that is not a token."""
        marker = END_OF_TEXT.encode()
        return b"".join(marker if i == 256 else bytes([i]) for i in self.check_ids(ids)).decode("utf-8", "replace")

    def to_json(self) -> str:
        """Return the tokenizer as JSON."""
        return json.dumps({"type": "byte", "end_of_text": self.end_of_text is not None})


class IdTokenizer(Tokenizer):
    """For token files without their tokenizer: the text of an id is its number."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.end_of_text = None
        self.token_bytes = None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids listed in a text of numbers."""
        try:
            return np.array(self.check_ids(map(int, text.split())), np.int64)
        except ValueError as error:
            raise ValueError(f"the text must be token ids (0 to {self.vocab_size - 1}): {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the numbers, each after a space."""
        return "".join(f" {i}" for i in self.check_ids(ids))

    def to_json(self) -> str:
        """Return the tokenizer as JSON."""
        return json.dumps({"type": "ids", "vocab_size": self.vocab_size})


def id_tokenizer(texts: Any, end_of_text: bool, vocab_size: PositiveInt | None = None) -> IdTokenizer:
    """Return the tokenizer of token files, with `vocab_size` tokens; None for the largest id plus one."""
    if not hasattr(texts, "largest_id"):
        raise ValueError("token ids are for data=bin; text needs another tokenizer")
    return IdTokenizer(texts.largest_id + 1 if vocab_size is None else vocab_size)
