"""COCO (Lin et al. 2014) with VOC's 20 classes, to train on before VOC as published.

Layout as published: `annotations/instances_train2017.json` and `train2017/NAME.jpg` (or `images/train2017`),
the same with val and with 2014. Polygons and run lengths are drawn here, the first annotation over later
ones; crowds are ignored where nothing else is. Of images with few labelled pixels nothing is learned: those
below 1000 are left out, as published.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import voc
from .dataset import IGNORE
from .drawing import Drawing, DrawnDataset, Region, by_image, entry, paint, read_annotations
from .reading import Item, check_split, find_folder

SPLITS = ("train", "val")
YEARS = ("2017", "2014")
# COCO's category of each of VOC's classes, the background aside.
CATEGORIES = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
LABELS = {category: index + 1 for index, category in enumerate(CATEGORIES)}
LEAST_LABELLED = 1000


class COCO(DrawnDataset):
    """COCO with VOC's classes. Opening draws masks, to count their pixels: a minute or two of
    train2017.

    Args:
        root: the folder that holds `annotations` and the images.
        split: "train" or "val", of 2017 where it is there, of 2014 otherwise.

    Raises:
        ValueError: there is no such split, or the annotations are damaged.
        FileNotFoundError: the annotations or the folder of images are not there, or no image is left.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        check_split(split, SPLITS, "COCO")
        path, images = _files(Path(root), split)
        content = read_annotations(path, ("images", "annotations"))
        wanted = [one for one in content["annotations"] if entry(one, "category_id", path) in LABELS]
        annotations = by_image(wanted, path)
        items, drawings = [], []
        for image in content["images"]:
            drawing = drawing_of(image, annotations.get(entry(image, "id", path), ()), path)
            if drawing:
                file = entry(image, "file_name", path)
                items.append(Item(Path(file).stem, images / file, path))
                drawings.append(drawing)
        if not items:
            raise FileNotFoundError(f"{path} has no image with {LEAST_LABELLED} pixels of VOC's classes")
        super().__init__(items, drawings, voc.CLASSES, voc.PALETTE)


def _files(root: Path, split: str) -> tuple[Path, Path]:
    """The annotations of a split, and the folder of its images."""
    paths = [root / "annotations" / f"instances_{split}{year}.json" for year in YEARS]
    for path, year in zip(paths, YEARS, strict=True):
        if path.is_file():
            return path, find_folder(root, ("", "images"), f"{split}{year}") / f"{split}{year}"
    raise FileNotFoundError(f"{' and '.join(map(str, paths))} are missing, root must be above annotations")


def drawing_of(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], path: Path
) -> Drawing | None:
    """An image's mask; None for one with few labelled pixels."""
    crowds: list[Region] = []
    things: list[Region] = []
    for one in reversed(annotations):
        crowd = bool(one.get("iscrowd"))
        label = IGNORE if crowd else LABELS[one["category_id"]]
        region = Region(entry(one, "id", path), label, entry(one, "segmentation", path))
        (crowds if crowd else things).append(region)
    size = (entry(image, "height", path), entry(image, "width", path))
    return Drawing(size, 0, crowds + things) if _is_labelled(size, things) else None


def _is_labelled(size: tuple[int, int], regions: Sequence[Region]) -> bool:
    """Whether regions cover enough pixels, drawing no more of them than it takes to know."""
    covered = np.zeros(size, np.uint8)
    for region in regions:
        try:
            paint(covered, region.segmentation, 1)
        except (TypeError, ValueError):
            # Drawn again and refused by name when it is read: `check` finds it, and the others can be had.
            return True
        if np.count_nonzero(covered) >= LEAST_LABELLED:
            return True
    return False
