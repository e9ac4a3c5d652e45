"""CamVid (Brostow, Fauqueur, Cipolla 2009): street scenes filmed from a car, 11 classes, 360 x 480.

Layout: `train/images/NAME.jpg` with `train/labels/NAME.png`, the same under `val/` and `test/`; or that of
the SegNet authors' copy, `train/NAME.png` with `trainannot/NAME.png`. Labels are 8-bit PNGs of class
indices; 11 is unlabelled and ignored.
"""

from __future__ import annotations

import os
from pathlib import Path

from .dataset import IGNORE
from .reading import FileDataset, Item, check_split, images_in, label_table

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree",
    "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PALETTE = (
    (128, 178, 224), (150, 90, 80), (214, 200, 130), (112, 84, 132), (226, 128, 190), (96, 148, 60),
    (240, 210, 40), (110, 120, 130), (30, 70, 190), (222, 40, 50), (0, 150, 160),
)  # fmt: skip
UNLABELLED = 11
SPLITS = ("train", "val", "test")


class CamVid(FileDataset):
    """CamVid's 11 classes; the files' 11 becomes `IGNORE`.

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
        labels = {index: index for index in range(len(CLASSES))} | {UNLABELLED: IGNORE}
        super().__init__(items, CLASSES, PALETTE, label_table(labels), lack=f"{masks} is missing")
