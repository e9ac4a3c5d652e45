"""The boundary F1 score (Csurka, Larlus, Perronnin 2013): how well the outlines of classes are met."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class BoundaryF1:
    """Boundary F1 of every class, averaged over the images in which the class occurs.

    A pixel is on the boundary of its class if one of its four neighbours has another class. Of one image
    and class, precision is the share of predicted boundary pixels that lie within the tolerance of a true
    one, recall the share of true ones within the tolerance of a predicted one, by Euclidean distance
    between pixel centres. A class that is missed, or found without any boundary, scores 0 there; an image
    that it fills in truth and prediction does not count for it. Predicted classes that the truth lacks do
    not count either: they cost precision in the confusion matrix.

    Ignored pixels are of no class, in the prediction too, and nothing borders on them: what they hide
    is no boundary.

    Args:
        num_classes: classes 0 to num_classes - 1; true labels beyond them are ignored.
        tolerance: as a fraction of the image's diagonal.

    Attributes:
        sums: of the F1 scores of every class, (num_classes,) float64.
        images: that count for every class, (num_classes,) int64.
    """

    def __init__(self, num_classes: int, tolerance: float = 0.0075) -> None:
        self.num_classes = num_classes
        self.tolerance = tolerance
        self.sums = np.zeros(num_classes)
        self.images = np.zeros(num_classes, np.int64)

    def update(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Adds one image: integer arrays (H, W).

        Raises:
            ValueError: they are not two-dimensional and of one shape.
            RuntimeError: scipy is missing.
        """
        if truth.ndim != 2 or truth.shape != predicted.shape:
            raise ValueError(
                f"predicted is {predicted.shape}, truth is {truth.shape}: both must be one (H, W)"
            )
        labelled = (truth >= 0) & (truth < self.num_classes)
        true, found = (_points(labels, labelled) for labels in (truth, predicted))
        reach = self.tolerance * math.hypot(*truth.shape)
        for label in np.unique(truth[labelled]).tolist():
            score = _f1(true.get(label), found.get(label), reach)
            if score is not None:
                self.sums[label] += score
                self.images[label] += 1

    def f1(self) -> np.ndarray:
        """The mean score of every class, (num_classes,); NaN for one that never counts."""
        return np.divide(self.sums, self.images, out=np.full(self.num_classes, np.nan), where=self.images > 0)

    def mean(self) -> float:
        """Mean of `f1` over the classes that count; NaN if none does."""
        counts = self.images > 0
        return float(self.f1()[counts].mean()) if counts.any() else float("nan")


def _points(labels: np.ndarray, labelled: np.ndarray) -> dict[int, np.ndarray]:
    """(row, column) of the boundary pixels of each class that has any."""
    on_boundary = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        count = labels.shape[axis]
        before, after = (
            (np.s_[: count - 1], np.s_[1:]) if axis == 0 else (np.s_[:, : count - 1], np.s_[:, 1:])
        )
        differ = (labels[before] != labels[after]) & labelled[before] & labelled[after]
        on_boundary[before] |= differ
        on_boundary[after] |= differ
    points = np.argwhere(on_boundary)
    classes = labels[on_boundary]
    return {int(label): points[classes == label] for label in np.unique(classes)}


def _f1(true: np.ndarray | None, found: np.ndarray | None, reach: float) -> float | None:
    """The score of one class in one image; None where neither has a boundary."""
    if true is None and found is None:
        return None
    if true is None or found is None:
        return 0.0
    precision, recall = _share_near(found, true, reach), _share_near(true, found, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_near(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    """Share of points within `reach` of one of the others."""
    # The bound, exclusive, ends searches early: outlines are sparse, and most points have a neighbour near.
    distances, _ = kd_tree()(others).query(points, distance_upper_bound=np.nextafter(reach, np.inf))
    return float((distances <= reach).mean())


def kd_tree() -> Any:
    """scipy's cKDTree.

    Raises:
        RuntimeError: scipy is missing.
    """
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        raise RuntimeError("boundary F1 needs scipy: pip install 'shelfkern[train]'") from None
    return cKDTree
