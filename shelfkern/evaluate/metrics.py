"""The confusion matrix of a segmentation, summed image by image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import replacing


class ConfusionMatrix:
    """Pixels by true class (row) and predicted class (column).

    Args:
        num_classes: classes 0 to num_classes - 1; true labels beyond them are ignored.

    Attributes:
        counts: (num_classes, num_classes) int64.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes), np.int64)

    @classmethod
    def of(cls, counts: np.ndarray | Sequence[Sequence[int]]) -> ConfusionMatrix:
        """The matrix with these counts.

        Raises:
            ValueError: they are not a square of integers from 0.
        """
        given = np.asarray(counts)
        if given.ndim != 2 or given.shape[0] != given.shape[1] or given.dtype.kind not in "iu":
            raise ValueError(f"counts is {given.dtype} {given.shape}, it must be a square of integers")
        if given.size and given.min() < 0:
            raise ValueError(f"counts holds {given.min()}, it may hold integers from 0")
        matrix = cls(len(given))
        matrix.counts += given.astype(np.int64)
        return matrix

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

    def merge(self, other: ConfusionMatrix) -> None:
        """Adds the pixels of another matrix.

        Raises:
            ValueError: it is of another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"other has {other.num_classes} classes, it must have {self.num_classes}")
        self.counts += other.counts

    def iou(self) -> np.ndarray:
        """Intersection over union of every class, (num_classes,); NaN for one that never occurs."""
        hits = np.diag(self.counts)
        return _ratio(hits, self.counts.sum(0) + self.counts.sum(1) - hits)

    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        iou = self.iou()
        occurs = ~np.isnan(iou)
        return float(iou[occurs].mean()) if occurs.any() else float("nan")

    def frequency_weighted_iou(self) -> float:
        """Mean of `iou`, each class weighted by its share of the labelled pixels; NaN without any."""
        shares = _ratio(self.counts.sum(1), np.full(self.num_classes, self.counts.sum()))
        return float((shares * np.nan_to_num(self.iou())).sum())

    def precision(self) -> np.ndarray:
        """Share of the pixels found as each class that are of it, (num_classes,); NaN where none are."""
        return _ratio(np.diag(self.counts), self.counts.sum(0))

    def recall(self) -> np.ndarray:
        """Share of each class's pixels that were found, (num_classes,); NaN for one that never is true."""
        return _ratio(np.diag(self.counts), self.counts.sum(1))

    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels whose class was found."""
        return float(np.diag(self.counts).sum() / max(self.counts.sum(), 1))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the counts as .npz, in one step."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, counts=self.counts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConfusionMatrix:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no confusion matrix.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as file:
                return cls.of(file["counts"])
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise their own for damaged files
            raise ValueError(f"{path} holds no confusion matrix: {error}") from error


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
