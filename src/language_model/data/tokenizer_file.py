"""Tokenizers from files: a run's tokenizer.json, or one of the tokenizers library."""

import json
import operator
from pathlib import Path

from language_model.data.bpe import BPETokenizer
from language_model.data.text_files import NonEmpty, check_readable, errors_name
from language_model.data.tokenizer import ByteTokenizer, CharTokenizer, IdTokenizer, Texts, Tokenizer


def tokenizer_from_file(texts: Texts, end_of_text: bool, path: NonEmpty) -> Tokenizer:
    """Return the tokenizer in a file, as `load_tokenizer`; ValueError if it lacks the end-of-text token it needs."""
    with errors_name("tokenizer.path", path):
        tokenizer = load_tokenizer(Path(path))
        if end_of_text and tokenizer.end_of_text is None:
            raise ValueError("the tokenizer has no token that ends a document; set data.end_of_text=false")
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a file by `Tokenizer.save` or the tokenizers library; ValueError for any other."""
    check_readable(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        kind = content.get("type", "bpe" if "model" in content else None)
        if kind == "char":
            return CharTokenizer(content["characters"], content.get("end_of_text", False))
        if kind == "byte":
            return ByteTokenizer(content["end_of_text"])
        if kind == "ids":
            return IdTokenizer(operator.index(content["vocab_size"]))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        kind = None
    if kind != "bpe":
        raise ValueError(f"{path} is not a tokenizer: give a tokenizer.json of a run or of the tokenizers library")
    try:
        return BPETokenizer(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
