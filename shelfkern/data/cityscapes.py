"""Cityscapes (Cordts et al. 2016): streets of 50 cities, 1024 x 2048, 19 classes.

Layout as published: `leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png` with
`gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png` or `gtCoarse/SPLIT/CITY/NAME_gtCoarse_labelIds.png`, whose
values are the 34 label ids.
"""

from __future__ import annotations

import os
from pathlib import Path

from .dataset import IGNORE
from .reading import FileDataset, Item, check_split, label_table

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
    (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60),
    (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
# Of each class, in the files, and in what the benchmark's server takes.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
NUM_LABEL_IDS = 34
SPLITS = {
    "gtFine": ("train", "val", "trainval", "test"),
    "gtCoarse": ("train", "val", "train_extra"),
}


class Cityscapes(FileDataset):
    """Cityscapes' 19 classes; the other label ids are ignored.

    Args:
        root: the folder that holds `leftImg8bit` and the annotations.
        split: "train", "val", "trainval" or "test", whose masks are not published; of the coarse
            annotations "train", "val" or "train_extra".
        annotations: "gtFine" or "gtCoarse".

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: it holds no images.
    """

    def __init__(self, root: str | os.PathLike[str], split: str, annotations: str = "gtFine") -> None:
        check_split(split, SPLITS[annotations], f"Cityscapes {annotations}")
        parts = ("train", "val") if split == "trainval" else (split,)
        items = [item for part in parts for item in split_items(Path(root), part, annotations)]
        table = {value: IGNORE for value in range(NUM_LABEL_IDS)}
        table |= {value: index for index, value in enumerate(LABEL_IDS)}
        super().__init__(
            items, CLASSES, PALETTE, label_table(table), "give those pixels label ids, not ids to train on"
        )


class CoarseCityscapes(Cityscapes):
    """`Cityscapes` with its coarse annotations."""

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        super().__init__(root, split, "gtCoarse")


def split_items(root: Path, split: str, annotations: str) -> list[Item]:
    """All images of a split, by city and name, and their masks; the test split's files hold none."""
    end = "_leftImg8bit.png"
    folder = root / "leftImg8bit" / split
    images = sorted(folder.glob(f"*/*{end}"))
    if not images:
        raise FileNotFoundError(f"{folder} holds no CITY/NAME{end}, root must be above leftImg8bit")
    items = []
    for image in images:
        name, city = image.name.removesuffix(end), image.parent.name
        mask = root / annotations / split / city / f"{name}_{annotations}_labelIds.png"
        items.append(Item(name, image, None if split == "test" else mask))
    return items
