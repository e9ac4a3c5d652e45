"""Augmentation of an image and its mask together, as published for the real-time models.

Random scale, crop, colour jitter and mirror; and of ours, a change of light and camera. All randomness
comes from the generator given.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
JITTER = 0.5


def augment(
    image: Image.Image,
    mask: Image.Image,
    size: tuple[int, int],
    ignore: int,
    rng: np.random.Generator,
    light: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of a randomly scaled, jittered and mirrored image.

    Args:
        image, mask: RGB image, and mask of class indices of the same size.
        size: (height, width) of the crop; what it has beyond the image is black and `ignore`.
        ignore: index that training ignores.
        rng: the randomness.
        light: how far `relight` goes, 0 for not at all.

    Returns:
        the crop as uint8 (height, width, 3), and its mask as uint8 (height, width).
    """
    image, mask = scaled_crop(image, mask, rng.choice(SCALES), size, rng)
    # Padded last: contrast blends with the mean, which would lighten the padding and be darkened by it.
    image = jitter(image, rng)
    image, mask = padded(relight(image, light, rng) if light else image, mask, size, ignore)
    pixels, labels = np.asarray(image), np.asarray(mask)
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return pixels, labels


def scaled_crop(
    image: Image.Image,
    mask: Image.Image,
    scale: float,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[Image.Image, Image.Image]:
    """A random window of the image scaled by `scale` (bilinear, the mask nearest), `size` at most.

    Only the window is resampled, not the whole image.
    """
    height, width = size
    scaled_w, scaled_h = round(image.width * scale), round(image.height * scale)
    x = int(rng.integers(0, max(scaled_w - width, 0) + 1))
    y = int(rng.integers(0, max(scaled_h - height, 0) + 1))
    inner = (min(width, scaled_w), min(height, scaled_h))
    right, bottom = (x + inner[0]) / scale, (y + inner[1]) / scale
    box = (x / scale, y / scale, min(right, image.width), min(bottom, image.height))
    image = image.resize(inner, Image.Resampling.BILINEAR, box=box)
    return image, mask.resize(inner, Image.Resampling.NEAREST, box=box)


def padded(
    image: Image.Image, mask: Image.Image, size: tuple[int, int], ignore: int
) -> tuple[Image.Image, Image.Image]:
    """An image at the top left of a black one of `size`, and its mask in one of `ignore`."""
    height, width = size
    full, full_mask = Image.new("RGB", (width, height)), Image.new("L", (width, height), ignore)
    full.paste(image)
    full_mask.paste(mask)
    return full, full_mask


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, each times 0.5 to 1.5."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
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
