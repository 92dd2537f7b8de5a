from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from language_model.config import ROOT
from language_model.data import IGNORED, ShuffledBatches, TextData, Windows, read_text

SONNETS = ROOT / "src" / "language_model" / "sonnets.txt"


@given(tokens=st.lists(st.integers(0, 9), min_size=2, max_size=40), data=st.data())
def test_windows_are_the_chapters_shifted_pairs(tokens: list[int], data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, len(tokens) - 1))
    windows = Windows(torch.tensor(tokens), seq_len)
    assert len(windows) == len(tokens) - seq_len
    for i in range(len(windows)):
        inputs, targets = windows[i]
        assert inputs.tolist() == tokens[i : i + seq_len]
        assert targets.tolist() == tokens[i + 1 : i + seq_len + 1]
    starts = torch.tensor(data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=8)))
    inputs, targets = windows.__getitems__(starts)
    assert torch.equal(inputs, torch.stack([windows[i][0] for i in starts]))
    assert torch.equal(targets, torch.stack([windows[i][1] for i in starts]))


def test_windows_are_a_view_of_the_tokens() -> None:
    tokens = torch.arange(1_000)
    assert Windows(tokens, 64).windows.data_ptr() == tokens.data_ptr()


def test_too_few_tokens_for_a_window() -> None:
    assert len(Windows(torch.arange(65), 64)) == 1
    with pytest.raises(
        ValueError, match=r"64 tokens are too few for one window of seq_len=64 .* at least 65 are needed"
    ):
        Windows(torch.arange(64), 64)


def order(num_starts: int, stride: int, batch_size: int, epoch: int = 0, seed: int = 0, **ranks) -> ShuffledBatches:
    return ShuffledBatches(num_starts, stride, batch_size, seed, lambda: epoch, **ranks)


@settings(deadline=None)
@given(
    num_starts=st.integers(1, 500),
    stride=st.integers(1, 20),
    batch_size=st.integers(1, 8),
    world_size=st.integers(1, 3),
    epoch=st.integers(0, 9),
)
def test_an_epoch_takes_each_window_once(
    num_starts: int, stride: int, batch_size: int, world_size: int, epoch: int
) -> None:
    if num_starts // stride < batch_size * world_size:
        with pytest.raises(ValueError, match="are too few for one batch"):
            order(num_starts, stride, batch_size, epoch, world_size=world_size)
        return
    ranks = [order(num_starts, stride, batch_size, epoch, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert all(len(some) == len(rank) for some, rank in zip(batches, ranks, strict=True))
    assert all(batch.shape == (batch_size,) for some in batches for batch in some)
    starts = torch.cat([batch for some in batches for batch in some])
    assert (
        len(starts.unique())
        == len(starts)
        == num_starts // stride // (batch_size * world_size) * batch_size * world_size
    )
    assert starts.min() >= 0
    assert starts.max() < num_starts
    assert len((starts % stride).unique()) == 1


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def epoch(number: int, seed: int = 0) -> list[int]:
        torch.rand(3)  # whatever else is drawn
        return torch.cat(list(order(1_000, 1, 10, number, seed))).tolist()

    assert epoch(0) == epoch(0)
    assert epoch(3) == epoch(3)
    assert len({tuple(epoch(number, seed)) for number in range(5) for seed in range(5)}) == 25
    assert epoch(0) != sorted(epoch(0))


def test_the_offset_of_the_windows_changes_with_the_epoch() -> None:
    offsets = {int(next(iter(order(1_000, 10, 10, number)))[0]) % 10 for number in range(100)}
    assert offsets == set(range(10))


def test_the_chapters_corpus_in_numbers() -> None:
    data = TextData(str(SONNETS), seq_len=64, batch_size=32)
    assert data.num_characters == 1_331
    assert data.tokenizer.vocab_size == 43
    assert len(data.train_windows) == 1_267
    assert len(data.train_dataloader()) == 39
    assert not data.has_validation
    assert data.val_dataloader() == []
    assert data.opening == "Shall I"
    text = read_text(SONNETS)
    assert text.count("\n") == 31
    assert data.tokenizer.decode(data.train_windows.windows[0].tolist()) == text[:65]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_for_any_number_of_workers(num_workers: int) -> None:
    data = TextData(str(SONNETS), seq_len=64, batch_size=32, num_workers=num_workers, seed=7)
    state = torch.get_rng_state()
    batches = list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing from the global generator
    expected = [data.train_windows.__getitems__(starts) for starts in data.order()]
    assert len(batches) == len(expected)
    for (inputs, targets), (expected_inputs, expected_targets) in zip(batches, expected, strict=True):
        assert inputs.dtype == torch.int64
        assert torch.equal(inputs, expected_inputs)
        assert torch.equal(targets, expected_targets)


@given(length=st.integers(20, 200), seq_len=st.integers(1, 9), batch_size=st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_validation_predicts_each_token_of_the_split_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, length: int, seq_len: int, batch_size: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = "".join(chr(97 + i * i % 26) for i in range(26)) * 8
    path.write_text(text[: 208 - length // 2] + text[:length], encoding="utf-8")
    data = TextData(str(path), seq_len, batch_size, val_fraction=0.2)
    whole = path.read_text(encoding="utf-8")
    split = whole[len(whole) - int(len(whole) * 0.2) :]
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    pairs = [pair for inputs, targets in loader for pair in zip(inputs.flatten(), targets.flatten(), strict=True)]
    counted = [(int(a), int(b)) for a, b in pairs if b != IGNORED]
    ids = data.tokenizer.encode(split)
    assert counted == list(zip(ids[:-1], ids[1:], strict=True))
    assert all(0 <= a < data.tokenizer.vocab_size for a, _ in pairs)
    assert data.tokenizer.decode(ids) == split


def text_data(path: Path, content: bytes, **settings) -> TextData:
    file = path / "text.txt"
    file.write_bytes(content)
    return TextData(str(file), **{"seq_len": 4, "batch_size": 1} | settings)


@pytest.mark.parametrize(
    ("content", "settings", "says"),
    [
        (b"", {}, "text.txt is empty"),
        (b"caf\xe9 au lait", {}, "text.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"abcd", {}, "4 tokens are too few for one window of seq_len=4"),
        (b"abcdefgh", {"batch_size": 5}, "4 windows are too few for one batch of batch_size=5"),
        (b"abababab#", {"val_fraction": 0.2}, "validation split, the last 1 characters: .*'#'"),
        (b"abababababab", {"val_fraction": 0.1}, "validation split, the last 1 characters: 1 tokens are too few"),
        (b"abababababab", {"val_fraction": 0.01}, "validation split, the last 0 characters: 0 tokens are too few"),
    ],
)
def test_text_that_cannot_be_trained_on(tmp_path: Path, content: bytes, settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        text_data(tmp_path, content, **settings)


def test_line_ends_and_other_scripts_are_kept(tmp_path: Path) -> None:
    data = text_data(tmp_path, "学而时习之，\r\n不亦说乎？".encode())
    assert data.num_characters == 13
    assert "\r" in data.tokenizer.characters
    assert data.opening == "学而时习之，\r\n不亦说乎？"
