import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from language_model.data.token_files import TokenFile
from language_model.data.windows import (
    IGNORE_INDEX,
    ShuffledBatches,
    Windows,
    WindowsInOrder,
    check_training,
    check_validation,
    permute,
)


def each_window(parts: list[list[int]], seq_len: int) -> list[list[int]]:
    return [part[i : i + seq_len + 1] for part in parts for i in range(len(part) - seq_len)]


parts_of_tokens = st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=1, max_size=4)


@given(parts=parts_of_tokens, seq_len=st.integers(1, 8), data=st.data())
def test_windows_are_the_chapters_shifted_pairs(parts: list[list[int]], seq_len: int, data: st.DataObject) -> None:
    windows = Windows([np.array(part, np.uint8) for part in parts], seq_len)
    expected = each_window(parts, seq_len)
    assert len(windows) == len(expected)
    for i, window in enumerate(expected):
        inputs, targets = windows[i]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == window[:-1]
        assert targets.tolist() == window[1:]
    if expected:
        indices = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=8))
        inputs, targets = windows.__getitems__(np.array(indices))
        assert inputs.tolist() == [expected[i][:-1] for i in indices]
        assert targets.tolist() == [expected[i][1:] for i in indices]


@given(
    parts=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=20), min_size=1, max_size=3),
    seq_len=st.integers(1, 8),
)
def test_windows_in_order_predict_each_token_once(parts: list[list[int]], seq_len: int) -> None:
    windows = WindowsInOrder([np.array(part, np.uint8) for part in parts], seq_len)
    inputs, targets = windows.__getitems__(np.arange(len(windows)))
    assert inputs.shape == targets.shape == (len(windows), seq_len)
    pairs = [(int(a), int(b)) for a, b in zip(inputs.flatten(), targets.flatten(), strict=True) if b != IGNORE_INDEX]
    assert pairs == [pair for part in parts for pair in zip(part[:-1], part[1:], strict=True)]
    assert inputs.min() >= 0
    one, last = windows[len(windows) - 1]
    assert torch.equal(one, inputs[-1])
    assert torch.equal(last, targets[-1])


def test_windows_copy_no_token() -> None:
    tokens = np.arange(1_000)
    assert np.shares_memory(Windows([tokens], 64).views[0], tokens)


def test_windows_of_a_file_go_to_a_worker_as_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(10_000, dtype=np.uint16).tofile(path)
    windows = Windows([TokenFile(path, "uint16")], 64)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1_000
    assert torch.equal(pickle.loads(pickled)[5_000][0], windows[5_000][0])


def test_too_few_tokens_for_a_window() -> None:
    check_training(65, 64)
    with pytest.raises(ValueError, match=r"^seq_len=64: it has 64 tokens, too few .*, 65 tokens; allowed: at most 63"):
        check_training(64, 64, "it")
    with pytest.raises(ValueError, match=r"^seq_len=64: it has 0 tokens, too few .*; more text is needed"):
        check_training(0, 64, "it")
    check_validation(2, "it")
    with pytest.raises(ValueError, match="it has too few tokens, 1: at least 2 are needed"):
        check_validation(1, "it")


@settings(deadline=None)
@given(n=st.integers(1, 3_000), seed=st.integers(0, 2**32))
def test_shuffled_is_a_permutation(n: int, seed: int) -> None:
    keys = np.random.SeedSequence(seed).generate_state(8, np.uint64)
    whole = permute(np.arange(n), n, keys)
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.arange(n).reshape(1, -1)[:, ::3]
    assert np.array_equal(permute(some, n, keys), whole[some])  # whatever is asked for together


@pytest.mark.parametrize("n", [10**11 + 3, 2**40, 2**40 + 1, 2**62])
def test_shuffled_reaches_far_without_repeating(n: int) -> None:
    keys = np.random.SeedSequence(1).generate_state(8, np.uint64)
    positions = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    values = permute(positions, n, keys)
    assert len(np.unique(values)) == 100_000
    assert values.min() >= 0
    assert values.max() < n
    # As spread as chance would have it: each tenth gets a tenth, within five standard deviations.
    tenths = np.bincount((values / n * 10).astype(int), minlength=10)
    assert abs(tenths - 10_000).max() < 5 * (100_000 * 0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("n", [3, 4, 7, 39])
def test_shuffled_favours_no_order(n: int) -> None:
    """Every number stands at every position, and behind every other, as often as in fair shuffles."""
    at, after = np.zeros((n, n)), np.zeros((n, n))
    trials = 6_000
    for seed in range(trials):
        order = permute(np.arange(n), n, np.random.SeedSequence((5, seed)).generate_state(8, np.uint64))
        at[np.arange(n), order] += 1
        after[order[:-1], order[1:]] += 1
    np.fill_diagonal(after, trials / n)
    # Chi-square of a table of counts, in standard deviations from what chance gives.
    for table in (at, after):
        cells = table.size
        chi_square = ((table - trials / n) ** 2 / (trials / n)).sum()
        assert chi_square < cells + 6 * (2 * cells) ** 0.5


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
        with pytest.raises(ValueError, match=r"too few for one batch|^stride="):
            order(num_starts, stride, batch_size, epoch, world_size=world_size)
        return
    ranks = [order(num_starts, stride, batch_size, epoch, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(rank) for rank in ranks]
    assert all(len(some) == len(rank) for some, rank in zip(batches, ranks, strict=True))
    assert all(batch.shape == (batch_size,) for some in batches for batch in some)
    starts = np.concatenate([batch for some in batches for batch in some])
    whole = num_starts // stride // (batch_size * world_size) * batch_size * world_size
    assert len(np.unique(starts)) == len(starts) == whole
    assert starts.min() >= 0
    assert starts.max() < num_starts
    assert len(np.unique(starts % stride)) == 1


@pytest.mark.parametrize(
    ("num_starts", "stride", "batch_size", "world_size", "says"),
    [
        (
            10,
            1,
            32,
            1,
            "batch_size=32: the training data has 10 windows, too few for one batch; at most 10, or",
        ),
        (105, 10, 6, 2, "batch_size=6: the training data has 10 windows, .* on each of 2 devices; at most 5, or"),
        (20, 10, 1, 4, "batch_size=1: the training data has 2 windows, .* on each of 4 devices; fewer devices, or"),
        (99, 100, 1, 1, "stride=100: the training data has only 99 windows; at most that many"),
    ],
)
def test_what_would_be_enough_windows_is_said(
    num_starts: int, stride: int, batch_size: int, world_size: int, says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        order(num_starts, stride, batch_size, world_size=world_size)


def test_the_size_that_is_named_is_enough() -> None:
    assert len(order(10, 1, 10)) == 1
    assert len(order(105, 10, 5, world_size=2)) == 1
    assert len(order(99, 99, 1)) == 1


@pytest.mark.parametrize(("num_tokens", "seq_len", "stride"), [(23, 4, 4), (40, 5, 7), (19, 6, 3), (30, 4, 1)])
def test_over_the_epochs_every_token_is_a_target(num_tokens: int, seq_len: int, stride: int) -> None:
    """But the first, before which there is nothing; and each window has its turn."""
    windows = Windows([np.arange(num_tokens)], seq_len)
    epochs = [np.concatenate(list(order(len(windows), stride, 1, epoch))) for epoch in range(400)]
    assert {len(starts) for starts in epochs} == {len(windows) // stride}
    targets, starts = Counter(), Counter(np.concatenate(epochs).tolist())
    for epoch in epochs:
        once = Counter(windows.__getitems__(epoch)[1].flatten().tolist())
        assert stride < seq_len or max(once.values()) == 1
        targets += once
    assert set(targets) == set(range(1, num_tokens))
    assert set(starts) == set(range(len(windows)))


def test_an_epoch_leaves_out_less_than_two_windows_at_the_ends() -> None:
    windows = Windows([np.arange(1_000)], 16)
    for epoch in range(200):
        targets = windows.__getitems__(np.concatenate(list(order(len(windows), 16, 1, epoch))))[1].flatten()
        assert len(torch.unique(targets)) == len(targets) > 999 - 2 * 16


def test_more_batches_than_are_drawn_at_once() -> None:
    starts = np.concatenate(list(order(50_000, 1, 3)))
    assert len(np.unique(starts)) == len(starts) == 49_998


def test_the_ranks_share_one_processes_batches() -> None:
    alone = list(order(1_000, 1, 8))
    two = [list(order(1_000, 1, 4, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, *halves in zip(alone, *two, strict=True):
        assert np.array_equal(batch, np.concatenate(halves))


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def epoch(number: int, seed: int = 0) -> list[int]:
        torch.rand(3)  # whatever else is drawn
        return np.concatenate(list(order(1_000, 1, 10, number, seed))).tolist()

    assert epoch(0) == epoch(0)
    assert epoch(3) == epoch(3)
    assert len({tuple(epoch(number, seed)) for number in range(5) for seed in range(5)}) == 25
    assert epoch(0) != sorted(epoch(0))


def test_the_order_stays_what_it_was() -> None:
    """A run of last year can be repeated: golden values."""
    assert next(iter(order(1_267, 1, 8))).tolist() == [980, 469, 951, 1213, 524, 1049, 496, 826]
    far = next(iter(order(10**11, 1024, 4, epoch=3, seed=42)))
    assert far.tolist() == [25919811660, 22755603532, 7571147852, 93541947468]


def test_the_offset_of_the_windows_changes_with_the_epoch() -> None:
    offsets = Counter(int(next(iter(order(1_000, 10, 10, number)))[0]) % 10 for number in range(1_000))
    assert set(offsets) == set(range(10))
    assert max(offsets.values()) < 150


def test_an_order_of_a_hundred_billion_windows_is_at_hand_at_once() -> None:
    batches = iter(order(10**11, 1, 64))
    assert len(next(batches)) == 64  # a materialised permutation would need 800 GB


def test_batches_of_a_loader_are_the_windows_at_the_orders_starts() -> None:
    windows = Windows([np.arange(2_000) % 251], 16)
    starts = order(len(windows), 16, 4)
    loader = DataLoader(windows, batch_sampler=starts, collate_fn=lambda batch: batch)
    assert [inputs[:, 0].tolist() for inputs, _ in loader] == [(batch % 251).tolist() for batch in starts]
