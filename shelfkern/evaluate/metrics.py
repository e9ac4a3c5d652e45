"""The confusion matrix of a segmentation, summed image by image."""

from __future__ import annotations

import numpy as np


class ConfusionMatrix:
    """Pixels by true class (row) and predicted class (column).

    Args:
        num_classes: classes 0 to num_classes - 1; true labels beyond them are ignored.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    def update(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Adds images: integer arrays of one shape.

        Raises:
            ValueError: the shapes differ, or a prediction is no class.
        """
        if truth.shape != predicted.shape:
            raise ValueError(f"predicted is {predicted.shape}, truth is {truth.shape}: they must be alike")
        labelled = (truth >= 0) & (truth < self.num_classes)
        true, found = truth[labelled].astype(np.int64), predicted[labelled].astype(np.int64)
        strange = found[(found < 0) | (found >= self.num_classes)]
        if strange.size:
            raise ValueError(f"predicted has the class {strange[0]}, it may be 0 to {self.num_classes - 1}")
        pairs = np.bincount(true * self.num_classes + found, minlength=self.num_classes**2)
        self.counts += pairs.reshape(self.num_classes, self.num_classes)

    def iou(self) -> np.ndarray:
        """Intersection over union of every class, (num_classes,); NaN for one that never occurs."""
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return np.divide(hits, union, out=np.full(self.num_classes, np.nan), where=union > 0)

    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(np.nanmean(self.iou()))

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class was found."""
        return float(np.diag(self.counts).sum() / max(self.counts.sum(), 1))
