"""Augmentation of an image and its mask together, as published, a change of light and camera, and ClassMix.

All randomness comes from the generator given. Padding comes last, so that no filter takes its colour into
the image, and labels are only ever copied, never interpolated.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from .dataset import IGNORE

Box = tuple[int, int, int, int]
Affine = tuple[float, float, float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random crop of a randomly scaled, turned, mirrored, blurred and recoloured image.

    As published for ShelfNet50 and 101: `base_size`, `scale_range` (0.5, 2), `mirror` 0.5, `rotation` 10,
    `blur` 0.5. For the lw models: `scales` 0.75 to 2 by 0.25, `fill`, `mirror` 0.5, `jitter` 0.5 of each.

    Attributes:
        crop: (height, width) of the result; what it has beyond the image is black and `IGNORE`.
        scales: factors of which one is chosen.
        scale_range: lowest and highest factor, in place of `scales`; without either it is 1.
        base_size: pixels of the image's shorter side at a factor of 1; None for those it has.
        fill: whether an image that is scaled below the crop is enlarged to it, so that nothing is beyond.
        mirror: probability of left for right.
        rotation: most degrees, either way, about the image's centre; corners that come in are black and
            `IGNORE`.
        blur: probability of a Gaussian blur, of a radius from 0 to 1 pixel.
        jitter: how far brightness, contrast and saturation go from their factor of 1, either way.
        light: how far `relight` goes, 0 for not at all.
        mix: probability that `mixed` lays half the classes of another image over this one. The trainer, which
            has the others, does so after both are augmented.
    """

    crop: tuple[int, int]
    scales: tuple[float, ...] = ()
    scale_range: tuple[float, float] | None = None
    base_size: int | None = None
    fill: bool = False
    mirror: float = 0.5
    rotation: float = 0.0
    blur: float = 0.0
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    light: float = 0.0
    mix: float = 0.0

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop is {self.crop}, it must be a height and a width from 1")
        if self.scales and self.scale_range:
            raise ValueError(
                f"scale_range is {self.scale_range} beside scales {self.scales}: give one of them"
            )
        if not all(0 < scale < math.inf for scale in self.scales or self.scale_range or ()):
            raise ValueError(f"scales are {self.scales or self.scale_range}, they must be numbers above 0")
        if self.scale_range and (len(self.scale_range) != 2 or self.scale_range[0] > self.scale_range[1]):
            raise ValueError(f"scale_range is {self.scale_range}, it must be the lowest and the highest")
        if self.base_size is not None and self.base_size < 1:
            raise ValueError(f"base_size is {self.base_size}, it must be 1 or more")
        for name in ("mirror", "blur", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, a probability is 0 to 1")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is {self.rotation}, it may be 0 to 180 degrees")
        if len(self.jitter) != 3 or not all(0 <= amount <= 1 for amount in self.jitter):
            raise ValueError(f"jitter is {self.jitter}, it must be three numbers from 0 to 1")
        if not 0 <= self.light < math.inf:
            raise ValueError(f"light is {self.light}, it must be a number from 0")

    def __call__(
        self, image: Image.Image, mask: Image.Image, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augments an RGB image and its mask (mode L) of the same size.

        Returns:
            the crop as uint8 (height, width, 3), and its mask as uint8 (height, width).
        """
        scale = self._scale(image, rng)
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        window = random_window(size, self.crop, rng)
        matrix, box = None, window
        if self.rotation:
            matrix = rotation(size, rng.uniform(-self.rotation, self.rotation))
            box = source_box(window, size, matrix)
        image, mask = scaled_part(image, mask, scale, box)
        # Before anything black comes in: contrast blends with the mean, and blur with what is near.
        image = self._recoloured(image, rng)
        if matrix:
            image, mask = turned(image, mask, window, box, matrix)
        image, mask = padded(image, mask, self.crop)
        pixels, labels = np.asarray(image), np.asarray(mask)
        if rng.random() < self.mirror:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        return np.ascontiguousarray(pixels), np.ascontiguousarray(labels)

    def _scale(self, image: Image.Image, rng: np.random.Generator) -> float:
        factor = 1.0
        if self.scales:
            factor = float(rng.choice(self.scales))
        elif self.scale_range:
            factor = rng.uniform(*self.scale_range)
        if self.base_size is not None:
            factor = round(factor * self.base_size) / min(image.size)
        if self.fill:
            factor = max(factor, self.crop[0] / image.height, self.crop[1] / image.width)
        return factor

    def _recoloured(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        image = jitter(image, self.jitter, rng)
        if self.light:
            image = relight(image, self.light, rng)
        if self.blur and rng.random() < self.blur:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
        return image


def random_window(size: tuple[int, int], crop: tuple[int, int], rng: np.random.Generator) -> Box:
    """(left, top, right, bottom) of a crop (height, width) in a size (width, height), cut to it."""
    height, width = crop
    x = int(rng.integers(0, max(size[0] - width, 0) + 1))
    y = int(rng.integers(0, max(size[1] - height, 0) + 1))
    return x, y, min(x + width, size[0]), min(y + height, size[1])


def scaled_part(
    image: Image.Image, mask: Image.Image, scale: float, box: Box
) -> tuple[Image.Image, Image.Image]:
    """A box of the image scaled by `scale` (bilinear), and of its mask (nearest); only that is resampled."""
    left, top = box[0] / scale, box[1] / scale
    right, bottom = min(box[2] / scale, image.width), min(box[3] / scale, image.height)
    size, source = (box[2] - box[0], box[3] - box[1]), (left, top, right, bottom)
    image = image.resize(size, Image.Resampling.BILINEAR, box=source)
    return image, mask.resize(size, Image.Resampling.NEAREST, box=source)


def rotation(size: tuple[int, int], degrees: float) -> Affine:
    """(a, b, c, d, e, f): (x, y) after a turn about the middle was at (ax + by + c, dx + ey + f) before.

    Counter-clockwise; coordinates are those of pixels' corners.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = size[0] / 2, size[1] / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def source_box(window: Box, size: tuple[int, int], matrix: Affine) -> Box:
    """The part of an image of `size` that a window shows once it is turned, with a pixel around it."""
    a, b, c, d, e, f = matrix
    corners = [(x, y) for x in window[0::2] for y in window[1::2]]
    edges = []
    for values, end in (
        ([a * x + b * y + c for x, y in corners], size[0]),
        ([d * x + e * y + f for x, y in corners], size[1]),
    ):
        # One pixel at least, also where the window shows nothing of the image.
        low = min(max(math.floor(min(values)) - 1, 0), end - 1)
        edges.append((low, max(min(math.ceil(max(values)) + 1, end), low + 1)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def turned(
    image: Image.Image, mask: Image.Image, window: Box, box: Box, matrix: Affine
) -> tuple[Image.Image, Image.Image]:
    """What a window shows of a turned image (bilinear) and mask (nearest), given their part in `box`."""
    a, b, c, d, e, f = matrix
    x, y = window[:2]
    shifted = (a, b, a * x + b * y + c - box[0], d, e, d * x + e * y + f - box[1])
    size = (window[2] - x, window[3] - y)
    move = functools.partial(Image.Image.transform, size=size, method=Image.Transform.AFFINE, data=shifted)
    # Where the image ends, Pillow's two ways to sample may disagree by a pixel: no label without its colour.
    covered = move(Image.new("L", image.size, 255), resample=Image.Resampling.BILINEAR)
    labels = move(mask, resample=Image.Resampling.NEAREST, fillcolor=IGNORE)
    labels = Image.composite(labels, Image.new("L", size, IGNORE), covered)
    return move(image, resample=Image.Resampling.BILINEAR), labels


def padded(image: Image.Image, mask: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """An image at the top left of a black one of `size` (height, width), and its mask in one of `IGNORE`."""
    height, width = size
    full, full_mask = Image.new("RGB", (width, height)), Image.new("L", (width, height), IGNORE)
    full.paste(image)
    full_mask.paste(mask)
    return full, full_mask


def jitter(image: Image.Image, amounts: tuple[float, float, float], rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times 1 - amount to 1 + amount."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhance, amount in zip(enhancers, amounts, strict=True):
        if amount:
            image = enhance(image).enhance(rng.uniform(1 - amount, 1 + amount))
    return image


def relight(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """The image as another camera may have taken it at another hour.

    Gain by a factor from e^(-0.6 strength) to e^(0.3 strength), that of each colour by one more of
    e^(+-0.2 strength), gamma from e^(-0.5 strength) to e^(0.5 strength); three in ten images blurred, three
    in ten with sensor noise, one in ten without colour, times strength.
    """
    if rng.random() < 0.1 * strength:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.3 * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.5)))
    pixels = np.asarray(image, np.float32) / 255
    pixels = pixels ** np.exp(rng.uniform(-0.5, 0.5) * strength)
    cast = rng.uniform(-0.2, 0.2, 3) * strength
    pixels = pixels * np.exp(rng.uniform(-0.6, 0.3) * strength + cast).astype(np.float32)
    if rng.random() < 0.3 * strength:
        noise = rng.standard_normal(pixels.shape, np.float32)
        pixels = pixels + noise * np.float32(rng.uniform(0, 0.04))
    return Image.fromarray(np.uint8(np.rint(np.clip(pixels, 0, 1) * 255)))


def mixed(
    image: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An image over which lie all pixels of half of another's classes (Olsson et al. 2021, ClassMix).

    The classes are chosen at random: of an odd number the smaller half, so that of one class nothing is
    taken. `IGNORE` is no class and never taken.

    Args:
        image, other: uint8 (height, width, 3).
        mask, other_mask: uint8 (height, width).

    Returns:
        the image and its mask, in new arrays.
    """
    present = np.unique(other_mask)
    present = present[present != IGNORE]
    taken = np.isin(other_mask, rng.choice(present, len(present) // 2, replace=False))
    return np.where(taken[..., None], other, image), np.where(taken, other_mask, mask)
