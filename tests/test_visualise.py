"""Labels as pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from shelfkern import visualise

PALETTE = ((200, 10, 10), (10, 200, 10), (10, 10, 200))
NAMES = ("road", "sky", "tree")


@pytest.fixture
def labels() -> np.ndarray:
    """Sky 60 of 100 pixels, tree 40, no road."""
    return np.repeat(np.array([1, 2], np.uint8), [60, 40]).reshape(10, 10)


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is written by the legend, in order."""
    written, draw = [], ImageDraw.ImageDraw.text

    def text(self, position, text, *args, **kwargs) -> None:
        written.append(text)
        draw(self, position, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def colours_of(image: Image.Image) -> set[tuple[int, int, int]]:
    return {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}


@pytest.mark.parametrize("count", [1, 2, 11, 21, 150, 256])
def test_the_default_palette_is_of_distinct_colours(count: int) -> None:
    palette = visualise.default_palette(count)
    assert len(palette) == len(set(palette)) == count
    assert all(type(value) is int and 0 <= value <= 255 for colour in palette for value in colour)


def test_the_first_colours_are_easily_told_apart() -> None:
    pairs = itertools.combinations(visualise.default_palette(11), 2)
    assert min(sum(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs) >= 30


def test_a_palette_begins_like_a_longer_one() -> None:
    assert visualise.default_palette(30)[:7] == visualise.default_palette(7)


def test_label_images_hold_labels_and_colours(tmp_path) -> None:
    labels = np.array([[0, 1, 2], [2, 2, 0]], np.uint8)
    visualise.label_image(labels, PALETTE).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), np.array(PALETTE, np.uint8)[labels])


@pytest.mark.parametrize("step", [1, -1])
def test_label_images_of_all_256_classes_in_any_layout(step: int, tmp_path) -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16).T[::step]
    palette = visualise.default_palette(256)
    visualise.label_image(labels, palette).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), np.array(palette, np.uint8)[labels])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.55, 1.0])
def test_blends(alpha: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    labels = np.random.default_rng(1).integers(0, 3, (5, 7), np.uint8)
    found = visualise.blend(Image.fromarray(pixels), labels, PALETTE, alpha)
    expected = (1 - alpha) * pixels + alpha * np.array(PALETTE)[labels]
    assert found.mode == "RGB" and np.abs(np.asarray(found) - expected).max() <= 1


def test_the_overlay_is_a_blend_above_a_legend(labels) -> None:
    image = Image.new("RGB", (10, 10), (90, 90, 90))
    overlay = visualise.overlay(image, labels, PALETTE, NAMES, alpha=0.3)
    top = np.asarray(overlay.crop((0, 0, 10, 10)))
    strip = overlay.crop((0, 10, 10, overlay.height))
    assert np.array_equal(top, np.asarray(visualise.blend(image, labels, PALETTE, 0.3)))
    assert np.array_equal(np.asarray(strip), np.asarray(visualise.legend(10, labels, PALETTE, NAMES)))
    assert colours_of(image) == {(90, 90, 90)}


def test_the_legend_names_what_occurs_most_frequent_first(labels, texts) -> None:
    strip = visualise.legend(400, labels, PALETTE, NAMES)
    assert texts == ["sky 60 %", "tree 40 %"] and strip.width == 400
    found = colours_of(strip)
    assert PALETTE[1] in found and PALETTE[2] in found and PALETTE[0] not in found


def test_equal_shares_are_in_the_order_of_the_classes(texts) -> None:
    visualise.legend(400, np.array([[2, 0, 1]], np.uint8), PALETTE, NAMES)
    assert [text.split()[0] for text in texts] == list(NAMES)


def test_small_shares(texts) -> None:
    labels = np.zeros((20, 20), np.uint8)
    labels[0, 0], labels[1, :4] = 1, 2
    visualise.legend(400, labels, PALETTE, NAMES)
    assert texts == ["road 99 %", "tree 1 %", "sky <1 %"]


def test_a_colour_is_beside_its_name(labels, monkeypatch) -> None:
    positions = {}

    def text(self, position, text, **kwargs) -> None:
        positions[text.split()[0]] = position

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    strip = visualise.legend(400, labels, PALETTE, NAMES)
    for name, (x, y) in positions.items():
        left = [strip.getpixel((column, round(y))) for column in range(round(x))]
        swatches = [colour for colour in left if colour in PALETTE]
        assert swatches[-1] == PALETTE[NAMES.index(name)]


@pytest.mark.parametrize("width", [1, 60, 250, 1000])
def test_legends_fit_their_width(width: int, texts, monkeypatch) -> None:
    names = [f"class number {index}" for index in range(12)]
    labels = np.arange(12, dtype=np.uint8)[None]
    strip = visualise.legend(width, labels, visualise.default_palette(12), names)
    assert strip.width == width and len(texts) == 12
    if width >= 250:
        assert set(visualise.default_palette(12)) <= colours_of(strip)
        assert (np.asarray(strip)[:, -2:] == (24, 24, 28)).all()


def test_narrow_legends_are_taller() -> None:
    labels = np.arange(12, dtype=np.uint8)[None]
    names = [f"class number {index}" for index in range(12)]
    heights = [
        visualise.legend(w, labels, visualise.default_palette(12), names).height for w in (130, 260, 400)
    ]
    assert heights[0] > heights[1] > heights[2]
