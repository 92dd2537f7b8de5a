import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from language_model.training.schedule import constant, steps_in_run, warmup_cosine, warmup_linear


def chapters(step: int, total_steps: int, max_lr: float, min_lr: float, warmup_steps: int) -> float:
    """The formula of the chapter's section 5, in its order of operations."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    cosine_decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_lr + (max_lr - min_lr) * cosine_decay


@given(total=st.integers(2, 5_000), data=st.data(), lr=st.floats(1e-6, 1.0), floor=st.floats(0, 1))
def test_warmup_cosine_is_the_chapters_to_the_last_bit(
    total: int, data: st.DataObject, lr: float, floor: float
) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    step = data.draw(st.integers(0, total))
    assert warmup_cosine(step, lr, total, warmup, lr * floor) == chapters(step, total, lr, lr * floor, warmup)


@pytest.mark.parametrize(
    ("step", "printed"), [(0, "0.000003"), (50, "0.000153"), (100, "0.000300"), (500, "0.000176"), (999, "0.000001")]
)
def test_warmup_cosine_at_the_steps_the_chapter_prints(step: int, printed: str) -> None:
    assert f"{warmup_cosine(step, 3e-4, 1_000, 100, 1e-6):.6f}" == printed


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear])
def test_a_warmup_schedule_at_its_ends(schedule) -> None:
    settings = {"lr": 3e-4, "total_steps": 1_000, "warmup_steps": 100, "min_lr": 1e-5}
    assert schedule(0, **settings) == 3e-4 / 100
    assert schedule(99, **settings) == schedule(100, **settings) == 3e-4
    assert schedule(1_000, **settings) == pytest.approx(1e-5)
    assert schedule(5_000, **settings) == schedule(1_000, **settings)
    rates = [schedule(step, **settings) for step in range(1_001)]
    assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a > b for a, b in zip(rates[100:-1], rates[101:], strict=True))
    assert schedule(0, lr=1.0, total_steps=10, warmup_steps=0) == 1.0
    assert schedule(9, lr=1.0, total_steps=10, warmup_steps=10) == 1.0


def test_warmup_linear_is_a_straight_line_to_zero() -> None:
    assert [warmup_linear(step, 1.0, 6, 2) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_constant_is_constant() -> None:
    assert {constant(step, 0.01) for step in (0, 1, 10**9)} == {0.01}


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear])
def test_a_warmup_longer_than_the_run_is_refused(schedule) -> None:
    with pytest.raises(ValueError, match="warmup_steps=11 is longer than the run of total_steps=10; allowed: 0 to 10"):
        schedule(0, 1.0, 10, 11)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"batches": 39, "max_epochs": 50}, 1_950),
        ({"batches": 39, "max_epochs": 50, "max_steps": 100}, 100),
        ({"batches": 39, "max_epochs": -1, "max_steps": 100}, 100),
        ({"batches": 39, "max_epochs": None}, None),
        ({"batches": 39, "max_epochs": -1}, None),
        ({"batches": 6, "max_epochs": 2, "accumulate_grad_batches": 4}, 4),
        ({"batches": 39, "max_epochs": 2, "limit_train_batches": 10}, 20),
        ({"batches": 39, "max_epochs": 2, "limit_train_batches": 100}, 78),
        ({"batches": 39, "max_epochs": 2, "limit_train_batches": 0.5}, 38),
        ({"batches": 39, "max_epochs": 2, "limit_train_batches": None}, 78),
    ],
)
def test_steps_in_run(arguments: dict, steps: int | None) -> None:
    assert steps_in_run(**arguments) == steps
