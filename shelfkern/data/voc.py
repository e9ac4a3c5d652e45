"""PASCAL VOC 2012 (Everingham et al. 2010), and the same with the masks of SBD (Hariharan et al. 2011).

Layouts are those of the archives as published. VOC: `VOCdevkit/VOC2012/` with `JPEGImages/NAME.jpg`,
`SegmentationClass/NAME.png` (palette images of indices, 255 along the borders of objects) and
`ImageSets/Segmentation/SPLIT.txt`. SBD: `benchmark_RELEASE/dataset/` with `img/NAME.jpg`, `cls/NAME.mat`
and lists of names.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from .dataset import IGNORE, Colour
from .reading import FileDataset, Item, check_split, find_folder, label_table, read_indices, read_names

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval", "test")
AUGMENTED_SPLITS = ("train_aug", "trainval_aug", "train_noval", "val")


def palette(count: int) -> tuple[Colour, ...]:
    """VOC's colours: an index's bits 0, 3, 6 are the highest of red, bits 1, 4, 7 of green, 2, 5 of blue."""
    return tuple((_spread(index), _spread(index >> 1), _spread(index >> 2)) for index in range(count))


def _spread(index: int) -> int:
    return sum((index >> 3 * bit & 1) << 7 - bit for bit in range(3))


PALETTE = palette(len(CLASSES))
TABLE = label_table({index: index for index in range(len(CLASSES))} | {IGNORE: IGNORE})


class VOC(FileDataset):
    """VOC 2012's 20 classes and the background.

    Args:
        root: `VOC2012`, `VOCdevkit` or the folder above.
        split: "train", "val", "trainval", or "test", which has no masks.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the folder or its list of the split is not there.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        check_split(split, SPLITS, "VOC 2012")
        folder = voc_folder(root)
        names = split_names(folder, split)
        super().__init__(voc_items(folder, names, split != "test"), CLASSES, PALETTE, TABLE)


class AugmentedVOC(FileDataset):
    """VOC 2012 with masks of SBD for the training images that VOC has none for: 10 582 in all.

    Args:
        root: the folder above `VOCdevkit` and SBD's `benchmark_RELEASE`, `dataset` or `sbd`.
        split: "train_aug" is all of SBD and VOC's train without VOC's val, VOC's own masks where there are
            such; "trainval_aug" the same with VOC's val, 12 031, for its test server; "train_noval" is
            SBD's list of that name, masks too; "val" is VOC's.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: a folder or a list is not there.
        ImportError: SciPy, which reads SBD's masks, is not installed.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        check_split(split, AUGMENTED_SPLITS, "augmented VOC")
        if split == "val":
            folder = voc_folder(root)
            items = voc_items(folder, split_names(folder, "val"))
        else:
            items = self._training_items(root, split)
        super().__init__(items, CLASSES, PALETTE, TABLE)

    @staticmethod
    def _training_items(root: str | os.PathLike[str], split: str) -> list[Item]:
        _scipy_io()
        folder = find_folder(root, ("benchmark_RELEASE/dataset", "dataset", "sbd", ""), "cls")
        if split == "train_noval":
            return sbd_items(folder, read_names(folder / "train_noval.txt"))
        voc = voc_folder(root)
        own = split_names(voc, split.removesuffix("_aug"))
        others = set(read_names(folder / "train.txt")) | set(read_names(folder / "val.txt"))
        others -= set(own) | set(split_names(voc, "val"))
        items = voc_items(voc, own) + sbd_items(folder, sorted(others))
        return sorted(items, key=lambda item: item.name)

    def raw(self, path: Path) -> np.ndarray:
        return read_sbd(path) if path.suffix == ".mat" else read_indices(path)


def voc_folder(root: str | os.PathLike[str], year: str = "VOC2012") -> Path:
    """The folder of a year, at, in, or two below `root`."""
    return find_folder(root, ("", year, f"VOCdevkit/{year}"), "JPEGImages")


def split_names(folder: Path, split: str) -> list[str]:
    return read_names(folder / "ImageSets" / "Segmentation" / f"{split}.txt")


def voc_items(folder: Path, names: list[str], labelled: bool = True) -> list[Item]:
    images, masks = folder / "JPEGImages", folder / "SegmentationClass"
    return [Item(name, images / f"{name}.jpg", masks / f"{name}.png" if labelled else None) for name in names]


def sbd_items(folder: Path, names: list[str]) -> list[Item]:
    return [Item(name, folder / "img" / f"{name}.jpg", folder / "cls" / f"{name}.mat") for name in names]


def read_sbd(path: Path) -> np.ndarray:
    """The class indices of SBD's masks, (H, W) uint8: `GTcls.Segmentation` of a MATLAB file.

    Raises:
        OSError: it is missing or cannot be decoded.
        ValueError: it is no mask.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = _scipy_io().loadmat(path, squeeze_me=True, struct_as_record=False)
    except Exception as error:
        # SciPy has as many kinds of error as there are ways to be damaged.
        raise OSError(f"{path} cannot be decoded, it may be damaged: {error}") from error
    mask = getattr(content.get("GTcls"), "Segmentation", None)
    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"{path} has no uint8 matrix GTcls.Segmentation, it must be of SBD's folder cls")
    return mask


def _scipy_io():  # type: ignore[no-untyped-def]
    try:
        import scipy.io
    except ImportError:
        raise ImportError("SBD's masks need SciPy: pip install 'shelfkern[train]'") from None
    return scipy.io
