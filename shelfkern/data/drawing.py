"""Masks from regions as COCO's annotation files hold them: polygons and run lengths."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .dataset import Colour
from .reading import FileDataset, Item, label_table

# A list of polygons [x0, y0, x1, y1, ...], or {"size": [height, width], "counts": run lengths}.
Segmentation = Any


@dataclasses.dataclass(frozen=True)
class Region:
    """An annotation: its id in the file, a label, and where that is."""

    id: int
    label: int
    segmentation: Segmentation


class Drawing:
    """The regions of an image, later over earlier, on a background.

    Kept as JSON: as lists of numbers the regions of COCO's 118 287 images take some eight times the memory,
    and a worker that only looks at them copies them.
    """

    def __init__(self, size: tuple[int, int], background: int, regions: Sequence[Region]) -> None:
        self.size, self.background = size, background
        self._regions = json.dumps([dataclasses.astuple(region) for region in regions]).encode()

    def labels(self) -> np.ndarray:
        """uint8 (height, width) = `size`.

        Raises:
            ValueError: a region cannot be drawn.
        """
        labels = np.full(self.size, self.background, np.uint8)
        for region in itertools.starmap(Region, json.loads(self._regions)):
            try:
                paint(labels, region.segmentation, region.label)
            except (TypeError, ValueError) as error:
                raise ValueError(f"annotation {region.id} cannot be drawn: {error}") from error
        return labels


class DrawnDataset(FileDataset):
    """A `FileDataset` whose masks are drawn from the regions of an annotation file.

    Args:
        items: where each image is; the annotation file in place of the mask.
        drawings: of each item.
        classes, palette: as in `Dataset`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        drawings: Sequence[Drawing],
        classes: tuple[str, ...],
        palette: tuple[Colour, ...],
    ) -> None:
        super().__init__(items, classes, palette, label_table({}))
        self.drawings = drawings

    def _mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        item, drawing = self.items[index], self.drawings[index]
        height, width = drawing.size
        if (width, height) != size:
            raise ValueError(
                f"{item.image} is {size[0]} x {size[1]}, {item.mask} says {width} x {height}: "
                "take the images that the annotations were made for"
            )
        try:
            return Image.fromarray(drawing.labels())
        except ValueError as error:
            raise ValueError(f"{item.mask}, image {item.name}: {error}") from error


def paint(labels: np.ndarray, segmentation: Segmentation, label: int) -> None:
    """Gives the pixels of a region a label, in place. labels: uint8 (H, W).

    Raises:
        ValueError: the region is neither polygons nor run lengths of the mask's size.
    """
    if isinstance(segmentation, dict):
        size = tuple(segmentation.get("size", ()))
        if size != labels.shape:
            raise ValueError(f"its size is {size}, its image has (height, width) {labels.shape}")
        labels[runs(segmentation.get("counts"), labels.shape)] = label
    elif isinstance(segmentation, list):
        for polygon in segmentation:
            paint_polygon(labels, polygon, label)
    else:
        raise ValueError(f"it is of type {type(segmentation).__name__}, it must be polygons or run lengths")


def paint_polygon(labels: np.ndarray, polygon: Sequence[float], label: int) -> None:
    """Gives a label to the pixels whose centres lie in a polygon, by the even-odd rule.

    Column c of row r is the square from (c, r) to (c + 1, r + 1).
    """
    if len(polygon) % 2 or not np.isfinite(polygon).all():
        raise ValueError(f"a polygon has {len(polygon)} numbers, it must be pairs of finite x and y")
    row, column = _crossings(np.asarray(polygon, np.float64).reshape(-1, 2), labels.shape)
    if not row.size:
        return
    top, left = row.min(), column.min()
    height, width = row.max() + 1 - top, column.max() - left
    # A pixel is inside where the edges to the left of its centre are odd in number.
    toggles = np.bincount((row - top) * (width + 1) + column - left, minlength=height * (width + 1))
    inside = np.cumsum(toggles.reshape(height, width + 1), 1)[:, :width] & 1
    labels[top : top + height, left : left + width][inside.astype(bool)] = label


def _crossings(points: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose middle line an edge crosses, and the first column whose centre lies to the right of that."""
    (x, y), (next_x, next_y) = points.T, np.roll(points, -1, 0).T
    first = np.ceil(np.minimum(y, next_y) - 0.5).clip(0, shape[0]).astype(np.int64)
    last = np.ceil(np.maximum(y, next_y) - 0.5).clip(0, shape[0]).astype(np.int64)
    count = last - first
    edge = np.repeat(np.arange(len(x)), count)
    row = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
    slope = (next_x - x)[edge] / (next_y - y)[edge]
    crossed = x[edge] + (row + 0.5 - y[edge]) * slope
    return row, np.ceil(crossed - 0.5).clip(0, shape[1]).astype(np.int64)


def runs(counts: str | Sequence[int] | None, shape: tuple[int, ...]) -> np.ndarray:
    """bool (H, W) of run lengths, which go down the columns, alternate and begin outside.

    Raises:
        ValueError: they are not as long as the mask.
    """
    lengths = np.asarray(_unpacked(counts) if isinstance(counts, str) else counts or [], np.int64)
    if (lengths < 0).any() or lengths.sum() != shape[0] * shape[1]:
        raise ValueError(f"its run lengths cover {lengths.sum()} pixels of {shape[0] * shape[1]}")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(shape[1], shape[0]).T


def _unpacked(text: str) -> list[int]:
    """Run lengths that were packed as text.

    A character is six bits from "0" on: five of the number, lowest first, and whether more follow; the
    last one's highest is the sign. From the fourth number on each is a difference to the last but one.
    """
    lengths: list[int] = []
    number = shift = 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its run lengths hold the character {chr(character)!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        lengths.append(number + lengths[-2] if len(lengths) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("its run lengths end in the middle of a number")
    return lengths


def entry(record: Mapping[str, Any], key: str, path: Path) -> Any:
    """A record's entry, refused by name where it is missing."""
    if key not in record:
        raise ValueError(f"{path} has a record without {key}: {str(dict(record))[:80]}")
    return record[key]


def by_image(annotations: Sequence[Mapping[str, Any]], path: Path) -> dict[int, list[Mapping[str, Any]]]:
    """Annotations by the id of their image, in the file's order."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for annotation in annotations:
        found.setdefault(entry(annotation, "image_id", path), []).append(annotation)
    return found


def read_annotations(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON file that must have some keys.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, it may be damaged: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}, it must be the published file of annotations")
    return content
