"""Augmentation, pixel by pixel on small images."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from shelfkern.data import transforms
from shelfkern.data.transforms import SCALES, augment, jitter, relight, scaled_crop

IGNORE = 11


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_pair(height: int, width: int, seed: int = 0) -> tuple[Image.Image, Image.Image]:
    pixels = rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    mask = rng(seed + 1).integers(0, IGNORE, (height, width), np.uint8)
    return Image.fromarray(pixels), Image.fromarray(mask)


def tent_weights(size: int, scale: float) -> np.ndarray:
    """Bilinear resampling along one axis as a matrix, (round(size * scale), size)."""
    count = round(size * scale)
    # A size rounded up is stretched a little, as there is nothing beyond the image.
    scale = max(scale, count / size)
    centres = (np.arange(count) + 0.5) / scale
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distance / max(1, 1 / scale))
    return weights / weights.sum(1, keepdims=True)


def resized_by_hand(image: Image.Image, scale: float) -> np.ndarray:
    rows, columns = tent_weights(image.height, scale), tent_weights(image.width, scale)
    return np.einsum("yr,rcn,xc->yxn", rows, np.asarray(image, np.float64), columns)


def windows_alike(whole: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """(y, x) of every window of `whole` that equals `part` but for rounding, once for each axis."""
    height, width = part.shape[:2]
    corners = np.ndindex(whole.shape[0] - height + 1, whole.shape[1] - width + 1)
    part = part.astype(np.float64)
    return [(y, x) for y, x in corners if np.abs(whole[y : y + height, x : x + width] - part).max() <= 1.01]


def nearest(start: int, count: int, scale: float, shift: float) -> np.ndarray:
    return np.floor((start + np.arange(count) + 0.5) / scale + shift).astype(int)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", SCALES)
def test_a_crop_is_a_window_of_the_resized_image(scale: float, seed: int) -> None:
    image, mask = random_pair(20, 24, seed)
    crop, crop_mask = scaled_crop(image, mask, scale, (9, 11), rng(seed))
    (corner,) = windows_alike(resized_by_hand(image, scale), np.asarray(crop))
    assert crop.size == crop_mask.size == (11, 9)
    # Where a sample falls on the edge of two pixels, either is nearest.
    fits = np.zeros((9, 11), bool)
    for dy in (-1e-6, 1e-6):
        for dx in (-1e-6, 1e-6):
            rows, columns = nearest(corner[0], 9, scale, dy), nearest(corner[1], 11, scale, dx)
            fits |= np.asarray(mask)[np.ix_(rows, columns)] == np.asarray(crop_mask)
    assert fits.all()


def test_every_window_occurs() -> None:
    image, mask = random_pair(4, 5)
    crops = [scaled_crop(image, mask, 1.0, (2, 3), rng(seed))[0] for seed in range(100)]
    found = {corner for crop in crops for corner in windows_alike(np.asarray(image, float), np.asarray(crop))}
    assert found == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(5, 7), (7, 5), (31, 33)])
def test_sizes_that_do_not_scale_to_whole_pixels(size: tuple[int, int], scale: float) -> None:
    image, mask = random_pair(*size)
    crop, crop_mask = scaled_crop(image, mask, scale, (1000, 1000), rng())
    assert crop.size == crop_mask.size == (round(size[1] * scale), round(size[0] * scale))
    assert_allclose(np.asarray(crop, float), resized_by_hand(image, scale), rtol=0, atol=1.01)


def blocks() -> tuple[Image.Image, Image.Image, np.ndarray]:
    """Squares of 12 x 12 pixels, each of its own class and colour."""
    mask = np.kron(np.arange(12).reshape(3, 4) % IGNORE, np.ones((12, 12))).astype(np.uint8)
    palette = rng(5).permutation(np.arange(33) * 7).reshape(11, 3).astype(np.uint8)
    return Image.fromarray(palette[mask]), Image.fromarray(mask), palette


def inside(labels: np.ndarray) -> np.ndarray:
    """Where all of 7 x 7 labels are alike, the border left out."""
    views = np.lib.stride_tricks.sliding_window_view(labels, (7, 7)).reshape(
        *np.subtract(labels.shape, 6), -1
    )
    return np.pad(views.min(-1) == views.max(-1), 3)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_stay_aligned(seed: int, monkeypatch) -> None:
    monkeypatch.setattr(transforms, "jitter", lambda image, rng: image)
    image, mask, palette = blocks()
    pixels, labels = augment(image, mask, (26, 34), IGNORE, rng(seed))
    clear = inside(labels) & (labels != IGNORE)
    assert clear.sum() > 50 and len(np.unique(labels[clear])) > 1
    assert_array_equal(pixels[clear], palette[labels[clear]])


@pytest.mark.parametrize("size", [(32, 30), (8, 30), (32, 8)])
def test_padding_is_black_and_ignored(size: tuple[int, int], monkeypatch) -> None:
    monkeypatch.setattr(transforms, "SCALES", (0.75,))
    image, mask = Image.new("RGB", (20, 16), (250, 240, 255)), Image.new("L", (20, 16), 3)
    inner = (min(size[0], 12), min(size[1], 15))
    lit = np.zeros(size, bool)
    lit[: inner[0], : inner[1]] = True
    for seed in range(12):
        pixels, labels = augment(image, mask, size, IGNORE, rng(seed))
        assert (pixels.shape, pixels.dtype) == ((*size, 3), np.uint8)
        assert (labels.shape, labels.dtype) == (size, np.uint8)
        filled = lit if labels[0, 0] == 3 else lit[:, ::-1]
        assert_array_equal(labels, np.where(filled, 3, IGNORE))
        assert (pixels[~filled] == 0).all() and (pixels[filled] > 80).all()


def test_padding_does_not_enter_the_contrast(monkeypatch) -> None:
    monkeypatch.setattr(transforms, "SCALES", (1.0,))
    image, mask = random_pair(6, 8)
    tight = [augment(image, mask, (6, 8), IGNORE, rng(seed)) for seed in range(6)]
    wide = [augment(image, mask, (20, 30), IGNORE, rng(seed)) for seed in range(6)]
    for (pixels, labels), (padded, padded_labels) in zip(tight, wide, strict=True):
        part = padded_labels[:6] != IGNORE
        assert_array_equal(padded_labels[:6][part].reshape(6, 8), labels)
        assert_array_equal(padded[:6][part].reshape(6, 8, 3), pixels)


def test_mirror_turns_image_and_mask_half_of_the_time(monkeypatch) -> None:
    monkeypatch.setattr(transforms, "jitter", lambda image, rng: image)
    monkeypatch.setattr(transforms, "SCALES", (1.0,))
    image, mask = random_pair(6, 7)
    straight, labels = np.asarray(image), np.asarray(mask)
    turned = 0
    for seed in range(100):
        pixels, found = augment(image, mask, (6, 7), IGNORE, rng(seed))
        is_turned = not np.array_equal(pixels, straight)
        step = -1 if is_turned else 1
        assert_array_equal(pixels, straight[:, ::step])
        assert_array_equal(found, labels[:, ::step])
        turned += is_turned
    assert 30 < turned < 70


class Factors:
    """A generator of the given factors that notes the ranges asked for."""

    def __init__(self, *factors: float) -> None:
        self.factors, self.ranges = list(factors), []

    def uniform(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        return self.factors.pop(0)


def grey_of(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


DULL = {
    "brightness": lambda pixels: np.zeros_like(pixels),
    "contrast": lambda pixels: np.full_like(pixels, grey_of(pixels).mean()),
    "saturation": lambda pixels: np.repeat(grey_of(pixels)[..., None], 3, -1),
}


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 1.5])
@pytest.mark.parametrize("what", list(DULL))
def test_jitter_against_its_formula(what: str, factor: float) -> None:
    image, _ = random_pair(6, 7)
    factors = Factors(*(factor if name == what else 1.0 for name in DULL))
    found = np.asarray(jitter(image, factors), np.float64)
    assert factors.ranges == [(0.5, 1.5)] * 3 and not factors.factors
    pixels = np.asarray(image, np.float64)
    dull = DULL[what](pixels)
    assert_allclose(found, np.clip(dull + factor * (pixels - dull), 0, 255), rtol=0, atol=1.6)


def test_jitter_spans_its_range() -> None:
    # Neither contrast nor saturation changes an even grey.
    image = Image.new("RGB", (2, 2), (160, 160, 160))
    factors = [np.asarray(jitter(image, rng(seed)))[0, 0, 0] / 160 for seed in range(200)]
    assert 0.49 < min(factors) < 0.53 and 1.47 < max(factors) < 1.51


def test_the_same_generator_gives_the_same_result() -> None:
    image, mask = random_pair(40, 50)
    crops = [augment(image, mask, (24, 24), IGNORE, rng(seed)) for seed in (3, 3, 4)]
    for first, second, other in zip(*crops, strict=True):
        assert_array_equal(first, second)
        assert (first != other).any()


def test_augment_leaves_its_arguments_alone() -> None:
    image, mask = random_pair(40, 50)
    before = image.tobytes(), mask.tobytes()
    pixels, labels = augment(image, mask, (40, 50), IGNORE, rng())
    assert (image.tobytes(), mask.tobytes()) == before
    assert pixels.tobytes() != before[0] and labels.tobytes() != before[1]


def test_all_six_scales_occur(monkeypatch) -> None:
    scales = []
    monkeypatch.setattr(
        transforms,
        "scaled_crop",
        lambda image, mask, scale, *_: (scales.append(float(scale)), (image, mask))[1],
    )
    image, mask = random_pair(4, 4)
    for seed in range(300):
        augment(image, mask, (4, 4), IGNORE, rng(seed))
    assert set(scales) == {0.75, 1.0, 1.25, 1.5, 1.75, 2.0}
    assert all(25 < scales.count(scale) < 80 for scale in set(scales))


def grey(value: int = 128, size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def test_relight_keeps_black_and_spans_its_range() -> None:
    """Of an even grey: gamma and gain by their formula, at the ends of their ranges and between."""
    found = np.array([np.asarray(relight(grey(), 1.0, rng(seed)))[8, 8] for seed in range(400)]) / 255
    value = 128 / 255
    lowest = value ** np.exp(0.5) * np.exp(-0.6 - 0.2)
    highest = value ** np.exp(-0.5) * np.exp(0.3 + 0.2)
    # Noise reaches 0.04 in deviation.
    assert lowest - 0.1 < found.min() < lowest + 0.1
    assert highest - 0.1 < found.max() <= 1
    assert np.asarray(relight(grey(0), 1.0, rng(3))).max() <= 0.2 * 255


def test_relight_casts_a_colour_or_takes_all() -> None:
    colourful = Image.fromarray(np.tile(np.array([[[200, 40, 90]]], np.uint8), (16, 16, 1)))
    gaps = []
    for seed in range(300):
        pixels = np.asarray(relight(colourful, 1.0, rng(seed)), np.float64).mean((0, 1))
        gaps.append(pixels.max() / max(pixels.min(), 1))
    gaps = np.array(gaps)
    # Without its own colour only the cast is left: at most e^0.4.
    without = (gaps < np.exp(0.4) * 1.05).mean()
    assert 0.05 < without < 0.16


def test_relight_blurs_and_adds_noise() -> None:
    edges = Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2 * 255, np.ones((4, 4))).astype(np.uint8))
    edges = edges.convert("RGB")
    blurred = noisy = 0
    for seed in range(300):
        pixels = np.asarray(relight(edges, 1.0, rng(seed)), np.float64)[..., 0]
        # Noise differs within a square of one colour, blur at its borders.
        noisy += len(np.unique(pixels[1:3, 1:3])) > 1 or len(np.unique(pixels[5:7, 1:3])) > 1
        blurred += pixels[0, 3] > 0.02 * 255
    assert 0.2 < blurred / 300 < 0.6 and 0.15 < noisy / 300 < 0.6


def test_without_strength_light_stays(monkeypatch) -> None:
    image, mask = random_pair(20, 24)
    plain = augment(image, mask, (9, 11), IGNORE, rng(5))
    again = augment(image, mask, (9, 11), IGNORE, rng(5), 0.0)
    assert_array_equal(plain[0], again[0])
    relit = augment(image, mask, (9, 11), IGNORE, rng(5), 1.0)
    assert not np.array_equal(plain[0], relit[0])
    unchanged = np.asarray(relight(image, 0.0, rng(0)))
    assert np.abs(unchanged.astype(int) - np.asarray(image)).max() == 0


def test_relight_does_not_touch_padding() -> None:
    image, mask = random_pair(8, 8)
    for seed in range(20):
        pixels, labels = augment(image, mask, (40, 40), IGNORE, rng(seed), 1.0)
        assert not pixels[labels == IGNORE].any()
