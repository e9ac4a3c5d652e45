"""CamVid (Brostow, Fauqueur, Cipolla 2009): street scenes filmed from a car, 11 classes, 360 x 480.

Layout: `train/images/NAME.jpg` with `train/labels/NAME.png`, the same under `val/` and `test/`; or that of
the SegNet authors' copy, `train/NAME.png` with `trainannot/NAME.png`. Labels are 8-bit PNGs of class
indices; 11 is unlabelled and ignored.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image

from . import dataset
from .reading import FileDataset, Item, check_split, images_in, label_table

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PALETTE = (
    (128, 178, 224), (150, 90, 80), (214, 200, 130), (112, 84, 132), (226, 128, 190), (96, 148, 60),
    (240, 210, 40), (110, 120, 130), (30, 70, 190), (222, 40, 50), (0, 150, 160),
)  # fmt: skip
IGNORE = 11
SPLITS = ("train", "val", "test")


class CamVid(FileDataset):
    """CamVid's 11 classes; the files' 11 becomes `dataset.IGNORE`.

    Args:
        root: the folder that holds the splits.
        split: "train", "val" or "test"; without masks where there is no folder of labels.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: it holds no images.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        check_split(split, SPLITS, "CamVid")
        folder = Path(root) / split
        images, masks = folder / "images", folder / "labels"
        if not images.is_dir() and folder.with_name(f"{split}annot").is_dir():
            images, masks = folder, folder.with_name(f"{split}annot")
        labelled = split != "test" or masks.is_dir()
        items = [
            Item(image.stem, image, masks / f"{image.stem}.png" if labelled else None)
            for image in images_in(images)
        ]
        labels = {index: index for index in range(len(CLASSES))} | {IGNORE: dataset.IGNORE}
        super().__init__(items, CLASSES, PALETTE, label_table(labels))


@dataclasses.dataclass(frozen=True)
class Frame:
    """One street scene: an RGB image and its mask (mode L) of class indices, both in memory."""

    name: str
    image: Image.Image
    mask: Image.Image


def load_split(root: str | os.PathLike[str], split: str) -> list[Frame]:
    """All frames of "train" or "val", decoded, by name.

    Raises:
        FileNotFoundError: the folder holds no images, or a mask is missing.
        ValueError: a mask has another size than its image, is not of indices, or holds an unknown index.
    """
    folder = Path(root) / split
    images = sorted((folder / "images").glob("*.jpg"))
    if not images:
        raise FileNotFoundError(f"{folder / 'images'} holds no .jpg, data must be CamVid's root folder")
    return [_load_frame(image, folder / "labels" / f"{image.stem}.png") for image in images]


def _load_frame(image_path: Path, mask_path: Path) -> Frame:
    if not mask_path.is_file():
        raise FileNotFoundError(f"{mask_path} is missing, {image_path.name} needs it")
    with Image.open(image_path) as file:
        image = file.convert("RGB")
    with Image.open(mask_path) as file:
        mask = file.copy()
    check_mask(mask, image.size, mask_path)
    # A palette image's pixels are the indices; converting it would give their colours.
    return Frame(image_path.stem, image, Image.fromarray(np.asarray(mask)))


def check_mask(mask: Image.Image, size: tuple[int, int], path: Path) -> None:
    """Raises ValueError unless the mask holds one class index, or `IGNORE`, for every pixel of an image."""
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{path} is of mode {mask.mode}, it must hold class indices: save it as 8-bit grey")
    if mask.size != size:
        raise ValueError(f"{path} is {mask.size[0]} x {mask.size[1]}, its image {size[0]} x {size[1]}")
    largest = int(np.asarray(mask).max())
    if largest > IGNORE:
        raise ValueError(
            f"{path} holds the index {largest}, it may hold 0 to {IGNORE}, {IGNORE} for unlabelled"
        )


def class_frequencies(frames: list[Frame]) -> np.ndarray:
    """Share of the labelled pixels of each class, (11,) float64."""
    counts = np.zeros(IGNORE + 1, np.int64)
    for frame in frames:
        counts += np.bincount(np.asarray(frame.mask).ravel(), minlength=IGNORE + 1)
    return counts[:IGNORE] / counts[:IGNORE].sum()
