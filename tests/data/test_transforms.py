"""Augmentation, pixel by pixel on small images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageFilter

from shelfkern.data import IGNORE
from shelfkern.data.transforms import (
    Augmentation,
    jitter,
    mixed,
    padded,
    random_window,
    relight,
    rotation,
    source_box,
    turned,
)

SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_pair(height: int, width: int, seed: int = 0) -> tuple[Image.Image, Image.Image]:
    pixels = rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    mask = rng(seed + 1).integers(0, 11, (height, width), np.uint8)
    return Image.fromarray(pixels), Image.fromarray(mask)


def published(crop: tuple[int, int], base_size: int) -> Augmentation:
    """For ShelfNet50 and 101."""
    return Augmentation(crop, scale_range=(0.5, 2.0), base_size=base_size, rotation=10, blur=0.5)


def published_lw(crop: tuple[int, int]) -> Augmentation:
    return Augmentation(crop, SCALES, jitter=(0.5, 0.5, 0.5))


def plain(crop: tuple[int, int], **changes) -> Augmentation:
    """Nothing but a crop, and what is asked for."""
    return dataclasses.replace(Augmentation(crop, mirror=0), **changes)


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
    crop, crop_mask = plain((9, 11), scales=(scale,))(image, mask, rng(seed))
    (corner,) = windows_alike(resized_by_hand(image, scale), crop)
    assert crop.shape == (9, 11, 3) and crop_mask.shape == (9, 11)
    # Where a sample falls on the edge of two pixels, either is nearest.
    fits = np.zeros((9, 11), bool)
    for dy in (-1e-6, 1e-6):
        for dx in (-1e-6, 1e-6):
            rows, columns = nearest(corner[0], 9, scale, dy), nearest(corner[1], 11, scale, dx)
            fits |= np.asarray(mask)[np.ix_(rows, columns)] == crop_mask
    assert fits.all()


def test_every_window_occurs() -> None:
    image, mask = random_pair(4, 5)
    crops = [plain((2, 3))(image, mask, rng(seed))[0] for seed in range(100)]
    found = {corner for crop in crops for corner in windows_alike(np.asarray(image, float), crop)}
    assert found == {(y, x) for y in range(3) for x in range(3)}


def test_windows_are_cut_to_the_image() -> None:
    assert random_window((5, 40), (8, 8), rng())[0::2] == (0, 5)
    assert random_window((40, 5), (8, 8), rng())[1::2] == (0, 5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(5, 7), (7, 5), (31, 33)])
def test_sizes_that_do_not_scale_to_whole_pixels(size: tuple[int, int], scale: float) -> None:
    image, mask = random_pair(*size)
    whole = (round(size[0] * scale), round(size[1] * scale))
    pixels, labels = plain(whole, scales=(scale,))(image, mask, rng())
    assert (labels != IGNORE).all()
    assert_allclose(pixels.astype(float), resized_by_hand(image, scale), rtol=0, atol=1.01)


def test_an_image_scaled_to_nothing_keeps_a_pixel() -> None:
    pixels, labels = plain((2, 2), scales=(0.01,), rotation=10)(*random_pair(9, 9), rng())
    assert pixels.shape == (2, 2, 3) and (labels != IGNORE).sum() <= 1


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16)])
def test_a_factor_of_the_base_size_is_of_the_shorter_side(size: tuple[int, int]) -> None:
    image, mask = random_pair(*size)
    augmentation = plain((100, 100), scale_range=(0.5, 2.0), base_size=20)
    sides = set()
    for seed in range(300):
        inner = augmentation(image, mask, rng(seed))[1] != IGNORE
        found = inner.any(1).sum(), inner.any(0).sum()
        sides.add(min(found))
        assert max(found) == round(max(size) * min(found) / min(size))
    assert sides == set(range(10, 41))


@pytest.mark.parametrize("crop", [(30, 20), (7, 61), (13, 13)])
def test_an_image_below_the_crop_is_enlarged_to_it(crop: tuple[int, int]) -> None:
    image, mask = random_pair(10, 13)
    factor = max(0.75, crop[0] / 10, crop[1] / 13)
    for seed in range(6):
        filled = plain(crop, scales=(0.75,), fill=True)(image, mask, rng(seed))
        assert (filled[1] != IGNORE).all()
        for found, expected in zip(
            filled, plain(crop, scales=(factor,))(image, mask, rng(seed)), strict=True
        ):
            assert_array_equal(found, expected)


def test_an_image_above_the_crop_is_not_enlarged() -> None:
    image, mask = random_pair(20, 24)
    for seed in range(6):
        found = plain((15, 10), scales=(0.75,), fill=True)(image, mask, rng(seed))
        assert_array_equal(found[0], plain((15, 10), scales=(0.75,))(image, mask, rng(seed))[0])


def test_factors_are_spread_evenly() -> None:
    image, mask = random_pair(20, 20)
    augmentation = plain((60, 60), scale_range=(1.0, 3.0))
    rows = [(augmentation(image, mask, rng(seed))[1] != IGNORE).any(1).sum() for seed in range(300)]
    assert min(rows) <= 21 and max(rows) >= 59
    counts = np.histogram(rows, 4, (20, 60))[0]
    assert counts.min() > 50


def test_all_scales_occur() -> None:
    image, mask = random_pair(4, 4)
    augmentation = plain((8, 8), scales=SCALES)
    rows = [(augmentation(image, mask, rng(seed))[1] != IGNORE).any(1).sum() for seed in range(300)]
    assert set(rows) == {3, 4, 5, 6, 7, 8}
    assert all(25 < rows.count(row) < 80 for row in set(rows))


DEGREES = [-10.0, 3.3, 10.0, 45.0, 170.0]


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("window", [(0, 0, 40, 30), (5, 7, 16, 30), (24, 0, 40, 9)])
def test_a_turned_window_is_one_of_the_turned_image(degrees: float, window) -> None:
    image, mask = random_pair(30, 40)
    matrix = rotation(image.size, degrees)
    box = source_box(window, image.size, matrix)
    found, labels = turned(image.crop(box), mask.crop(box), window, box, matrix)
    whole = image.rotate(degrees, Image.Resampling.BILINEAR).crop(window)
    assert_allclose(np.asarray(found, int), np.asarray(whole, int), rtol=0, atol=1)
    expected = np.asarray(mask.rotate(degrees, fillcolor=IGNORE).crop(window))
    # Where a sample falls on the edge of two pixels, either is nearest.
    assert np.mean(expected != np.asarray(labels)) <= 0.005


@pytest.mark.parametrize(
    ("size", "degrees"), [((16, 16), 12.8), ((40, 30), 6.55), ((40, 30), 3.2), ((23, 17), 9.25)]
)
def test_no_label_without_its_colour(size: tuple[int, int], degrees: float) -> None:
    """At turns where Pillow's bilinear and nearest sampling disagree on where the image ends."""
    image, mask, window = Image.new("RGB", size, (255, 255, 255)), Image.new("L", size, 3), (0, 0, *size)
    found, labels = (np.asarray(one) for one in turned(image, mask, window, window, rotation(size, degrees)))
    assert set(np.unique(labels)) == {3, IGNORE} and (found[labels == 3] == 255).all()


def test_only_what_a_window_shows_is_resampled() -> None:
    size = (400, 300)
    left, top, right, bottom = source_box((180, 140, 220, 160), size, rotation(size, 10))
    assert right - left <= 40 * np.cos(np.pi / 18) + 20 * np.sin(np.pi / 18) + 4
    assert bottom - top <= 40 * np.sin(np.pi / 18) + 20 * np.cos(np.pi / 18) + 4


def test_a_window_that_shows_nothing_of_the_image() -> None:
    image, mask = random_pair(4, 400)
    window = (0, 0, 9, 4)
    matrix = rotation(image.size, 90)
    box = source_box(window, image.size, matrix)
    found, labels = turned(image.crop(box), mask.crop(box), window, box, matrix)
    assert not np.asarray(found).any() and (np.asarray(labels) == IGNORE).all()


def test_rotation_spans_its_range_both_ways() -> None:
    image, mask = random_pair(30, 30)
    lost = [(plain((30, 30), rotation=10)(image, mask, rng(seed))[1] == IGNORE).mean() for seed in range(200)]
    furthest = np.mean(np.asarray(mask.rotate(10, fillcolor=IGNORE)) == IGNORE)
    assert min(lost) < 0.1 * furthest and 0.95 * furthest < max(lost) <= furthest
    # At the left of the upper edge a corner comes in on turns one way only.
    left = [plain((30, 30), rotation=10)(image, mask, rng(seed))[1][0, 2] == IGNORE for seed in range(200)]
    assert 0.25 < np.mean(left) < 0.5


def blocks() -> tuple[Image.Image, Image.Image, np.ndarray]:
    """Squares of 12 x 12 pixels, each of its own class and colour."""
    mask = np.kron(np.arange(12).reshape(3, 4) % 11, np.ones((12, 12))).astype(np.uint8)
    palette = rng(5).permutation(np.arange(33) * 7).reshape(11, 3).astype(np.uint8)
    return Image.fromarray(palette[mask]), Image.fromarray(mask), palette


def inside(labels: np.ndarray) -> np.ndarray:
    """Where all of 7 x 7 labels are alike, the border left out."""
    views = np.lib.stride_tricks.sliding_window_view(labels, (7, 7)).reshape(
        *np.subtract(labels.shape, 6), -1
    )
    return np.pad(views.min(-1) == views.max(-1), 3)


WAYS = {
    "scales": plain((26, 34), scales=SCALES, mirror=0.5),
    "rotation": plain((26, 34), scales=(1.0, 1.5), rotation=40, mirror=0.5),
    "published": dataclasses.replace(published((26, 34), 48), scale_range=(1.0, 1.6), blur=0),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("way", WAYS)
def test_image_and_mask_stay_aligned(way: str, seed: int) -> None:
    image, mask, palette = blocks()
    pixels, labels = WAYS[way](image, mask, rng(seed))
    clear = inside(labels) & (labels != IGNORE)
    assert clear.sum() > 50 and len(np.unique(labels[clear])) > 1
    assert_array_equal(pixels[clear], palette[labels[clear]])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("way", WAYS)
def test_masks_move_as_images_of_their_values_do(way: str, seed: int) -> None:
    """Of a slope, along which the value of a pixel says where it was, to a pixel or two."""
    y, x = np.indices((48, 60))
    for values in (4 * y + 1, 4 * x + 1):
        mask = Image.fromarray(values.astype(np.uint8))
        pixels, labels = WAYS[way](mask.convert("RGB"), mask, rng(seed))
        inner = labels != IGNORE
        moved = pixels[inner][:, 0].astype(int) - labels[inner]
        # A nearest neighbour is up to half a pixel off, twice where it is turned as well, and hardly on
        # average; a turn rounds colours down.
        assert np.abs(moved).max() <= (2.6 if way == "scales" else 4.6) and np.abs(moved.mean()) < 1.6
        assert (pixels[inner] > 0).all() and (pixels[~inner] > 0).sum() < 30


@pytest.mark.parametrize("way", [*WAYS, "lw"])
def test_labels_are_never_interpolated(way: str) -> None:
    image, _ = random_pair(40, 50)
    mask = Image.fromarray(rng().choice(np.array([0, 7, 200], np.uint8), (40, 50)))
    augmentation = WAYS.get(way, published_lw((30, 30)))
    found = set()
    for seed in range(20):
        found |= set(np.unique(augmentation(image, mask, rng(seed))[1]).tolist())
    assert {0, 7, 200} <= found <= {0, 7, 200, IGNORE}


@pytest.mark.parametrize("size", [(32, 30), (8, 30), (32, 8)])
def test_padding_is_black_and_ignored(size: tuple[int, int]) -> None:
    image, mask = Image.new("RGB", (20, 16), (250, 240, 255)), Image.new("L", (20, 16), 3)
    lit = np.zeros(size, bool)
    lit[:12, :15] = True
    for seed in range(12):
        augmentation = dataclasses.replace(published_lw(size), scales=(0.75,))
        pixels, labels = augmentation(image, mask, rng(seed))
        assert (pixels.shape, pixels.dtype) == ((*size, 3), np.uint8)
        assert (labels.shape, labels.dtype) == (size, np.uint8)
        filled = lit if labels[0, 0] == 3 else lit[:, ::-1]
        assert_array_equal(labels, np.where(filled, 3, IGNORE))
        assert (pixels[~filled] == 0).all() and (pixels[filled] > 80).all()


@pytest.mark.parametrize("recipe", [published, published_lw])
def test_no_colour_of_the_padding_enters_the_image(recipe) -> None:
    """Of a white image all labelled pixels stay of one colour: blur, contrast and turns mix in no black."""
    image, mask = Image.new("RGB", (20, 16), (255, 255, 255)), Image.new("L", (20, 16), 3)
    augmentation = recipe((40, 40), 16) if recipe is published else recipe((40, 40))
    augmentation = dataclasses.replace(augmentation, blur=1.0, light=0.0)
    for seed in range(20):
        pixels, labels = augmentation(image, mask, rng(seed))
        assert (labels == IGNORE).any() and len(np.unique(pixels[labels == 3])) == 1
        assert_array_equal(pixels[labels == IGNORE], 0)


def test_padding_does_not_change_the_draws() -> None:
    image, mask = random_pair(6, 8)
    augmentation = dataclasses.replace(published_lw((6, 8)), scales=(), light=1.0, blur=0.5)
    wider = dataclasses.replace(augmentation, crop=(20, 30))
    for seed in range(6):
        pixels, labels = augmentation(image, mask, rng(seed))
        wide, wide_labels = wider(image, mask, rng(seed))
        part = wide_labels[:6] != IGNORE
        assert_array_equal(wide_labels[:6][part].reshape(6, 8), labels)
        assert_array_equal(wide[:6][part].reshape(6, 8, 3), pixels)


def test_padded_is_top_left() -> None:
    image, mask = random_pair(3, 4)
    found, labels = padded(image, mask, (5, 6))
    assert_array_equal(np.asarray(found)[:3, :4], np.asarray(image))
    assert_array_equal(np.asarray(labels)[:3, :4], np.asarray(mask))
    assert (np.asarray(labels)[3:] == IGNORE).all() and (np.asarray(labels)[:, 4:] == IGNORE).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_mirror_turns_image_and_mask_as_often_as_asked(probability: float) -> None:
    image, mask = random_pair(6, 7)
    straight, labels = np.asarray(image), np.asarray(mask)
    count = 0
    for seed in range(100):
        pixels, found = plain((6, 7), mirror=probability)(image, mask, rng(seed))
        is_mirrored = not np.array_equal(pixels, straight)
        step = -1 if is_mirrored else 1
        assert_array_equal(pixels, straight[:, ::step])
        assert_array_equal(found, labels[:, ::step])
        assert pixels.flags.c_contiguous and found.flags.c_contiguous
        count += is_mirrored
    assert abs(count - 100 * probability) < 20 * (0 < probability < 1) + 1


def test_blur_is_gaussian_of_a_pixel_at_most() -> None:
    image, mask = random_pair(12, 12)
    straight = np.asarray(image, float)
    strongest = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), float)
    furthest = np.abs(strongest - straight).mean()
    changes = []
    for seed in range(200):
        pixels, labels = plain((12, 12), blur=0.5)(image, mask, rng(seed))
        assert_array_equal(labels, np.asarray(mask))
        changes.append(np.abs(pixels - straight).mean())
    assert 0.35 < np.mean(np.array(changes) > 0) < 0.6
    assert 0.95 * furthest < max(changes) <= furthest


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
    found = np.asarray(jitter(image, (0.5, 0.5, 0.5), factors), np.float64)
    assert factors.ranges == [(0.5, 1.5)] * 3 and not factors.factors
    pixels = np.asarray(image, np.float64)
    dull = DULL[what](pixels)
    assert_allclose(found, np.clip(dull + factor * (pixels - dull), 0, 255), rtol=0, atol=1.6)


def test_jitter_spans_its_range() -> None:
    # Neither contrast nor saturation changes an even grey.
    image = Image.new("RGB", (2, 2), (160, 160, 160))
    factors = [np.asarray(jitter(image, (0.5, 0.5, 0.5), rng(seed)))[0, 0, 0] / 160 for seed in range(200)]
    assert 0.49 < min(factors) < 0.53 and 1.47 < max(factors) < 1.51


def test_jitter_of_nothing_leaves_the_image() -> None:
    image, _ = random_pair(6, 7)
    assert jitter(image, (0.0, 0.0, 0.0), rng()) is image


@pytest.mark.parametrize("augmentation", [published((24, 24), 40), published_lw((24, 24))])
def test_the_same_generator_gives_the_same_result(augmentation: Augmentation) -> None:
    image, mask = random_pair(40, 50)
    crops = [augmentation(image, mask, rng(seed)) for seed in (3, 3, 4)]
    for first, second, other in zip(*crops, strict=True):
        assert_array_equal(first, second)
        assert (first != other).any()


@pytest.mark.parametrize("augmentation", [published((24, 24), 40), published_lw((40, 50))])
def test_arguments_are_left_alone(augmentation: Augmentation) -> None:
    image, mask = random_pair(40, 50)
    before = image.tobytes(), mask.tobytes()
    augmentation(image, mask, rng())
    assert (image.tobytes(), mask.tobytes()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (0, 8)}, r"^crop is \(0, 8\), it must"),
        ({"crop": (8,)}, "^crop is "),
        ({"scales": (1.0,), "scale_range": (1.0, 2.0)}, "give one of them"),
        ({"scales": (1.0, 0.0)}, "^scales are .* above 0"),
        ({"scale_range": (2.0, 1.0)}, "the lowest and the highest"),
        ({"scale_range": (-1.0, 1.0)}, "above 0"),
        ({"base_size": 0}, "^base_size is 0"),
        ({"mirror": 1.5}, "^mirror is 1.5, a probability"),
        ({"blur": -0.1}, "^blur is -0.1, a probability"),
        ({"mix": 1.1}, "^mix is 1.1, a probability"),
        ({"rotation": -3}, "^rotation is -3, it may be 0 to 180"),
        ({"jitter": (0.5, 0.5)}, "^jitter is"),
        ({"jitter": (0.5, 0.5, 1.5)}, "^jitter is"),
        ({"light": -1}, "^light is -1"),
    ],
)
def test_settings_that_mean_nothing(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**{"crop": (8, 8)} | changes)


def test_both_published_sets_can_be_written_in_toml() -> None:
    tomllib = pytest.importorskip("tomllib")
    pydantic = pytest.importorskip("pydantic")
    text = """
    [deep]
    crop = [512, 512]
    scale_range = [0.5, 2]
    base_size = 540
    rotation = 10
    blur = 0.5
    [lw]
    crop = [1024, 1024]
    scales = [0.75, 1, 1.25, 1.5, 1.75, 2]
    fill = true
    jitter = [0.5, 0.5, 0.5]
    """
    read = pydantic.TypeAdapter(dict[str, Augmentation]).validate_python(tomllib.loads(text))
    assert read == {
        "deep": published((512, 512), 540),
        "lw": dataclasses.replace(published_lw((1024, 1024)), fill=True),
    }


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


def test_without_strength_light_stays() -> None:
    image, mask = random_pair(20, 24)
    straight = published_lw((9, 11))(image, mask, rng(5))
    relit = dataclasses.replace(published_lw((9, 11)), light=1.0)(image, mask, rng(5))
    assert not np.array_equal(straight[0], relit[0])
    unchanged = np.asarray(relight(image, 0.0, rng(0)))
    assert np.abs(unchanged.astype(int) - np.asarray(image)).max() == 0


def test_relight_does_not_touch_padding() -> None:
    image, mask = random_pair(8, 8)
    augmentation = dataclasses.replace(published_lw((40, 40)), light=1.0, rotation=10)
    for seed in range(20):
        pixels, labels = augmentation(image, mask, rng(seed))
        assert not pixels[labels == IGNORE].any()


def mixed_pair(seed: int, classes: list[int]) -> tuple[np.ndarray, ...]:
    """An image and its mask, and another with the given labels, each in some pixel."""
    image, mask = map(np.array, random_pair(12, 14, seed))
    other, _ = map(np.array, random_pair(12, 14, seed + 50))
    other_mask = rng(seed + 70).permutation(np.resize(np.array(classes, np.uint8), 12 * 14)).reshape(12, 14)
    mask[:2] = IGNORE
    return image, mask, other, other_mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("classes", [[0, 3, 4, 9], [1, 5, 200], [7, 2, IGNORE], [0, 1, 2, 3, IGNORE]])
def test_mixed_takes_all_pixels_of_half_the_classes(classes: list[int], seed: int) -> None:
    image, mask, other, other_mask = mixed_pair(seed, classes)
    # Labels that the first mask has not, so that they show what was taken.
    mask[mask != IGNORE] += 100
    found, labels = mixed(image, mask, other, other_mask, rng(seed))
    known = [label for label in classes if label != IGNORE]
    taken = [label for label in known if (labels[other_mask == label] == label).all()]
    assert len(taken) == len(known) // 2
    over = np.isin(other_mask, taken)
    assert_array_equal(labels[over], other_mask[over])
    assert_array_equal(found[over], other[over])
    assert_array_equal(labels[~over], mask[~over])
    assert_array_equal(found[~over], image[~over])
    assert found.dtype == labels.dtype == np.uint8


@pytest.mark.parametrize("classes", [[4], [4, IGNORE], [IGNORE]])
def test_mixed_takes_nothing_of_fewer_than_two_classes(classes: list[int]) -> None:
    image, mask, other, other_mask = mixed_pair(0, classes)
    found, labels = mixed(image, mask, other, other_mask, rng())
    assert_array_equal(found, image)
    assert_array_equal(labels, mask)


def test_mixed_takes_every_class_as_often() -> None:
    pair = mixed_pair(0, [11, 12, 13, 14])
    labels = [np.unique(mixed(*pair, rng(seed))[1]) for seed in range(300)]
    counts = [sum(label in found for found in labels) for label in (11, 12, 13, 14)]
    assert all(110 < count < 190 for count in counts)


def test_mixed_repeats_and_leaves_its_arguments() -> None:
    pair = mixed_pair(0, list(range(8)))
    before = [array.copy() for array in pair]
    first, second, third = (mixed(*pair, rng(seed)) for seed in (3, 3, 4))
    assert all(map(np.array_equal, first, second)) and not all(map(np.array_equal, first, third))
    for array in first:
        assert not any(np.shares_memory(array, one) for one in pair)
    assert all(map(np.array_equal, pair, before))
