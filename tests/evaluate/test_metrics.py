"""The confusion matrix against counting by hand."""

from __future__ import annotations

from pathlib import Path

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


def test_the_other_figures_by_hand() -> None:
    matrix = matrix_of(TRUTH, FOUND)
    assert_allclose(matrix.precision(), [1, 2 / 3, 1 / 2, np.nan])
    assert_allclose(matrix.recall(), [1 / 2, 2 / 3, 1, np.nan])
    # IoUs 1/2 of 2, 3 and 1 of 6 pixels.
    assert matrix.frequency_weighted_iou() == pytest.approx(0.5)
    uneven = ConfusionMatrix.of([[6, 2], [1, 1]])
    assert uneven.frequency_weighted_iou() == pytest.approx(0.8 * 6 / 9 + 0.2 * 1 / 4)


def test_a_class_that_is_only_found_or_only_true() -> None:
    matrix = matrix_of(np.array([0, 0, 1]), np.array([0, 3, 0]))
    assert_allclose(matrix.precision(), [1 / 2, np.nan, np.nan, 0])
    assert_allclose(matrix.recall(), [1 / 2, 0, np.nan, np.nan])
    assert matrix.frequency_weighted_iou() == pytest.approx(2 / 3 * 1 / 3)


def test_nothing_labelled_has_no_figures() -> None:
    matrix = ConfusionMatrix(3)
    assert np.isnan(matrix.mean_iou()) and np.isnan(matrix.frequency_weighted_iou())
    assert np.isnan(matrix.precision()).all() and np.isnan(matrix.recall()).all()


def test_merging_is_counting_both() -> None:
    truth, found = random_labels(5, 11, (2, 8, 9))
    one, other = (matrix_of(*pair, 11) for pair in zip(truth, found, strict=True))
    before = other.counts.copy()
    one.merge(other)
    assert_array_equal(one.counts, matrix_of(truth, found, 11).counts)
    assert_array_equal(other.counts, before)
    with pytest.raises(ValueError, match=r"^other has 4 classes, it must have 11$"):
        one.merge(ConfusionMatrix(4))


def test_counts_that_exceed_32_bits() -> None:
    matrix = ConfusionMatrix.of([[2**40, 1], [0, 2**41]])
    matrix.merge(matrix)
    assert matrix.counts.tolist() == [[2**41, 2], [0, 2**42]]


def test_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "matrix.npz"
    ConfusionMatrix(2).save(path)
    matrix_of(TRUTH, FOUND).save(path)
    loaded = ConfusionMatrix.load(path)
    assert loaded.counts.tolist() == COUNTS and loaded.counts.dtype == np.int64
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.npz"]
    with pytest.raises(FileNotFoundError):
        ConfusionMatrix.load(tmp_path / "missing.npz")


def test_files_of_something_else(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    matrix_of(TRUTH, FOUND).save(good)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "text.npz").write_text("not a matrix")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "other.npz", other=np.zeros((2, 2), int))
    np.savez(tmp_path / "real.npz", counts=np.zeros((2, 2)))
    np.savez(tmp_path / "object.npz", counts=np.array([[{}]], object))
    np.save(tmp_path / "array.npz.npy", np.zeros((2, 2), int))
    for path in set(tmp_path.iterdir()) - {good}:
        with pytest.raises(ValueError, match=f"^{path} holds no confusion matrix"):
            ConfusionMatrix.load(path)


@pytest.mark.parametrize("counts", [[[1, 2]], [[1.0]], [[-1]], [1], [[True]]])
def test_what_are_no_counts(counts: list[object]) -> None:
    with pytest.raises(ValueError, match=r"^counts "):
        ConfusionMatrix.of(counts)
