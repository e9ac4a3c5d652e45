"""What training and evaluation know of a data set, whatever its files are like."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

# The label that counts for nothing, in every data set's masks, whatever the files hold.
IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Sample:
    """An RGB image and its mask (mode L, of the same size) of class indices or `IGNORE`, both in memory."""

    name: str
    image: Image.Image
    mask: Image.Image


class Dataset(Protocol):
    """Labelled images in a fixed order, read from their files when asked for. Can be pickled.

    Attributes:
        classes: what the indices 0 to len(classes) - 1 mean.
        palette: an RGB colour for each class.
        names: of every sample, each once; what predictions are called after, and may hold "/".
        labelled: False for test data without masks; the masks are then `IGNORE` everywhere.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def palette(self) -> tuple[Colour, ...]: ...

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labelled(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Reads a sample.

        Raises:
            IndexError: there is none of that index.
            OSError: a file is missing or cannot be decoded.
            ValueError: the mask does not fit its image, or holds what is no label.
        """
        ...

    def mask(self, index: int) -> Image.Image:
        """A sample's mask alone, checked as well, without the time to decode its image."""
        ...


def check_labelled(dataset: Dataset, name: str, split: str) -> None:
    """Refuses a data set without masks, from which nothing is learned and by which nothing is measured.

    Args:
        name, split: the field of a recipe that names the split, and its value.

    Raises:
        ValueError: it is one.
    """
    if not dataset.labelled:
        lack = getattr(dataset, "lack", "it is test data")
        raise ValueError(f"{name} is {split!r}, which has no masks: {lack}")


def class_frequencies(dataset: Dataset) -> np.ndarray:
    """Share of the labelled pixels of each class, (classes,) float64. Reads every mask.

    Raises:
        ValueError: no pixel is labelled.
    """
    count = len(dataset.classes)
    pixels = np.zeros(256, np.int64)
    for index in range(len(dataset)):
        pixels += np.asarray(dataset.mask(index).histogram())
    labelled = pixels[:count].sum()
    if not labelled:
        raise ValueError("dataset has no labelled pixel, class frequencies need masks with classes in them")
    return pixels[:count] / labelled


def check(dataset: Dataset) -> list[str]:
    """Reads all of a data set; gives a sentence for every sample that cannot be trained on."""
    problems = []
    for index in range(len(dataset)):
        try:
            dataset[index]
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return problems
