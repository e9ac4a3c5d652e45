"""The confusion matrix against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from shelfkern.evaluate import ConfusionMatrix

# Rows are what is true: 2 pixels of class 0, 3 of class 1, 1 of class 2; class 3 is absent.
TRUTH = np.array([[0, 0, 1, 1], [1, 2, 9, -1]])
FOUND = np.array([[0, 1, 1, 1], [2, 2, 0, 3]])
COUNTS = [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def matrix_of(truth: np.ndarray, found: np.ndarray, classes: int = 4) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes)
    matrix.update(truth, found)
    return matrix


def test_a_case_by_hand() -> None:
    matrix = matrix_of(TRUTH, FOUND)
    assert matrix.counts.tolist() == COUNTS and matrix.counts.dtype == np.int64
    assert_allclose(matrix.iou(), [1 / 2, 2 / 4, 1 / 2, np.nan])
    assert matrix.mean_iou() == 0.5
    assert matrix.pixel_accuracy() == pytest.approx(4 / 6)


def brute_force(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    counts = np.zeros((classes, classes), int)
    for true, predicted in zip(truth.ravel().tolist(), found.ravel().tolist(), strict=True):
        if 0 <= true < classes:
            counts[true, predicted] += 1
    return counts


def random_labels(seed: int, classes: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(-1, classes + 3, shape)
    truth.flat[0] = 0
    return truth, np.where(generator.random(shape) < 0.5, truth, 0).clip(0, classes - 1)


@pytest.mark.parametrize("shape", [(7,), (9, 11), (3, 5, 4)])
@pytest.mark.parametrize("classes", [1, 2, 11, 19])
def test_against_brute_force(classes: int, shape: tuple[int, ...]) -> None:
    truth, found = random_labels(classes, classes, shape)
    expected = brute_force(truth, found, classes)
    matrix = matrix_of(truth, found, classes)
    assert_array_equal(matrix.counts, expected)
    is_labelled = (truth >= 0) & (truth < classes)
    masks = [(truth == c, (found == c) & is_labelled) for c in range(classes)]
    ious = [(t & f).sum() / (t | f).sum() if (t | f).any() else np.nan for t, f in masks]
    assert_allclose(matrix.iou(), ious)
    assert matrix.mean_iou() == pytest.approx(np.mean([iou for iou in ious if iou == iou]))
    assert matrix.pixel_accuracy() == pytest.approx(np.trace(expected) / expected.sum())


@pytest.mark.parametrize("true_type", [np.uint8, np.int64, np.int32])
@pytest.mark.parametrize("found_type", [np.uint8, np.int64, np.int8])
def test_integer_types(true_type: type, found_type: type) -> None:
    truth, found = TRUTH.clip(0), FOUND
    matrix = matrix_of(truth.astype(true_type), found.astype(found_type))
    assert_array_equal(matrix.counts, brute_force(truth, found, 4))


def test_many_classes_of_a_byte_do_not_overflow() -> None:
    truth = np.arange(256, dtype=np.uint8)
    assert_array_equal(matrix_of(truth, truth[::-1], 256).counts, np.eye(256, dtype=int)[::-1])


@pytest.mark.parametrize("ignored", [4, 11, 255, -1])
def test_ignored_pixels_count_for_nothing(ignored: int) -> None:
    truth, found = np.array([0, 1, ignored, ignored]), np.array([0, 1, 2, 200])
    matrix = matrix_of(truth, found)
    assert matrix.counts.sum() == 2 and matrix.pixel_accuracy() == 1
    assert_allclose(matrix.iou(), [1, 1, np.nan, np.nan])


def test_a_class_that_is_only_found_counts_as_missed() -> None:
    matrix = matrix_of(np.array([0, 0]), np.array([0, 3]))
    assert_allclose(matrix.iou(), [0.5, np.nan, np.nan, 0])
    assert matrix.mean_iou() == 0.25


def test_perfect_and_hopeless() -> None:
    truth = np.array([0, 1, 2, 3, 3])
    perfect, hopeless = matrix_of(truth, truth), matrix_of(truth, (truth + 1) % 4)
    assert (perfect.mean_iou(), perfect.pixel_accuracy()) == (1, 1)
    assert (hopeless.mean_iou(), hopeless.pixel_accuracy()) == (0, 0)


def test_image_by_image_equals_all_at_once() -> None:
    truth, found = random_labels(3, 11, (6, 8, 9))
    whole, streamed = matrix_of(truth, found, 11), ConfusionMatrix(11)
    for image, labels in zip(truth, found, strict=True):
        streamed.update(image, labels)
    assert_array_equal(streamed.counts, whole.counts)
    assert (streamed.mean_iou(), streamed.pixel_accuracy()) == (whole.mean_iou(), whole.pixel_accuracy())
    # Not the mean of the images' own values.
    assert whole.mean_iou() != np.mean(
        [matrix_of(*pair, 11).mean_iou() for pair in zip(truth, found, strict=True)]
    )


def test_an_update_leaves_its_arguments_alone() -> None:
    truth, found = TRUTH.copy(), FOUND.copy()
    matrix_of(truth, found)
    assert_array_equal(truth, TRUTH)
    assert_array_equal(found, FOUND)


def test_nothing_labelled() -> None:
    matrix = matrix_of(np.full((2, 2), 9), np.zeros((2, 2), int))
    assert matrix.counts.sum() == 0 and matrix.pixel_accuracy() == 0
    assert np.isnan(matrix.iou()).all()


@pytest.mark.parametrize("strange", [4, -1, 255])
def test_a_prediction_that_is_no_class(strange: int) -> None:
    matrix = matrix_of(TRUTH, FOUND)
    with pytest.raises(ValueError, match=f"^predicted has the class {strange}, it may be 0 to 3$"):
        matrix.update(np.array([0, 1, 2]), np.array([3, strange, 2]))
    assert matrix.counts.tolist() == COUNTS


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"^predicted is \(3, 2\), truth is \(2, 3\)"):
        ConfusionMatrix(4).update(np.zeros((2, 3), int), np.zeros((3, 2), int))
