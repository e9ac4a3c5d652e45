"""Label images, palettes, overlays and legends."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


def default_palette(num_classes: int) -> list[Colour]:
    """Distinct colours: hues a golden angle apart, in two brightnesses."""
    colours = []
    for index in range(num_classes):
        rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 0.95 if index % 2 else 0.7)
        colours.append((round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)))
    return colours


def label_image(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Labels (H, W) uint8 as a palette image: its pixel values are the labels, its colours the palette's."""
    image = Image.frombytes("P", labels.shape[::-1], np.ascontiguousarray(labels, np.uint8).tobytes())
    image.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    return image


def blend(
    image: Image.Image, labels: np.ndarray, palette: Sequence[Sequence[int]], alpha: float
) -> Image.Image:
    """The picture with every pixel mixed with its class's colour; `alpha` is the weight of the colour."""
    colours = np.asarray(palette, np.uint8)[labels]
    return Image.blend(image, Image.fromarray(colours), alpha)


def legend(
    width: int, labels: np.ndarray, palette: Sequence[Sequence[int]], classes: Sequence[str]
) -> Image.Image:
    """A strip with colour, name and share of pixels of each class that occurs, most frequent first."""
    size = max(11, min(22, width // 45))
    font = ImageFont.load_default(size)
    row, gap = size + size // 2, size // 2
    entries = _entries(labels, classes)
    placed, x, y = [], gap, gap
    for label, text in entries:
        entry = row + round(font.getlength(text)) + 2 * gap
        if x + entry > width and x > gap:
            x, y = gap, y + row
        placed.append((x, y, label, text))
        x += entry
    strip = Image.new("RGB", (width, y + row + gap // 2), (24, 24, 28))
    draw = ImageDraw.Draw(strip)
    for x, y, label, text in placed:
        draw.rounded_rectangle((x, y, x + size, y + size), size // 4, fill=tuple(palette[label]))
        draw.text((x + size + gap, y + size / 2), text, fill=(235, 235, 235), font=font, anchor="lm")
    return strip


def _entries(labels: np.ndarray, classes: Sequence[str]) -> list[tuple[int, str]]:
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    return [(int(label), f"{classes[label]} {_percent(counts[label] / labels.size)}") for label in order]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
    alpha: float = 0.55,
) -> Image.Image:
    """The blended picture with a legend below it."""
    blended = blend(image, labels, palette, alpha)
    strip = legend(image.width, labels, palette, classes)
    canvas = Image.new("RGB", (image.width, image.height + strip.height))
    canvas.paste(blended)
    canvas.paste(strip, (0, image.height))
    return canvas
