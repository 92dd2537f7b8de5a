"""Text to token ids and back: characters, bytes, byte pairs, or any tokenizer.json.

A tokenizer is made by a function of (texts, end_of_text): the training texts, which it may learn from, and whether it
shall have a token that ends a document.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import numpy as np
from pydantic import Field, PositiveInt

END_OF_TEXT = "<|endoftext|>"


class Texts(Protocol):
    """Text in pieces, which can be gone through again and again."""

    num_characters: int

    def __iter__(self) -> Any:
        """Start again at the first piece."""


class UnknownCharacterError(ValueError):
    """A character that a tokenizer has no token for, and its position in the text."""

    def __init__(self, character: str, position: int, known: int) -> None:
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}) at position {position:,} "
            f"is not among the tokenizer's {known:,} characters"
        )
        self.character, self.position, self.known = character, position, known

    def further(self, characters: int) -> Self:
        """Return the error for a text that starts so many characters earlier."""
        return type(self)(self.character, self.position + characters, self.known)


class Tokenizer(ABC):
    """Text to token ids and back; what is encoded comes back the same, or is refused with a ValueError.

    Attributes:
        vocab_size: number of tokens V.
        end_of_text: id of the token that ends a document; None where there is none. No text encodes to it.
        token_bytes: (V,) int64, UTF-8 bytes that each token stands for; None where tokens stand for no text.
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
        """Return all there is to know of the tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of several texts, which stand one after the other."""
        batch, before = [], 0
        for text in texts:
            try:
                batch.append(self.encode(text))
            except UnknownCharacterError as error:
                raise error.further(before) from None
            before += len(text)
        return batch

    def save(self, path: Path) -> None:
        """Write the tokenizer to a JSON file, which `load` reads."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A short name that two tokenizers share only if they are the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return the ids as a list; ValueError for one that is not a token."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside 0 to {self.vocab_size - 1}")
        return ids


class CharTokenizer(Tokenizer):
    """One token per character (Unicode code point) of an alphabet, in sorted order, as the chapter does it."""

    def __init__(self, alphabet: Iterable[str], end_of_text: bool = False) -> None:
        self.characters = sorted(set(alphabet))
        self.vocab_size = len(self.characters) + end_of_text
        self.end_of_text = len(self.characters) if end_of_text else None
        points = np.array([ord(character) for character in self.characters], np.int64)
        self.token_bytes = np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], np.int64)
        if end_of_text:
            self.token_bytes = np.append(self.token_bytes, 0)
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, np.int32)  # by code point; the last: any beyond
        self._ids[points] = np.arange(len(points))

    @classmethod
    def of(cls, texts: Texts, end_of_text: bool) -> Self:
        """Make a tokenizer of the characters that the texts have."""
        seen = np.zeros(0x110000, bool)
        for text in texts:
            seen[code_points(text)] = True
        return cls(map(chr, np.flatnonzero(seen)), end_of_text)

    def encode(self, text: str) -> np.ndarray:
        """Return one id per character; ValueError names a character outside the alphabet and where it stands."""
        ids = self._ids[np.minimum(code_points(text), len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            position = int((ids < 0).argmax())
            raise UnknownCharacterError(text[position], position, len(self.characters))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; ValueError for an id that is not a token."""
        return "".join(END_OF_TEXT if i == self.end_of_text else self.characters[i] for i in self.checked(ids))

    def to_json(self) -> str:
        """Return all there is to know of the tokenizer."""
        content = {"type": "char", "characters": self.characters, "end_of_text": self.end_of_text is not None}
        return json.dumps(content, ensure_ascii=any("\ud800" <= c <= "\udfff" for c in self.characters))


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of a text, (T,) uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: takes every text, learns nothing."""

    def __init__(self, end_of_text: bool = False) -> None:
        self.vocab_size = 256 + end_of_text
        self.end_of_text = 256 if end_of_text else None
        self.token_bytes = np.array([1] * 256 + [0] * end_of_text, np.int64)

    @classmethod
    def of(cls, texts: Texts, end_of_text: bool) -> Self:
        """Make the tokenizer, whatever the texts."""
        return cls(end_of_text)

    def encode(self, text: str) -> np.ndarray:
        """Return one id per byte."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become U+FFFD. ValueError for an id that is no token."""
        marker = END_OF_TEXT.encode()
        return b"".join(marker if i == 256 else bytes([i]) for i in self.checked(ids)).decode("utf-8", "replace")

    def to_json(self) -> str:
        """Return all there is to know of the tokenizer."""
        return json.dumps({"type": "byte", "end_of_text": self.end_of_text is not None})


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library whose tokens stand for bytes: GPT-2's, Llama's, one trained here, ...

    Args:
        content: the JSON that the library saves (tokenizer.json).

    Raises:
        ValueError: it is not such a tokenizer, or one that does not keep all of a text (lower case, WordPiece, ...).
    """

    ends = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # GPT-2's and most others', Llama 3's, Llama 2's, Gemma's

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer as Library  # here, for the runs that do without

        try:
            self._tokenizer = Library.from_str(without_dummy_prefix(content))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"the tokenizers library cannot read it: {error}") from None
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" within a text is text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        tree = json.loads(self._tokenizer.to_str())
        decoder = tree["decoder"] or {}
        kinds = {part.get("type") for part in (decoder, *decoder.get("decoders", []))}
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise ValueError("its tokens do not stand for bytes, so that it would lose text")
        self._lossless = "ByteLevel" in kinds and tree["normalizer"] is None  # else each text is checked
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.token_bytes = self._count_bytes("ByteLevel" in kinds)
        known = (self._tokenizer.token_to_id(name) for name in self.ends)
        self.end_of_text = next((i for i in known if i is not None), None)
        probe = " A  b\n\n'c' d\t12345 学而时习之 \r\n ."
        if self.decode(np.concatenate([self.encode(probe), self.encode(probe)])) != 2 * probe:
            raise ValueError("it changes the text between two texts that stand one after the other")

    @classmethod
    def train(
        cls,
        texts: Texts,
        end_of_text: bool,
        vocab_size: Annotated[int, Field(ge=257)] = 1024,
        max_characters: PositiveInt = 20_000_000,
    ) -> Self:
        """Learn a byte-level BPE from the texts.

        Args:
            texts: what to learn from.
            end_of_text: whether there shall be a token that ends a document.
            vocab_size: number of tokens: the 256 bytes, the pairs, and the token that ends a document.
            max_characters: how much of the texts to learn from, evenly spread: memory and time grow with it.
        """
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = Library(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            special_tokens=[END_OF_TEXT] if end_of_text else [],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        share = min(1.0, max_characters / max(1, texts.num_characters))

        def sample() -> Iterable[str]:
            passed = taken = 0
            for text in texts:
                passed += len(text)
                part = text[: max(0, int(passed * share) - taken)]
                taken += len(part)
                # In small pieces: the library holds hundreds of them at a time.
                yield from (part[i : i + 16_384] for i in range(0, len(part), 16_384))

        tokenizer.train_from_iterator(sample(), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text; ValueError if they would not give it back."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of several texts, encoded in parallel; ValueError if they would not give one back."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(encoding.ids, np.int64) for encoding in encodings]
        if not self._lossless:
            for text, ids in zip(texts, batch, strict=True):
                back = self.decode(ids)
                if back != text:
                    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
                    raise ValueError(
                        f"the tokenizer does not give back the text it is given: {text[at : at + 20]!r} "
                        f"becomes {back[at : at + 20]!r}"
                    )
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; bytes that are no UTF-8 become U+FFFD. ValueError for an id that is no token."""
        return self._tokenizer.decode(self.checked(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Return what the tokenizers library reads and writes."""
        return self._tokenizer.to_str()

    def _count_bytes(self, byte_level: bool) -> np.ndarray:
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif byte_level:
                sizes[i] = len(token)  # in which a character stands for a byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace("▁", " ").encode())
        return sizes


def without_dummy_prefix(content: str) -> str:
    """Return a tokenizer.json without the space that Llama 2's puts before each text: a stream has no beginning."""
    tree = json.loads(content)
    normalizer = tree.get("normalizer") or {}
    parts = normalizer.get("normalizers", [])
    if any(part["type"] == "Prepend" for part in parts):
        normalizer["normalizers"] = [part for part in parts if part["type"] != "Prepend"]
        decoder = tree["decoder"]
        decoder["decoders"] = [part for part in decoder["decoders"] if part["type"] != "Strip"]
    for key in ("pre_tokenizer", "decoder"):
        node = tree.get(key) or {}
        for part in (node, *node.get("pretokenizers", []), *node.get("decoders", [])):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
    return json.dumps(tree, ensure_ascii=False)


class IdTokenizer(Tokenizer):
    """For token files whose tokenizer is not at hand: an id reads as its number."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.end_of_text = None
        self.token_bytes = None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids that a text of numbers lists."""
        try:
            return np.array(self.checked(map(int, text.split())), np.int64)
        except ValueError as error:
            raise ValueError(f"a text of token ids (0 to {self.vocab_size - 1}) is needed: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the numbers, a space before each."""
        return "".join(f" {i}" for i in self.checked(ids))

    def to_json(self) -> str:
        """Return all there is to know of the tokenizer."""
        return json.dumps({"type": "ids", "vocab_size": self.vocab_size})


def ids(texts: Any, end_of_text: bool, vocab_size: PositiveInt | None = None) -> IdTokenizer:
    """Return the tokenizer of token files: as many tokens as said, or as the largest id needs."""
    if not hasattr(texts, "largest_id"):
        raise ValueError("tokenizer=ids is for data=bin; text needs another")
    return IdTokenizer(texts.largest_id + 1 if vocab_size is None else vocab_size)


def from_file(texts: Texts, end_of_text: bool, path: str) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json, a run's or one of the tokenizers library's."""
    tokenizer = load(Path(path))
    if end_of_text and tokenizer.end_of_text is None:
        raise ValueError(f"{path}: the tokenizer has no token that ends a document; set data.end_of_text=false")
    return tokenizer


def load(path: Path) -> Tokenizer:
    """Return the tokenizer that `save`, or the tokenizers library, wrote; ValueError for any other file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        kind = content.get("type", "bpe" if "model" in content else None)
        if kind == "char":
            return CharTokenizer(content["characters"], content.get("end_of_text", False))
        if kind == "byte":
            return ByteTokenizer(content["end_of_text"])
        if kind == "ids":
            return IdTokenizer(content["vocab_size"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        kind = None
    if kind != "bpe":
        raise ValueError(f"{path} is not a tokenizer: a tokenizer.json of a run or of the tokenizers library is needed")
    try:
        return BPETokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
