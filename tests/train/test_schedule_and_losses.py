"""Learning rate, class weights and loss against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shelfkern.nn import ShelfNetOutput
from shelfkern.train.losses import class_weights, total_loss
from shelfkern.train.schedule import poly_with_warmup

IGNORE = 11


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.01),
        (4, 0.0481967),  # half of the warm-up: 0.05 * 0.96^0.9
        (9, 0.0918622),  # its end: 0.1 * 0.91^0.9
        (10, 0.0909533),
        (50, 0.0535887),
        (99, 0.00158489),  # 0.1 * 0.01^0.9
        (100, 0.0),
    ],
)
def test_poly_with_warmup_by_hand(step: int, rate: float) -> None:
    assert poly_with_warmup(step, 100, 0.1, 10) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup(warmup: int) -> None:
    rates = [poly_with_warmup(step, 8, 2.0, warmup) for step in range(8)]
    assert rates == pytest.approx([2 * (1 - step / 8) ** 0.9 for step in range(8)])


def test_the_rate_rises_then_falls() -> None:
    rates = [poly_with_warmup(step, 4000, 1.5e-3, 200) for step in range(4000)]
    steps = np.diff(rates)
    assert (steps[:199] > 0).all() and (steps[199:] < 0).all()
    assert max(rates) == pytest.approx(1.5e-3 * 0.95025**0.9) and min(rates) > 0


def test_power() -> None:
    assert poly_with_warmup(30, 40, 1.0, 5, power=2.0) == pytest.approx(1 / 16)


def test_class_weights_formula() -> None:
    frequencies = [0.5, 0.3, 0.19, 0.01]
    raw = [1 / math.log(1.1 + frequency) for frequency in frequencies]
    mean = sum(weight * frequency for weight, frequency in zip(raw, frequencies, strict=True))
    weights = class_weights(np.array(frequencies))
    assert weights.dtype is torch.float32
    assert weights.tolist() == pytest.approx([weight / mean for weight in raw], rel=1e-6)
    assert weights.tolist() == sorted(weights.tolist())


def test_an_average_pixel_weighs_one() -> None:
    frequencies = np.array([0.7, 0.2, 0.1, 0.0])
    weights = class_weights(frequencies).double().numpy()
    assert (weights * frequencies).sum() == pytest.approx(1)
    assert np.isfinite(weights).all() and (np.diff(weights) > 0).all()


def some_scores(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(2, 11, 5, 6, generator=generator, requires_grad=True) for _ in range(3)]
    target = torch.randint(0, 11, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < 0.3] = IGNORE
    return scores, target, torch.rand(11, generator=generator) + 0.5


def loss_of(scores: list[Tensor], target: Tensor, weights: Tensor) -> Tensor:
    return total_loss(ShelfNetOutput(scores[0], tuple(scores[1:]), None), target, weights, IGNORE)


def test_total_loss_is_the_sum_of_three_cross_entropies() -> None:
    scores, target, weights = some_scores()
    parts = [F.cross_entropy(s, target, weights, ignore_index=IGNORE) for s in scores]
    loss = loss_of(scores, target, weights)
    assert loss.shape == () and loss.item() == pytest.approx(sum(part.item() for part in parts))
    assert loss.item() > max(part.item() for part in parts)


def cross_entropy_by_hand(scores: Tensor, target: Tensor, weights: Tensor) -> float:
    total = weight = 0.0
    for n, y, x in np.ndindex(*target.shape):
        label = int(target[n, y, x])
        if label != IGNORE:
            values = scores[n, :, y, x].tolist()
            log_sum = math.log(sum(map(math.exp, values)))
            total += weights[label].item() * (log_sum - values[label])
            weight += weights[label].item()
    return total / weight


def test_total_loss_by_hand() -> None:
    scores, target, weights = some_scores(1)
    expected = sum(cross_entropy_by_hand(s, target, weights) for s in scores)
    assert loss_of(scores, target, weights).item() == pytest.approx(expected, rel=1e-5)


def test_ignored_pixels_change_nothing() -> None:
    scores, target, weights = some_scores(2)
    loss = loss_of(scores, target, weights)
    loss.backward()
    is_ignored = (target == IGNORE)[:, None].expand(-1, 11, -1, -1)
    for s in scores:
        assert (s.grad[is_ignored] == 0).all() and (s.grad[~is_ignored] != 0).all()
    others = [torch.where(is_ignored, 100.0, s.detach()) for s in scores]
    assert loss_of(others, target, weights).item() == pytest.approx(loss.item())
