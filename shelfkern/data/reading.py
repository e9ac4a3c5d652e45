"""Images and masks from files: decoded, checked, and with the class indices that training wants."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from .dataset import IGNORE, Colour, Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
EXIF_ORIENTATION = 0x0112
# What stands in a table of labels for values that no mask may hold.
REFUSED = -1


@dataclasses.dataclass(frozen=True)
class Item:
    """Where a sample is read from; without a mask it is test data."""

    name: str
    image: Path
    mask: Path | None


class FileDataset:
    """Samples of one image and one mask file each: a `Dataset`.

    Data sets whose masks are no images of indices replace `raw` or `_mask`.

    Args:
        items: where each sample is.
        classes, palette: as in `Dataset`.
        table: what each value of a mask's pixels means, as from `label_table`.
        fix: how to correct a mask that holds something else; ends the sentence that refuses it.
        lack: why there are no masks, where there are none; ends the sentence that refuses to train on it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: tuple[str, ...],
        palette: tuple[Colour, ...],
        table: np.ndarray,
        fix: str = "give those pixels one of these values",
        lack: str = "it is test data",
    ) -> None:
        self.items, self.classes, self.palette = items, classes, palette
        self.table, self.fix, self.lack = table, fix, lack
        self.names = tuple(item.name for item in items)
        self.labelled = all(item.mask for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item = self.items[index]
        image = read_image(item.image)
        return Sample(item.name, image, self._mask(index, image.size))

    def mask(self, index: int) -> Image.Image:
        return self._mask(index, image_size(self.items[index].image))

    def _mask(self, index: int, size: tuple[int, int]) -> Image.Image:
        """The mask of class indices of an image of `size`, which is (width, height) as PIL's are."""
        path = self.items[index].mask
        if path is None:
            return Image.new("L", size, IGNORE)
        raw = self.raw(path)
        check_size(raw, size, path, self.items[index].image)
        return Image.fromarray(labels_of(raw, self.table, path, self.fix))

    def raw(self, path: Path) -> np.ndarray:
        """A mask file's values, (H, W) uint8."""
        return read_indices(path)


def label_table(labels: Mapping[int, int]) -> np.ndarray:
    """What each of 256 values of a mask's pixels means, (256,) int16; `REFUSED` where `labels` lacks it."""
    table = np.full(256, REFUSED, np.int16)
    for value, label in labels.items():
        table[value] = label
    return table


def labels_of(raw: np.ndarray, table: np.ndarray, path: Path, fix: str) -> np.ndarray:
    """Class indices (H, W) uint8 of a mask's values (H, W) uint8.

    Raises:
        ValueError: a value means nothing.
    """
    labels = table[raw]
    if labels.size and labels.min() == REFUSED:
        value = int(raw[labels == REFUSED].max())
        raise ValueError(
            f"{path} holds the value {value} in {np.count_nonzero(raw == value)} pixels, it may hold "
            f"{ranges(np.flatnonzero(table != REFUSED))}: {fix}"
        )
    return labels.astype(np.uint8)


def ranges(values: Iterable[int]) -> str:
    """Ascending numbers for people: "0 to 10, 255"."""
    parts: list[list[int]] = []
    for value in map(int, values):
        if parts and value == parts[-1][-1] + 1:
            parts[-1][1:] = [value]
        else:
            parts.append([value])
    return ", ".join(" to ".join(map(str, part)) for part in parts)


def read_image(path: Path) -> Image.Image:
    """An image as RGB, its pixels as stored: masks are drawn on those, whatever a camera says of its tilt.

    Raises:
        OSError: it is missing or cannot be decoded.
        ValueError: its pixels have more than 8 bits.
    """
    image = decoded(path)
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{path} is of mode {image.mode}, it must be grey or RGB of 8 bits: convert it")
    return image.convert("RGB")


def read_indices(path: Path) -> np.ndarray:
    """The values of a mask's pixels, (H, W) uint8; of a palette image the indices.

    Raises:
        OSError: it is missing or cannot be decoded.
        ValueError: it does not hold indices of 8 bits.
    """
    return indices_of(decoded(path), path)


def indices_of(mask: Image.Image, path: Path) -> np.ndarray:
    """`read_indices` of a mask that is decoded already."""
    if mask.mode not in ("L", "P"):
        raise ValueError(f"{path} is of mode {mask.mode}, it must hold class indices: save it as 8-bit grey")
    return np.asarray(mask)


def decoded(path: Path) -> Image.Image:
    """What a file holds, in its own mode."""
    with _decoding(path), Image.open(path) as file:
        file.load()
        return file.copy()


def image_size(path: Path) -> tuple[int, int]:
    """(width, height), from the head of the file alone."""
    with _decoding(path), Image.open(path) as file:
        return file.size


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Names the file in what goes wrong: Pillow does so only sometimes, and has many kinds of error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be decoded, it may be damaged: {error}") from error


def check_size(mask: np.ndarray, size: tuple[int, int], path: Path, image: Path) -> None:
    """Raises ValueError unless a mask (H, W) is as large as its image, `size` (width, height)."""
    height, width = mask.shape
    if (width, height) == size:
        return
    cure = "scale the mask to the image, nearest neighbour"
    if (height, width) == size and _lies_on_its_side(image):
        cure = "the image is upright by its EXIF alone, save it with its pixels turned"
    raise ValueError(f"{path} is {width} x {height}, its image {size[0]} x {size[1]}: {cure}")


def _lies_on_its_side(image: Path) -> bool:
    """Whether its EXIF asks for a quarter turn, which the pixels have not had."""
    with _decoding(image), Image.open(image) as file:
        return file.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def find_folder(root: str | os.PathLike[str], places: Sequence[str], marker: str) -> Path:
    """The first of the places below `root` that holds `marker`.

    Raises:
        FileNotFoundError: none does.
    """
    for place in places:
        if (Path(root) / place / marker).exists():
            return Path(root) / place
    looked = ", ".join(str(Path(root) / place) for place in places)
    raise FileNotFoundError(f"root {root} is wrong: no {marker} in {looked}")


def read_names(path: Path) -> list[str]:
    """The lines of a list of samples.

    Raises:
        FileNotFoundError: there is no such list, or it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, it lists the split")
    names = path.read_text().split()
    if not names:
        raise FileNotFoundError(f"{path} is empty, it lists the split")
    return names


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name; hidden ones are not, which copies from a Mac bring.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(
        path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not found:
        state = "holds no image" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(f"{folder} {state}, there must be files of {', '.join(IMAGE_SUFFIXES)}")
    return found


def check_split(split: str, splits: Sequence[str], of: str) -> None:
    """Raises ValueError unless the split is one of a data set's."""
    if split not in splits:
        raise ValueError(f"split is {split!r}, {of} has {', '.join(splits)}")
