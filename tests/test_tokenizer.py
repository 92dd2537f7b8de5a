from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_model.tokenizer import CharTokenizer


def test_characters_are_numbered_in_sorted_order() -> None:
    tokenizer = CharTokenizer("banana split")
    assert tokenizer.characters == [" ", "a", "b", "i", "l", "n", "p", "s", "t"]
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("ban") == [2, 1, 5]


@given(text=st.text(st.characters(exclude_categories=[])), more=st.text())
def test_any_unicode_text_comes_back(text: str, more: str) -> None:
    tokenizer = CharTokenizer(text + more)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_saved_tokenizer_is_the_same(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    CharTokenizer(text).save(path)
    assert CharTokenizer.load(path).characters == CharTokenizer(text).characters


def test_an_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 3 is not among the tokenizer's 3 characters"):
        CharTokenizer("caf").encode("café")


@pytest.mark.parametrize("token", [-1, 3])
def test_an_id_that_is_no_token_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token} is outside 0 to 2"):
        CharTokenizer("abc").decode([0, token])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"type": "bpe"}', '{"type": "char"}', "\xff"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="is not a character tokenizer"):
        CharTokenizer.load(path)
