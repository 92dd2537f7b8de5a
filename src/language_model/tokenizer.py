"""Text to token ids and back."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self


class CharTokenizer:
    """One token per character of an alphabet, in sorted order, as the chapter does it.

    Lossless for every text made of the alphabet's characters (Unicode code points).
    """

    def __init__(self, alphabet: Iterable[str]) -> None:
        self.characters = sorted(set(alphabet))
        self._ids = {character: i for i, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """Return one id per character; ValueError names a character outside the alphabet and where it stands."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            position = next(i for i, character in enumerate(text) if character not in self._ids)
            raise ValueError(
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} "
                f"is not among the tokenizer's {self.vocab_size} characters"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; ValueError for an id that is not a token."""
        try:
            return "".join(self.characters[self._checked(i)] for i in ids)
        except IndexError as error:
            raise ValueError(str(error)) from None

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"token id {token} is outside 0 to {self.vocab_size - 1}")
        return token

    def save(self, path: Path) -> None:
        """Write the tokenizer to a JSON file."""
        content = {"type": "char", "characters": self.characters}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; ValueError for any other file."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["type"] == "char":
                return cls(content["characters"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            pass
        raise ValueError(f"{path} is not a character tokenizer")
