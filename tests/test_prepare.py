import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_model import files
from language_model.data import prepare as module
from language_model.data.bpe import BPETokenizer
from language_model.data.prepare import Corpus, cut_at_spaces, prepare, smallest_dtype
from language_model.data.text_files import TextFiles
from language_model.data.tokenizer import ByteTokenizer, CharTokenizer
from language_model.data.tokenizer_file import tokenizer_from_file

TEXT = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 40


@pytest.fixture
def prepared(tmp_path: Path):
    """Prepare text.txt, with some content."""

    def make(
        content: str = TEXT, tokenizer=CharTokenizer.from_texts, val: TextFiles | None = None, **settings
    ) -> Corpus:
        file = tmp_path / "text.txt"
        if not file.exists() or file.read_bytes() != content.encode():
            file.write_bytes(content.encode())
        files = {k: settings.pop(k) for k in ("encoding", "newlines", "field") if k in settings}
        defaults = {
            "val_fraction": 0.1,
            "end_of_text": False,
            "cache": tmp_path / "cache",
            "check_split": lambda *_: None,
        }
        return prepare(TextFiles(str(file), **files), val, make_tokenizer=tokenizer, **defaults | settings)

    return make


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.from_texts, ByteTokenizer.from_texts, partial(BPETokenizer.train, vocab_size=300)]
)
def test_the_tokens_are_the_texts(prepared, tokenizer) -> None:
    text = TEXT + "学而时习之"
    corpus = prepared(text * 2, tokenizer)
    train, val = np.asarray(corpus.train), np.asarray(corpus.val)
    cut = int(2 * len(text) * 0.9)
    assert corpus.tokenizer.decode(train) == (2 * text)[:cut]
    assert corpus.tokenizer.decode(val) == (2 * text)[cut:]
    assert corpus.facts == {
        split: {
            "documents": 1,
            "characters": len(part),
            "bytes": len(part.encode()),
            "tokens": len(tokens),
        }
        for split, part, tokens in (("train", (2 * text)[:cut], train), ("val", (2 * text)[cut:], val))
    }


def test_byte_pairs_are_learned_from_the_training_text_alone(prepared, tmp_path: Path) -> None:
    tokenizer = partial(BPETokenizer.train, vocab_size=300)
    alone = prepared(TEXT, tokenizer, val_fraction=0.0).tokenizer.to_json()
    other = tmp_path / "val.txt"
    other.write_text("xyzzy " * 1_000)
    assert prepared(TEXT, tokenizer, TextFiles(str(other))).tokenizer.to_json() == alone
    cut = len(TEXT)
    whole = TEXT + "xyzzy " * (cut // 6)  # its first half is TEXT
    assert prepared(whole, tokenizer, val_fraction=1 - cut / len(whole)).tokenizer.to_json() == alone


def test_the_alphabet_is_that_of_the_training_and_the_validation_text(prepared, tmp_path: Path) -> None:
    """As nanoGPT's: a character that only the validation text has costs one token, and stops no run."""
    corpus = prepared(TEXT + "!")
    assert "!" not in corpus.tokenizer.decode(np.asarray(corpus.train))
    assert corpus.tokenizer.characters == sorted(set(TEXT + "!"))
    other = tmp_path / "val.txt"
    other.write_text("学 \n?")
    corpus = prepared(TEXT, val=TextFiles(str(other)))
    assert corpus.tokenizer.characters == sorted(set(TEXT + "学 \n?"))
    assert corpus.tokenizer.decode(np.asarray(corpus.val)) == "学 \n?"


def test_a_corpus_of_an_earlier_version_is_the_same_as_one_made_now(prepared, tmp_path: Path) -> None:
    """Its alphabet was the training text's, and it was kept only if the validation text had no other character."""

    class Earlier:
        def __call__(self, texts, end_of_text: bool) -> CharTokenizer:
            return CharTokenizer("".join(texts), end_of_text)

    earlier = Earlier()
    earlier.__module__, earlier.__qualname__ = "language_model.tokenizer", "CharTokenizer.of"
    before = prepared(TEXT, earlier)
    content = {file.name: file.read_bytes() for file in before.folder.iterdir()}
    assert prepared(TEXT).folder == before.folder  # the key is the same: it is found
    now = prepared(TEXT, cache=tmp_path / "cache of now")
    assert {file.name: file.read_bytes() for file in now.folder.iterdir()} == content
    with pytest.raises(ValueError, match=r"the validation text's character '!' .* at position 324 is not among"):
        prepared(TEXT + "!", earlier)  # nothing with a smaller alphabet was kept
    assert len(list((tmp_path / "cache").iterdir())) == 1


@given(text=st.text("ab \n.学", max_size=200), piece=st.integers(1, 20))
def test_cutting_keeps_the_text(text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        pieces = list(cut_at_spaces([(text[:70], False), (text[70:], True), (text, False)]))
    assert "".join(part for part, _ in pieces) == text + text
    assert sum(ends for _, ends in pieces) == 1
    assert all(len(part) <= piece for part, _ in pieces)


def test_byte_pairs_are_those_of_the_whole_text(prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 50)
    monkeypatch.setattr(module, "BATCH", 500)
    corpus = prepared(TEXT, partial(BPETokenizer.train, vocab_size=300), val_fraction=0.0)
    assert np.array_equal(corpus.train, corpus.tokenizer.encode(TEXT))
    assert corpus.val is None


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_smallest_type_that_holds_the_ids(vocab_size: int, dtype: str) -> None:
    assert smallest_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_a_corpus_is_prepared_once(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared()
    monkeypatch.setattr(module, "tokenize", None)  # to be called no more
    assert prepared().folder == first.folder
    (tmp_path / "text.txt").rename(tmp_path / "other.txt")
    assert prepared().folder == first.folder  # the content is what counts
    assert list((tmp_path / "cache").iterdir()) == [first.folder]


def test_whatever_changes_the_tokens_makes_another_corpus(prepared, tmp_path: Path) -> None:
    CharTokenizer(TEXT + "z").save(tmp_path / "tokenizer.json")
    from_elsewhere = partial(tokenizer_from_file, path=str(tmp_path / "tokenizer.json"))
    other = tmp_path / "val.txt"
    other.write_text(TEXT[:100])
    made = [
        prepared(),
        prepared(TEXT + "\n"),
        prepared(val_fraction=0.2),
        prepared(val=TextFiles(str(other))),
        prepared(tokenizer=ByteTokenizer.from_texts),
        prepared(tokenizer=ByteTokenizer.from_texts, end_of_text=True),
        prepared(tokenizer=partial(BPETokenizer.train, vocab_size=300)),
        prepared(tokenizer=partial(BPETokenizer.train, vocab_size=301)),
        prepared(tokenizer=from_elsewhere),
        prepared(encoding="latin-1"),
        prepared(newlines="normalise"),
    ]
    CharTokenizer(TEXT + "y").save(tmp_path / "tokenizer.json")
    made.append(prepared(tokenizer=from_elsewhere))
    other.write_text(TEXT[:90])
    made.append(prepared(val=TextFiles(str(other))))
    assert len({corpus.folder for corpus in made}) == len(made)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("lost"), KeyboardInterrupt()]
)
def test_what_goes_wrong_leaves_nothing(prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as failed:
        prepared()
    if isinstance(error, OSError):
        assert "text.txt" in failed.value.filename  # the config's error line names it
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_text_that_changes_meanwhile(prepared, tmp_path: Path) -> None:
    def tokenizer(texts, end_of_text):
        with (tmp_path / "text.txt").open("a") as file:
            file.write("a")
        return CharTokenizer.from_texts(texts, end_of_text)

    with pytest.raises(ValueError, match=r"text.txt changed while it was read"):
        prepared(tokenizer=tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_known_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "LARGE", 3)
    file = tmp_path / "large"
    file.write_text("abc")
    os.utime(file, (1, 1))
    asked = iter(range(100))
    ask = partial(files.cached_fact, "what", file, tmp_path / "cache", lambda: next(asked))
    assert [ask(), ask()] == [0, 0]
    os.utime(file, (2, 2))
    assert [ask(), ask()] == [1, 1]
    file.write_text("abcd")  # just now: the next change might come within the clock's grain
    assert [ask(), ask()] == [2, 3]
    file.write_text("ab")
    assert [ask(), ask()] == [4, 5]
    assert files.cached_fact("another", file, tmp_path / "cache", lambda: "new") == "new"


SCRIPT = """
import sys, time
from pathlib import Path
from language_model.data.text_files import TextFiles
from language_model.data.prepare import prepare
from language_model.data.tokenizer import ByteTokenizer
class Slow(ByteTokenizer):
    def encode(self, text):
        print("encoding", flush=True)
        time.sleep(float(sys.argv[2]))
        return super().encode(text)
def slow(texts, end_of_text):
    return Slow()
folder = Path(sys.argv[1])
prepare(TextFiles(str(folder / "text.txt")), None, 0.1, slow, False, folder / "cache", lambda *_: None)
"""


def preparing(folder: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_processes_at_once_prepare_it_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    said = [process.communicate(timeout=120)[0] for process in [preparing(tmp_path, 0.5) for _ in range(3)]]
    assert sorted(text.count("encoding") for text in said) == [0, 0, 2]  # once for each split
    (folder,) = (tmp_path / "cache").iterdir()
    assert np.fromfile(folder / "train.bin", np.uint8).tobytes().decode() == TEXT[: int(len(TEXT) * 0.9)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal")
@pytest.mark.slow
def test_a_killed_preparation_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    process = preparing(tmp_path, 600)
    assert process.stdout is not None
    assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".partial", ".lock"}
    assert preparing(tmp_path, 0).communicate(timeout=120)[0] == "encoding\n" * 2
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "corpus.json").exists()


@pytest.mark.parametrize(
    ("maker", "name"),
    [
        (CharTokenizer.from_texts, "CharTokenizer.of"), (ByteTokenizer.from_texts, "ByteTokenizer.of"),
        (partial(BPETokenizer.train, vocab_size=300), "BPETokenizer.train"),
    ],
)  # fmt: skip
def test_corpora_of_earlier_versions_stay_valid(maker, name: str) -> None:
    """The key of a corpus has the tokenizer's name in it; these are the names of commit 0a1ae00."""
    settings = {"vocab_size": 300} if name == "BPETokenizer.train" else {}
    assert module.describe_maker(maker) == [f"language_model.tokenizer.{name}", settings]
