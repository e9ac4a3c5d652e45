"""PASCAL-Context (Mottaghi et al. 2014): VOC 2010's images, each pixel labelled, 59 classes.

As published for ShelfNet the network has 59 classes and what belongs to none is ignored. Two layouts, below
`VOCdevkit/VOC2010` or the folder given:

- `trainval_merged.json` of PASCAL in Detail with `JPEGImages/`: the recipe's own; masks are drawn from it.
- `SegmentationClassContext/NAME.png` with lists in `ImageSets/SegmentationContext/SPLIT.txt`: masks of
  indices, 0 for the background and 1 to 59 for the classes in the order below (the files for 60 classes,
  and those for 59 that keep 0 free). 255 is ignored too.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import voc
from .dataset import IGNORE, Dataset
from .drawing import Drawing, DrawnDataset, Region, by_image, entry, read_annotations
from .reading import FileDataset, Item, check_split, label_table, read_names

CLASSES = (
    "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle", "building",
    "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain", "dog",
    "door", "fence", "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike",
    "mountain", "mouse", "person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves",
    "sidewalk", "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor",
    "wall", "water", "window", "wood",
)  # fmt: skip
# Of each class, among the 459 that annotators used.
CATEGORIES = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144,
    158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355,
    360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
# The first colour is the background's.
PALETTE = voc.palette(len(CLASSES) + 1)[1:]
SPLITS = ("train", "val")
ANNOTATIONS = "trainval_merged.json"


def pascal_context(root: str | os.PathLike[str], split: str) -> Dataset:
    """PASCAL-Context's 59 classes.

    Args:
        root: `VOC2010`, `VOCdevkit` or the folder above.
        split: "train" or "val".

    Raises:
        ValueError: there is no such split, or the annotations are damaged.
        FileNotFoundError: neither layout is there.
    """
    check_split(split, SPLITS, "PASCAL-Context")
    folder = voc.voc_folder(root, "VOC2010")
    annotations = folder / ANNOTATIONS
    if annotations.is_file():
        return _drawn(folder, annotations, split)
    return _of_indices(folder, split)


def _drawn(folder: Path, path: Path, split: str) -> DrawnDataset:
    content = read_annotations(path, ("images", "annos_segmentation"))
    annotations = by_image(content["annos_segmentation"], path)
    labels = {category: index for index, category in enumerate(CATEGORIES)}
    items, drawings = [], []
    for image in content["images"]:
        if entry(image, "phase", path) != split:
            continue
        regions = [
            Region(entry(one, "id", path), labels[category], entry(one, "segmentation", path))
            for one in annotations.get(entry(image, "image_id", path), ())
            if (category := entry(one, "category_id", path)) in labels
        ]
        file = entry(image, "file_name", path)
        items.append(Item(Path(file).stem, folder / "JPEGImages" / file, path))
        drawings.append(Drawing((entry(image, "height", path), entry(image, "width", path)), IGNORE, regions))
    if not items:
        raise FileNotFoundError(f"{path} has no image of phase {split}")
    return DrawnDataset(items, drawings, CLASSES, PALETTE)


def _of_indices(folder: Path, split: str) -> FileDataset:
    names = folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"{folder} has neither {ANNOTATIONS} nor {names.relative_to(folder)}")
    images, masks = folder / "JPEGImages", folder / "SegmentationClassContext"
    items = [Item(name, images / f"{name}.jpg", masks / f"{name}.png") for name in read_names(names)]
    table = {index + 1: index for index in range(len(CLASSES))} | {0: IGNORE, IGNORE: IGNORE}
    return FileDataset(items, CLASSES, PALETTE, label_table(table))
