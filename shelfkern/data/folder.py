"""Images and masks of one's own, in folders or listed in CSV files.

The root holds the label map, `labels.toml` or `labels.json` (see `labelmap`), and the splits.

A split SPLIT is `SPLIT.csv`, with lines of an image and its mask, relative to it; or the folders
`SPLIT/images` and `SPLIT/masks`, with files of the same names but for the suffix. The split "all" is
`images` and `masks` of the root itself; a root that is a CSV file has "all" alone, and the map lies beside
it. Without masks, in a CSV file with lines of images alone, it is test data.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import IGNORE
from .labelmap import find_map, labels_of_colours, read_label_map
from .reading import (
    IMAGE_SUFFIXES,
    FileDataset,
    Item,
    check_size,
    decoded,
    images_in,
    indices_of,
    label_table,
    labels_of,
)

WHOLE = "all"


class Folder(FileDataset):
    """A data set of one's own.

    Args:
        root: the folder of the label map and the splits, or a CSV file.
        split: one of those there.

    Raises:
        ValueError: there is no such split, or the label map or the CSV file is wrong.
        FileNotFoundError: there is no label map, or the split holds no images.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        root = Path(root)
        folder = root.parent if root.suffix.lower() == ".csv" else root
        self.map = read_label_map(find_map(folder))
        items, lack = _items(root, split)
        super().__init__(
            items,
            self.map.classes,
            self.map.palette,
            label_table({IGNORE: IGNORE} | dict(self.map.values)),
            f"add it to {self.map.path}",
            lack,
        )

    def _mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        path = self.items[index].mask
        if path is None:
            return super()._mask(index, size)
        if path.suffix.lower() in (".jpg", ".jpeg"):
            raise ValueError(f"{path} is a JPEG, which changes labels at their borders: save masks as PNG")
        mask = decoded(path)
        if mask.mode in ("RGB", "RGBA"):
            labels = labels_of_colours(np.asarray(mask.convert("RGB")), self.map, path)
        else:
            labels = labels_of(indices_of(mask, path), self.table, path, self.fix)
        check_size(labels, size, path, self.items[index].image)
        return Image.fromarray(labels)


def _items(root: Path, split: str) -> tuple[list[Item], str]:
    """The images, and why they have no masks, where they have none."""
    if root.suffix.lower() == ".csv":
        _check_split(split, [WHOLE], root)
        return _listed(root)
    parts = sorted(path.parent.name for path in root.glob("[!.]*/images"))
    parts += sorted(path.stem for path in root.glob("[!.]*.csv"))
    parts += [WHOLE] * (root / "images").is_dir()
    _check_split(split, parts, root)
    if (root / f"{split}.csv").is_file():
        return _listed(root / f"{split}.csv")
    return _paired(root if split == WHOLE and (root / "images").is_dir() else root / split)


def _check_split(split: str, splits: Sequence[str], root: Path) -> None:
    if split not in splits:
        found = ", ".join(splits) or "none: neither SPLIT.csv nor SPLIT/images is there"
        raise ValueError(f"split is {split!r}, {root} has {found}")


def _paired(folder: Path) -> tuple[list[Item], str]:
    """Images and masks of the same names."""
    masks = folder / "masks"
    found: dict[str, Path] = {}
    for path in sorted(masks.glob("[!.]*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and found.setdefault(path.stem, path) != path:
            raise ValueError(f"{masks} holds {found[path.stem].name} and {path.name}, an image has one mask")
    items = []
    for image in images_in(folder / "images"):
        mask = found.get(image.stem, masks / f"{image.stem}.png")
        items.append(Item(image.stem, image, mask if masks.is_dir() else None))
    return _unique(items, folder / "images"), f"{masks} is missing"


def _listed(path: Path) -> tuple[list[Item], str]:
    """The lines of a CSV file: an image, and its mask or nothing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    items = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, line in enumerate(csv.reader(file), 1):
            cells = [cell.strip() for cell in line]
            if not any(cells) or (number == 1 and cells[0].lower() == "image"):
                continue
            if len(cells) > 2 or not cells[0]:
                raise ValueError(f"{path} line {number} is {line}, it must be an image and its mask")
            mask = path.parent / cells[1] if cells[1:] and cells[1] else None
            items.append(Item(_name(Path(cells[0])), path.parent / cells[0], mask))
    if not items:
        raise FileNotFoundError(f"{path} lists no images")
    if len({item.mask is None for item in items}) > 1:
        bare = next(item.image for item in items if item.mask is None)
        raise ValueError(f"{path} gives no mask for {bare}, it must give one for all images or for none")
    return _unique(items, path), f"{path} names none beside its images"


def _name(path: Path) -> str:
    """What predictions of an image are called after: its path, without what leads out of their folder."""
    return "/".join(part for part in path.with_suffix("").parts if part not in (path.anchor, ".."))


def _unique(items: list[Item], where: Path) -> list[Item]:
    seen: dict[str, Item] = {}
    for item in items:
        if seen.setdefault(item.name, item) is not item:
            raise ValueError(f"{where} names {item.name} twice, predictions are called after it: rename one")
    return items
