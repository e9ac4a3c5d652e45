"""What commands read: paths, folders and globs to files, files to RGB images of the network's size."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..nn.extents import STRIDE

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"}

# Fewest pixels a side that the network takes.
SMALLEST = STRIDE

# What Pillow, PyAV and torch raise for damaged, oversized and unwritable files.
SKIPPED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
)


def expand(paths: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Files that the paths name, each with the relative name that its results are called after.

    A folder gives the images and videos in it and below, with their places in it; a pattern what it
    matches. A path that matches nothing, and a folder without either, are given as they are, so that
    they fail by their own names.
    """
    for path in paths:
        matches = [path] if _yes(Path(path).exists) else sorted(glob.glob(path))  # noqa: PTH207
        for match in map(Path, matches or [path]):
            media = _media(match) if _yes(match.is_dir) else []
            yield from ((file, file.relative_to(match)) for file in media)
            if not media:
                yield match, Path(match.name or match.resolve().name)


def _media(folder: Path) -> list[Path]:
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    return sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in suffixes and _yes(file.is_file)
    )


def _yes(question: Callable[[], bool]) -> bool:
    """The answer; no where the system refuses one, since reading the file will then say why."""
    try:
        return question()
    except OSError:
        return False


def is_video(path: Path) -> bool:
    """Whether a file is taken as a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_image(path: Path) -> Image.Image:
    """A picture as 8-bit RGB, upright as its EXIF says; transparency on white; the first of several frames.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if path.is_dir():
        raise ValueError("it is a folder without images and videos")
    with Image.open(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def network_size(image: Image.Image, size: tuple[int, ...] | None) -> tuple[int, int]:
    """(width, height) that the network sees: as asked, and never below what it takes.

    Args:
        size: (height, width), (longer side,), or None for the image's own.
    """
    width, height = image.size
    if size and len(size) == 2:
        return size[1], size[0]
    longer = size[0] if size else max(width, height)
    scale = max(longer / max(width, height), SMALLEST / min(width, height))
    return max(SMALLEST, round(width * scale)), max(SMALLEST, round(height * scale))


def resized(image: Image.Image, size: tuple[int, ...] | None) -> Image.Image:
    """An image as the network sees it: of its `network_size`."""
    seen = network_size(image, size)
    return image if seen == image.size else image.resize(seen, Image.Resampling.BILINEAR)


def sentence_of(error: Exception) -> str:
    """Why a file is skipped, in one line."""
    strerror = getattr(error, "strerror", None)
    return strerror if strerror else str(error).splitlines()[0] if str(error) else type(error).__name__


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit integers by their upper half; floats from 0 to 1."""
    values = np.asarray(image, np.float64)
    values = values * 255 if image.mode == "F" else values / 257
    return Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
