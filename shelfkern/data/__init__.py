"""Data sets and augmentation."""

from __future__ import annotations

import os
from collections.abc import Callable

from .camvid import CamVid
from .cityscapes import Cityscapes, CoarseCityscapes
from .coco import COCO
from .context import pascal_context
from .dataset import IGNORE, Dataset, Sample, check, class_frequencies
from .folder import Folder
from .voc import VOC, AugmentedVOC

DATASETS: dict[str, Callable[[str | os.PathLike[str], str], Dataset]] = {
    "voc": VOC,
    "voc_aug": AugmentedVOC,
    "context": pascal_context,
    "coco": COCO,
    "cityscapes": Cityscapes,
    "cityscapes_coarse": CoarseCityscapes,
    "camvid": CamVid,
    "folder": Folder,
}


def open_dataset(name: str, root: str | os.PathLike[str], split: str) -> Dataset:
    """The data set of a name, one of `DATASETS`, in the folder where its publisher's files lie.

    Raises:
        ValueError: there is no data set of that name, or it has no such split.
        FileNotFoundError: the files are not there.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}, it may be {', '.join(DATASETS)}")
    return DATASETS[name](root, split)


__all__ = ["DATASETS", "IGNORE", "Dataset", "Sample", "check", "class_frequencies", "open_dataset"]
