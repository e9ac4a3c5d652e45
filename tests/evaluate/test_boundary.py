"""The boundary F1 score on cases drawn by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from shelfkern.evaluate import BoundaryF1

pytest.importorskip("scipy")


def scored(truth: np.ndarray, found: np.ndarray, pixels: float, classes: int = 3) -> BoundaryF1:
    """The score of one image with a tolerance of so many pixels."""
    score = BoundaryF1(classes, pixels * (1 + 1e-9) / math.hypot(*truth.shape))
    score.update(truth, found)
    return score


def halves(edge: int, height: int = 8, width: int = 20) -> np.ndarray:
    """Class 0 left of a column, class 1 from it on."""
    return np.repeat((np.arange(width) >= edge).astype(np.uint8)[None], height, 0)


def square(top: int, left: int, side: int = 6, size: int = 20) -> np.ndarray:
    labels = np.zeros((size, size), np.uint8)
    labels[top : top + side, left : left + side] = 1
    return labels


def test_a_perfect_prediction() -> None:
    for truth in (halves(7), square(3, 4)):
        score = scored(truth, truth, 0.5)
        assert_allclose(score.f1(), [1, 1, np.nan])
        assert score.mean() == 1


@pytest.mark.parametrize(("shift", "pixels", "expected"), [(1, 0.99, 0), (1, 1, 1), (3, 2.9, 0), (3, 3, 1)])
def test_a_shifted_edge_is_found_within_the_tolerance(shift: int, pixels: float, expected: float) -> None:
    for shifted in (halves(7 + shift), halves(7 - shift)):
        assert_allclose(scored(halves(7), shifted, pixels).f1(), [expected, expected, np.nan])


def test_distance_is_euclidean() -> None:
    # The square's outer corner is sqrt(2) away, its sides 1: only the corners of class 0 are missed.
    truth, found = square(8, 8, 1), square(9, 9, 1)
    assert scored(truth, found, 1.4).f1()[1] == 0
    assert scored(truth, found, 1.42).f1()[1] == 1


def test_precision_and_recall_by_hand() -> None:
    # Class 1 is truly a column of 8 pixels; found are the upper 4 of it and a dot of one pixel far away.
    truth = np.zeros((8, 20), np.uint8)
    truth[:, 5] = 1
    found = np.zeros_like(truth)
    found[:4, 5] = found[2, 15] = 1
    precision, recall = 4 / 5, 4 / 8
    assert scored(truth, found, 0.5).f1()[1] == pytest.approx(2 * precision * recall / (precision + recall))


def test_a_pixel_is_on_the_boundary_by_its_four_neighbours() -> None:
    # Of class 0 the four pixels around a dot: one found dot of two leaves 4 of 8, all of them right.
    truth = np.zeros((9, 9), np.uint8)
    truth[2, 2] = truth[6, 6] = 1
    found = np.zeros_like(truth)
    found[2, 2] = 1
    assert_allclose(scored(truth, found, 0.5).f1()[:2], [2 / 3, 2 / 3])


def test_a_class_that_is_missed_scores_0_and_one_too_many_nothing() -> None:
    truth, found = halves(7), np.where(halves(7) == 1, 2, 0)
    score = scored(truth, found, 1)
    assert_allclose(score.f1(), [1, 0, np.nan])
    assert_array_equal(score.images, [1, 1, 0])


def test_an_image_of_one_class_counts_only_where_another_is_found() -> None:
    whole = np.zeros((8, 20), np.uint8)
    assert_array_equal(scored(whole, whole, 1).images, [0, 0, 0])
    score = scored(whole, halves(7), 1)
    assert_array_equal(score.images, [1, 0, 0])
    assert score.f1()[0] == 0
    assert math.isnan(scored(whole, whole, 1).mean())


def test_ignored_pixels_hide_boundaries_of_both() -> None:
    truth, found = halves(7), halves(12)
    truth[:, 5:14] = 255
    score = scored(truth, found, 1)
    # Both edges lie where the truth is unknown, and the ignored strip's own edges are none.
    assert_array_equal(score.images, [0, 0, 0])
    truth[:4, 5:14] = halves(7)[:4, 5:14]
    # The upper half is known again: a recall and a precision of 0 there.
    assert_allclose(scored(truth, found, 1).f1()[:2], [0, 0])
    assert_allclose(scored(truth, found, 5).f1()[:2], [1, 1])


@pytest.mark.parametrize("ignored", [-1, 3, 255])
def test_any_label_beyond_the_classes_is_ignored(ignored: int) -> None:
    truth = halves(7).astype(np.int64)
    truth[:, 14:] = ignored
    assert_allclose(scored(truth, halves(7).astype(np.int64), 0.5).f1(), [1, 1, np.nan])


def brute_force(truth: np.ndarray, found: np.ndarray, label: int, reach: float) -> float:
    """The score of one class by comparing all boundary pixels with all."""

    def boundary(labels: np.ndarray) -> list[tuple[int, int]]:
        height, width = labels.shape
        points = []
        for row in range(height):
            for column in range(width):
                around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
                inside = [(y, x) for y, x in around if 0 <= y < height and 0 <= x < width and truth[y, x] < 3]
                differs = any(labels[y, x] != label for y, x in inside)
                if truth[row, column] < 3 and labels[row, column] == label and differs:
                    points.append((row, column))
        return points

    def share(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        near = [min(math.hypot(y - v, x - u) for v, u in others) <= reach for y, x in points]
        return sum(near) / len(near)

    true, guessed = boundary(truth), boundary(found)
    precision, recall = share(guessed, true), share(true, guessed)
    return 2 * precision * recall / (precision + recall)


def test_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    score = BoundaryF1(3, 0.05)
    expected = []
    for height, width in ((12, 30), (20, 15), (9, 17)):
        truth = (
            generator.choice(np.array([0, 1, 2, 255], np.uint8), (height // 3, width // 3))
            .repeat(3, 0)
            .repeat(3, 1)
        )
        found = np.where(generator.random(truth.shape) < 0.8, truth, 0) % 255
        score.update(truth, found)
        expected.append(
            [brute_force(truth, found, label, 0.05 * math.hypot(*truth.shape)) for label in range(3)]
        )
    assert_allclose(score.f1(), np.mean(expected, 0))
    assert score.mean() == pytest.approx(np.mean(expected))
    assert 0.1 < score.mean() < 0.95


def test_the_default_tolerance() -> None:
    # 0.75 % of the diagonal of 300 x 400 pixels are 3.75.
    truth = halves(200, 300, 400)
    score = BoundaryF1(2)
    score.update(truth, halves(203, 300, 400))
    assert_allclose(score.f1(), [1, 1])
    score.update(truth, halves(204, 300, 400))
    assert_allclose(score.f1(), [0.5, 0.5])


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"^predicted is \(3, 2\), truth is \(2, 3\): both must be one \(H, W\)$"
    ):
        BoundaryF1(4).update(np.zeros((2, 3), int), np.zeros((3, 2), int))


def test_without_scipy(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.spatial", None)
    with pytest.raises(RuntimeError, match=r"^boundary F1 needs scipy: pip install 'shelfkern\[train\]'$"):
        BoundaryF1(2).update(halves(7), halves(7))
