"""Byte-pair tokenizers, by the tokenizers library: one trained here, GPT-2's, Llama's, ..."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import Field, PositiveInt

from language_model.data.tokenizer import END_OF_TEXT, Texts, Tokenizer


class BPETokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library whose tokens represent bytes: GPT-2's, Llama's, one trained here, ...

    Args:
        content: the library's JSON (tokenizer.json).

    Raises:
        ValueError: it is not such a tokenizer, or it loses parts of a text (lower case, WordPiece, ...).
    """

    ends = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # GPT-2's and most others', Llama 3's, Llama 2's, Gemma's

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer as Library  # here: many runs do without

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
            raise ValueError("its tokens do not represent bytes: it would lose text")
        self._lossless = "ByteLevel" in kinds and tree["normalizer"] is None  # else each text is checked
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.token_bytes = self._count_bytes("ByteLevel" in kinds)
        known = (self._tokenizer.token_to_id(name) for name in self.ends)
        self.end_of_text = next((i for i in known if i is not None), None)
        probe = " A  b\n\n'c' d\t12345 学而时习之 \r\n ."
        if self.decode(np.concatenate([self.encode(probe), self.encode(probe)])) != 2 * probe:
            raise ValueError("it changes the text where two texts meet")

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
            texts: the training texts.
            end_of_text: whether to add a token that ends a document.
            vocab_size: number of tokens, the 256 bytes and the end-of-text token included.
            max_characters: learn from this many characters, spread evenly; memory and time grow with it.
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
                # Small pieces: the library keeps hundreds of them in memory.
                yield from (part[i : i + 16_384] for i in range(0, len(part), 16_384))

        tokenizer.train_from_iterator(sample(), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text; ValueError if decoding them would change it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of several texts, encoded in parallel; ValueError if decoding them would change one."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(encoding.ids, np.int64) for encoding in encodings]
        if not self._lossless:
            for text, ids in zip(texts, batch, strict=True):
                back = self.decode(ids)
                if back != text:
                    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
                    raise ValueError(
                        f"the tokenizer does not decode to the text that it encoded: {text[at : at + 20]!r} "
                        f"becomes {back[at : at + 20]!r}"
                    )
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, with U+FFFD for invalid UTF-8; ValueError for an id that is not a token."""
        return self._tokenizer.decode(self.check_ids(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the tokenizer as the library's JSON."""
        return self._tokenizer.to_str()

    def _count_bytes(self, byte_level: bool) -> np.ndarray:
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(token.encode())
            elif byte_level:
                sizes[i] = len(token)  # a character for each byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                sizes[i] = 1
            else:
                sizes[i] = len(token.replace("▁", " ").encode())
        return sizes


def without_dummy_prefix(content: str) -> str:
    """Return a tokenizer.json without the space that Llama 2's adds before each text: a text may be a middle part."""
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
