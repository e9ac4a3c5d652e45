"""The learning rate against its formulas."""

from __future__ import annotations

import numpy as np
import pytest

from shelfkern.train.recipe import Schedule
from shelfkern.train.schedule import factor


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.1),
        (4, 0.481967),  # half of the warm-up: 0.5 * 0.96^0.9
        (9, 0.918622),  # its end: 0.91^0.9
        (10, 0.909533),
        (50, 0.535887),
        (99, 0.0158489),  # 0.01^0.9
        (100, 0.0),
    ],
)
def test_linear_warmup_by_hand(step: int, expected: float) -> None:
    assert factor(step, 100, Schedule(warmup=10)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "step, expected",
    [(0, 1e-3), (5, 1e-3**0.5), (9, 1e-3**0.1), (10, 1.0), (55, 0.5**0.9), (99, (1 / 90) ** 0.9)],
)
def test_exponential_warmup_by_hand(step: int, expected: float) -> None:
    schedule = Schedule(warmup=10, warmup_shape="exponential", warmup_from=1e-3)
    assert factor(step, 100, schedule) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup(warmup: int) -> None:
    rates = [factor(step, 8, Schedule(warmup=warmup)) for step in range(8)]
    assert rates == pytest.approx([(1 - step / 8) ** 0.9 for step in range(8)])


@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_the_rate_rises_then_falls(shape: str) -> None:
    schedule = Schedule(warmup=200, warmup_shape=shape)
    rates = [factor(step, 4000, schedule) for step in range(4000)]
    steps = np.diff(rates)
    assert (steps[:199] > 0).all() and (steps[200:] < 0).all()
    assert 0.94 < max(rates) <= 1 and min(rates) > 0


def test_power() -> None:
    assert factor(30, 40, Schedule(power=2.0, warmup=5)) == pytest.approx(1 / 16)


def test_a_warmup_as_long_as_the_run() -> None:
    schedule = Schedule(warmup=4, warmup_shape="exponential")
    assert all(0 < factor(step, 4, schedule) <= 1 for step in range(4))
