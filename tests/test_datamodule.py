import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from language_model.data.bpe import BPETokenizer
from language_model.data.datamodule import BinData, TextData
from language_model.data.token_files import is_text
from language_model.data.tokenizer import ByteTokenizer, CharTokenizer, id_tokenizer
from language_model.data.tokenizer_file import tokenizer_from_file
from language_model.data.windows import IGNORE_INDEX
from language_model.files import ROOT
from language_model.runs.config import ConfigError, build

CHARACTERS = {"_target_": "language_model.data.tokenizer.CharTokenizer.from_texts", "_partial_": True}
FROM_FILE = {"_target_": "language_model.data.tokenizer_file.tokenizer_from_file", "_partial_": True}
SONNETS = ROOT / "src" / "language_model" / "sonnets.txt"


@pytest.fixture
def text_data(tmp_path: Path):
    """Make TextData of a file with some content."""

    def make(content: bytes | str, **settings) -> TextData:
        file = tmp_path / "text.txt"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        defaults = {
            "tokenizer": CharTokenizer.from_texts,
            "cache": str(tmp_path / "cache"),
            "seq_len": 4,
            "batch_size": 1,
        }
        return TextData(str(file), **defaults | settings)

    return make


def test_the_chapters_corpus_in_numbers(tmp_path: Path) -> None:
    data = TextData(str(SONNETS), CharTokenizer.from_texts, str(tmp_path), seq_len=64, batch_size=32)
    assert data.num_train_tokens == 1_331
    assert data.tokenizer.vocab_size == 43
    assert len(data.train_windows) == 1_267
    assert len(data.train_dataloader()) == 39
    assert not data.has_validation
    assert data.val_dataloader() == []
    assert data.default_prompt == "Shall I"
    text = SONNETS.read_text(encoding="utf-8")
    assert text.count("\n") == 31
    assert data.tokenizer.decode(data.train_windows[0][0]) == text[:64]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers(text_data, num_workers: int) -> None:
    data = text_data(SONNETS.read_bytes(), seq_len=64, batch_size=32, num_workers=num_workers, seed=7)
    state = torch.get_rng_state()
    batches = list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the global generator
    expected = [data.train_windows.__getitems__(starts) for starts in data.train_batch_sampler()]
    assert len(batches) == len(expected)
    for (inputs, targets), (expected_inputs, expected_targets) in zip(batches, expected, strict=True):
        assert inputs.dtype == torch.int64
        assert torch.equal(inputs, expected_inputs)
        assert torch.equal(targets, expected_targets)


@given(length=st.integers(20, 200), seq_len=st.integers(1, 9), batch_size=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_validation_predicts_each_token_of_the_split_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, length: int, seq_len: int, batch_size: int
) -> None:
    folder = tmp_path_factory.mktemp("text")
    text = "".join(chr(97 + i * i % 26) for i in range(26)) * 8
    text = text[: 208 - length // 2] + text[:length]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    data = TextData(
        str(folder / "text.txt"), CharTokenizer.from_texts, str(folder / "cache"), seq_len, batch_size, val_fraction=0.2
    )
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    pairs = [pair for inputs, targets in loader for pair in zip(inputs.flatten(), targets.flatten(), strict=True)]
    counted = [(int(a), int(b)) for a, b in pairs if b != IGNORE_INDEX]
    split = data.tokenizer.encode(text[int(len(text) * 0.8) :]).tolist()
    assert counted == list(zip(split[:-1], split[1:], strict=True))


def test_the_split_is_nanogpts(text_data) -> None:
    """Its prepare.py takes the first int(0.9 · n) characters for training."""
    data = text_data("ab" * 500 + "aba", val_fraction=0.1)
    assert data.num_train_tokens == int(1_003 * 0.9) == 902
    assert data.num_val_tokens == 101


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        (b"", {}, "^path=.*text.txt: there is no text in it"),
        (b"caf\xe9 au lait", {}, "text.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"\x89PNG\r\n\x1a\n", {}, "text.txt is not UTF-8 text: byte 0 is 0x89"),
        (b"abcd\0efgh", {}, "text.txt is binary, not text: it has a NUL"),
        (
            b"a",
            {"val_fraction": 0.1},
            r"^seq_len=4: the training text, 0 characters of text.txt \(data.val_fraction=0.1 takes the rest\), has "
            r"0 tokens, too few for one window and its shifted target, 5 tokens; more text is needed$",
        ),
        (
            b"abcd",
            {},
            "^seq_len=4: the training text, 4 characters of text.txt, has 4 tokens, .*; allowed: at most 3$",
        ),
        (b"abcdefgh", {"batch_size": 5}, "^batch_size=5: the training data has 4 windows, .*; at most 4, or"),
        (b"abcdefgh", {"stride": 5}, "^stride=5: the training data has only 4 windows; at most that many$"),
        (
            b"abababab#",
            {"val_fraction": 0.2, "tokenizer": partial(tokenizer_from_file, path="char.json")},
            r"^path=.*text.txt: the validation text's character '#' \(U\+0023\) at position 1 is not",
        ),
        (b"abababababab", {"val_fraction": 0.01}, "^val_fraction=0.01: the validation text has too few tokens, 1"),
        (b"ab" * 9, {"val_path": "one.txt"}, "^val_path=one.txt: the validation text has too few tokens, 1"),
        (
            b"ab" * 9,
            {"val_path": ["one.txt", "empty.txt"]},
            r"^val_path=\[one.txt,empty.txt\]: the validation text",
        ),
        (b"ab" * 9, {"val_path": "latin.txt"}, "^val_path=latin.txt: latin.txt is not UTF-8 text"),
        (b"ab" * 9, {"encoding": "klingon"}, "encoding=klingon: Python knows no such text encoding"),
        (b"ab" * 9, {"encoding": "hex"}, "encoding=hex: Python knows no such text encoding"),
        (
            b"ab" * 9,
            {"end_of_text": True, "tokenizer": partial(tokenizer_from_file, path="char.json")},
            "has no token that ends",
        ),
        (b"ab" * 9, {"tokenizer": id_tokenizer}, "token ids are for data=bin"),
        (b"ab" * 9, {"val_path": "nowhere"}, "^val_path=nowhere: no such file or directory$"),
        (b"\x89PNG\r\n\0\n", {"encoding": "latin-1"}, "text.txt is binary, not text: it has a NUL character"),
    ],
)
def test_text_that_cannot_be_trained_on(
    text_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, settings: dict, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    CharTokenizer("ab").save(tmp_path / "char.json")
    for name, text in (("one.txt", b"a"), ("empty.txt", b""), ("latin.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=says):
        text_data(content, **settings)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_a_prepared_text_is_still_checked(text_data) -> None:
    text_data("abcdefgh")
    with pytest.raises(ValueError, match=r"^seq_len=8: .* has 8 tokens, too few"):
        text_data("abcdefgh", seq_len=8)


def test_line_ends_and_other_scripts_are_kept(text_data) -> None:
    data = text_data("学而时习之，\r\n不亦说乎？")
    assert data.num_train_tokens == 13
    assert "\r" in data.tokenizer.characters
    assert data.default_prompt == "学而时习之，\r\n不亦说乎？"
    assert text_data("学而时习之，\r\n不亦说乎？", newlines="normalise").num_train_tokens == 12


@pytest.mark.parametrize("tokenizer", [ByteTokenizer.from_texts, partial(BPETokenizer.train, vocab_size=257)])
def test_the_opening_is_whole_characters(text_data, tokenizer) -> None:
    text = "学而时习之不亦说乎有朋自远方来不亦乐乎人不知而不愠不亦君子乎" * 3
    data = text_data(text, tokenizer=tokenizer)
    assert text.startswith(data.default_prompt)
    assert len(data.default_prompt) >= 30


def test_a_text_of_its_own_for_validation(text_data, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("bababab")
    data = text_data("ab" * 100, val_path=str(tmp_path / "val.txt"), val_fraction=0.5)
    assert data.num_train_tokens == 200
    assert data.num_val_tokens == 7


def test_documents_end_in_a_token_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "ba", "aab")))
    make = partial(TextData, str(file), CharTokenizer.from_texts, str(tmp_path / "cache"), seq_len=2, batch_size=1)
    assert np.asarray(make().corpus.train).tolist() == [0, 1, 2, 1, 0, 2, 0, 0, 1, 2]
    assert make().default_prompt == "abbaaab"
    assert np.asarray(make(end_of_text=False).corpus.train).tolist() == [0, 1, 1, 0, 0, 0, 1]


LLM_C_HEADER = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def write_tokens(path: Path, tokens: list[int], header: str | None = None) -> str:
    with path.open("wb") as file:
        if header:
            start = np.zeros(256, "<i4")
            start[:3] = *LLM_C_HEADER[header], len(tokens)
            file.write(start.tobytes())
        file.write(np.array(tokens, "<u4" if header == "uint32" else "<u2").tobytes())
    return str(path)


@pytest.mark.parametrize("header", [None, "uint16", "uint32"])
def test_token_files_of_nanogpt_and_llm_c(tmp_path: Path, header: str | None) -> None:
    tokens = [7, 50_256, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    train = write_tokens(tmp_path / "train.bin", tokens, header)
    val = write_tokens(tmp_path / "val.bin", [1, 2, 3], header)
    data = BinData(train, val, id_tokenizer, str(tmp_path), seq_len=4, batch_size=2)
    assert data.train_windows[0][0].tolist() == [7, 50_256, 3, 1]
    assert data.train_windows[8][1].tolist() == [6, 5, 3, 5]
    assert data.num_val_tokens == 3
    assert data.tokenizer.vocab_size == 50_257
    assert data.default_prompt == "7 50256"


def test_token_files_in_shards(tmp_path: Path) -> None:
    for i in (1, 0):
        write_tokens(tmp_path / f"train_{i}.bin", [10 * i + j for j in range(6)], "uint16")
    data = BinData(str(tmp_path / "train_*.bin"), None, id_tokenizer, str(tmp_path), seq_len=4, batch_size=1)
    assert [window[0][0].item() for window in (data.train_windows[i] for i in range(4))] == [0, 1, 10, 11]
    assert not data.has_validation


def test_token_files_with_their_tokenizer(tmp_path: Path) -> None:
    CharTokenizer("abc").save(tmp_path / "tokenizer.json")
    train = write_tokens(tmp_path / "train.bin", [0, 1, 2, 0, 1, 2])
    tokenizer = partial(tokenizer_from_file, path=str(tmp_path / "tokenizer.json"))
    data = BinData(train, None, tokenizer, str(tmp_path), seq_len=4, batch_size=1)
    assert data.default_prompt == "abcabc"
    CharTokenizer("ab").save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"train.bin has the id 2; the tokenizer's go from 0 to 1"):
        BinData(train, None, tokenizer, str(tmp_path), seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match="have no text to learn a tokenizer from"):
        BinData(train, None, CharTokenizer.from_texts, str(tmp_path), seq_len=4, batch_size=1)
    with pytest.raises(ValueError, match=r"the id 2; the tokenizer's go from 0 to 1"):
        BinData(train, None, partial(id_tokenizer, vocab_size=2), str(tmp_path), seq_len=4, batch_size=1)


def header(*numbers: int) -> bytes:
    return np.array(numbers, "<i4").tobytes() + bytes(1024 - 4 * len(numbers))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "train.bin: it is empty"),
        (b"abc\0\1", "no file of uint16 tokens: it has an odd number of bytes, 5"),
        (header(20240520, 2, 1) + b"ab", "llm.c's header of version 2; 1 is known"),
        (header(20240520, 1, 9) + b"ab", "has 1,026 bytes, and by its header of 9 tokens should have 1,042"),
        (header(20240801, 7, 1) + b"ab", "has 1,026 bytes, and by its header of 1 tokens should have 1,028"),
        (b"First Citizen:\n\tBefore we proceed" * 9, "it is text, not tokens: use data=text data.path=.*train.bin$"),
        (
            "学而时习之，\u3000不亦说乎？\xa0\N{ROCKET}\r\n".encode() * 3_000,
            "it is text, not tokens: use data=text data.path=",
        ),
    ],
)
def test_token_files_that_are_none(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"^train_path=.*{says}"):
        BinData(str(tmp_path / "train.bin"), None, id_tokenizer, str(tmp_path / "cache"), seq_len=4, batch_size=1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"a\0b\0", header(20240520, 1, 0)])
def test_too_few_tokens_in_a_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"^seq_len=4: the training data has [02] tokens, too few"):
        BinData(str(tmp_path / "train.bin"), None, id_tokenizer, str(tmp_path / "cache"), seq_len=4, batch_size=1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("val.bin", b"hear me speak.", "it is text, not tokens"),
        ("val.txt", b"\1\0\2\0", "it is text, not tokens"),  # by its name
        ("val.bin.gz", gzip.compress(b"\1\0\2\0", mtime=0), "it is compressed"),
        ("val.bin", b"\1\0", "has too few tokens, 1"),
    ],
)
def test_validation_tokens_that_are_none(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    train = write_tokens(tmp_path / "train.bin", list(range(9)))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^val_path=.*{says}"):
        BinData(train, str(tmp_path / name), id_tokenizer, str(tmp_path), seq_len=4, batch_size=1)


def test_a_file_is_not_for_training_and_validation_both(text_data, tmp_path: Path) -> None:
    text_data("ab" * 20)
    (tmp_path / "link.txt").symlink_to(tmp_path / "text.txt")
    for val in ("text.txt", "link.txt", "*.txt"):
        with pytest.raises(
            ValueError, match=r"^val_path=.*\.txt: training reads this file too; validation needs another"
        ):
            text_data("ab" * 20, val_path=str(tmp_path / val))
    train = write_tokens(tmp_path / "train.bin", list(range(9)))
    with pytest.raises(ValueError, match=r"^val_path=.*train\.bin: training reads this file too"):
        BinData(train, str(tmp_path / "*.bin"), id_tokenizer, str(tmp_path), seq_len=4, batch_size=1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": ""}, "data.path=: string should have at least 1 character"),
        ({"path": []}, "data.path=[]: "),
        ({"path": ["a.txt", ""]}, "data.path=["),
        ({"val_path": ""}, "data.val_path=: string should have at least 1 character"),
        ({"cache": ""}, "data.cache=: string should have at least 1 character"),
        ({"field": ""}, "data.field=: string should have at least 1 character"),
        ({"path": None, "url": "", "sha256": "0" * 64}, "data.url=: string should have at least 1 character"),
        ({"path": None}, "data.path=null: set data.path=..., or data.url and data.sha256"),
        ({"path": "nothing.txt"}, "data.path=nothing.txt: no such file or directory"),
        ({"val_path": "nothing.txt"}, "data.val_path=nothing.txt: no such file or directory"),
        ({"seq_len": 2_000}, "data.seq_len=2000: the training text, 1,331 characters of sonnets.txt, has 1,331 tokens"),
        ({"stride": 2_000}, "data.stride=2000: the training data has only 1,327 windows"),
        ({"batch_size": 2_000}, "data.batch_size=2000: the training data has 1,327 windows"),
        ({"encoding": "klingon"}, "data.encoding=klingon: Python knows no such text encoding"),
        ({"cache": str(SONNETS)}, f"data.cache={SONNETS}: file exists"),
        ({"tokenizer": FROM_FILE | {"path": ""}}, "data.tokenizer.path=: string should have at least 1 character"),
        ({"tokenizer": FROM_FILE | {"path": "/dev/zero"}}, "data: tokenizer.path=/dev/zero: it is not a regular file"),
        ({"tokenizer": FROM_FILE | {"path": str(SONNETS)}}, f"data: tokenizer.path={SONNETS}: "),
    ],
)
def test_what_is_wrong_is_told_by_its_key(tmp_path: Path, settings: dict, says: str) -> None:
    node = {"_target_": "language_model.data.datamodule.TextData", "path": str(SONNETS), "cache": str(tmp_path)}
    sizes = {"seq_len": 4, "batch_size": 2, "tokenizer": CHARACTERS}
    with pytest.raises(ConfigError) as error:
        build(OmegaConf.create({"data": node | sizes | settings}), "data")
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_the_windows_are_as_long_as_asked_or_as_the_network_takes() -> None:
    def seq_len(*overrides: str) -> int:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", list(overrides)).data.seq_len

    for data in ("data=sonnets", "data=bin"):
        assert seq_len(data, "model=baby") == 256
        assert seq_len(data, "~model.max_seq_len") == 64  # a network without that key
        assert seq_len(data, "data.seq_len=16") == seq_len(data, "~model.max_seq_len", "data.seq_len=16") == 16


@given(st.lists(st.integers(0, 8_191), min_size=8, max_size=400))
def test_tokens_are_not_taken_for_text(ids: list[int]) -> None:
    content = np.array(ids, "<u2").tobytes()
    allowed = np.frombuffer(content, "u1")[1::2]  # the high bytes of all ids a tab or a line end: it could be text
    assert not is_text(content) or np.isin(allowed, [9, 10, 12, 13]).all()


def test_gpt2s_tokens_are_not_taken_for_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):  # ids as frequent as words are, by Zipf's law
        ids = np.minimum(rng.zipf(1.2, 200), 50_256).astype("<u2")
        assert not is_text(ids.tobytes())
