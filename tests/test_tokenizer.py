import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from language_model.data.bpe import BPETokenizer
from language_model.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    UnknownCharacterError,
    id_tokenizer,
)
from language_model.data.tokenizer_file import load_tokenizer, tokenizer_from_file

any_text = st.text(st.characters(exclude_categories=["Cs"]))


class Texts(list):
    """Text in pieces, as a tokenizer learns from it; without validation."""

    @property
    def num_characters(self) -> int:
        return sum(map(len, self))

    def with_validation(self) -> list[str]:
        return self


POEM = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: " * 20
MANY = "学而时习之，不亦说乎？ Всё смешалось. naïve café 👩‍🚀\r\n\t"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(Texts([POEM, MANY]), True, vocab_size=300)


def test_characters_are_numbered_in_sorted_order() -> None:
    tokenizer = CharTokenizer("banana split")
    assert tokenizer.characters == [" ", "a", "b", "i", "l", "n", "p", "s", "t"]
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("ban").tolist() == [2, 1, 5]
    assert CharTokenizer.from_texts(Texts(["ban", "ana spl", "it"]), False).characters == tokenizer.characters


@given(text=st.text(st.characters(exclude_categories=[])), more=st.text())
def test_any_text_of_its_characters_comes_back(text: str, more: str) -> None:
    tokenizer = CharTokenizer(text + more)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=any_text)
@settings(deadline=None)
def test_bytes_and_byte_pairs_give_back_any_text(bpe: BPETokenizer, text: str) -> None:
    for tokenizer in (ByteTokenizer(), ByteTokenizer(end_of_text=True), bpe):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded) == text
        assert tokenizer.token_bytes is not None
        assert tokenizer.token_bytes[encoded].sum() == len(text.encode())


def test_bytes_of_characters_are_those_of_utf8() -> None:
    tokenizer = CharTokenizer(MANY, end_of_text=True)
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes[tokenizer.encode("a学В👩")].tolist() == [1, 3, 2, 4]
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer(POEM + END_OF_TEXT, True), ByteTokenizer(True), BPETokenizer.train(Texts([POEM]), True, 270)],
    ids=["char", "byte", "bpe"],
)
def test_no_text_makes_the_token_that_ends_one(tokenizer: Tokenizer) -> None:
    text = f"more{END_OF_TEXT}lovely"
    encoded = tokenizer.encode(text)
    assert tokenizer.end_of_text is not None
    assert tokenizer.end_of_text not in encoded
    assert tokenizer.decode(encoded) == text
    assert tokenizer.decode([*encoded, tokenizer.end_of_text]) == text + END_OF_TEXT


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("abc"), CharTokenizer("aé学\n", True), CharTokenizer("a\ud800"), ByteTokenizer(),
        ByteTokenizer(True), IdTokenizer(17), BPETokenizer.train(Texts([POEM]), False, 270),
    ],
)  # fmt: skip
def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end_of_text == tokenizer.end_of_text


def test_other_tokenizers_have_other_fingerprints(bpe: BPETokenizer) -> None:
    tokenizers = [CharTokenizer("ab"), CharTokenizer("ac"), CharTokenizer("ab", True), ByteTokenizer(), bpe]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == 5


def test_an_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 3 is not among the tokenizer's 3 characters"):
        CharTokenizer("caf").encode("café")
    with pytest.raises(UnknownCharacterError) as caught:
        CharTokenizer("caf").encode_batch(["fac", "caf", "café"])
    assert caught.value.position == 9


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abc"), ByteTokenizer(), IdTokenizer(3)])
def test_an_id_that_is_no_token_is_named(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token} is outside 0 to {tokenizer.vocab_size - 1}"):
            tokenizer.decode([0, token])


def test_ids_are_numbers() -> None:
    tokenizer = IdTokenizer(100)
    assert tokenizer.decode([3, 14, 15]) == " 3 14 15"
    assert tokenizer.encode("3 14 15").tolist() == [3, 14, 15]
    for text in ("3 x", "100", "-1"):
        with pytest.raises(ValueError, match=r"the text must be token ids \(0 to 99\)"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="text needs another"):
        id_tokenizer(Texts(["3"]), False)


def test_byte_pairs_are_learned_from_the_text(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 300
    assert bpe.end_of_text == 0
    assert len(bpe.encode(POEM)) < len(POEM) / 1.5
    assert BPETokenizer.train(Texts([POEM, MANY]), True, 300).to_json() == bpe.to_json()
    assert BPETokenizer.train(Texts([POEM]), False, 300).end_of_text is None


def test_byte_pairs_learn_from_a_sample_spread_over_the_text() -> None:
    texts = Texts(["aaaa " * 100, "bbbb " * 100, "cccc " * 100])
    learned = BPETokenizer.train(texts, False, vocab_size=262, max_characters=150)
    assert [len(learned.encode(word)) for word in (" aaaa", " bbbb", " cccc")] == [2, 2, 2]
    head = BPETokenizer.train(Texts(texts[:1]), False, vocab_size=259)
    assert len(head.encode(" bbbb")) > 2


def library(**parts) -> Library:
    """A byte-level tokenizer as GPT-2's, with other parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Library(
        models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "th", "the"])}, merges=[("t", "h"), ("th", "e")])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def llama2() -> Library:
    """A tokenizer with the parts of Llama 2's: a space before the text, ▁ for spaces, tokens for single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "e", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    tokenizer = Library(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [library, llama2])
def test_tokenizers_from_elsewhere(tmp_path: Path, make) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_file(Texts(), False, str(tmp_path / "tokenizer.json"))
    for text in ("the other the", " the\n\nthe  ", MANY):
        parts = [tokenizer.encode(text[:5]), tokenizer.encode(text[5:])]
        assert tokenizer.decode(np.concatenate(parts)) == text
        assert tokenizer.token_bytes[np.concatenate(parts)].sum() == len(text.encode())
    assert len(tokenizer.encode("the")) == 1
    tokenizer.save(tmp_path / "again.json")
    assert load_tokenizer(tmp_path / "again.json").to_json() == tokenizer.to_json()
    assert tokenizer.end_of_text == (2 if make is llama2 else None)


def test_the_end_of_text_must_be_there(tmp_path: Path) -> None:
    library().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no token that ends a document; set data.end_of_text=false"):
        tokenizer_from_file(Texts(), True, str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (library(normalizer=normalizers.Lowercase()), "does not decode to the text that it encoded: .A  b"),
        (library(decoder=decoders.WordPiece()), "tokens do not represent bytes"),
        (Library(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "tokens do not represent bytes"),
    ],
)
def test_tokenizers_that_lose_text_are_refused(tmp_path: Path, tokenizer: Library, says: str) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"type": "abacus"}', '{"type": "char"}', '{"type": "byte"}', "\xff", '{"model": 3}', "3",
     '{"model": {"type": "BPE"}}', '{"normalizer": {"type": 1}, "model": {}}'],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_byte_level_token_is_its_bytes() -> None:
    """The byte table of a byte-level tokenizer, against decoding what can be decoded."""
    tokenizer = BPETokenizer(json.dumps(json.loads(library().to_str())))
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([i])
        if "\ufffd" not in text:
            assert tokenizer.token_bytes[i] == len(text.encode())
