"""Small random images and masks, and files of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (8, 6)


def pixels_of(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def values_of(seed: int, values: Sequence[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask of the given values, each of them in it."""
    flat = np.resize(np.asarray(values, np.uint8), size[0] * size[1])
    return np.random.default_rng(seed).permutation(flat).reshape(size[1], size[0])


def save(path: Path, pixels: np.ndarray | Image.Image) -> Path:
    """Writes an image and the folders it lies in; JPEGs as near to the pixels as they come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    options = {"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}
    image.save(path, **options)
    return path


def with_palette(values: np.ndarray) -> Image.Image:
    """The mask as a palette image, whose colours say nothing."""
    mask = Image.fromarray(values)
    mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
    return mask


def runs_of(inside: np.ndarray) -> dict:
    """A region (H, W) as COCO's run lengths: down the columns, from a run outside on."""
    flat = np.concatenate([[False], inside.T.ravel(), [not inside[-1, -1]]])
    lengths = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
    return {"size": list(inside.shape), "counts": lengths}
