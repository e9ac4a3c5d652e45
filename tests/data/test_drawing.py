"""Regions of COCO's files against their definition, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from layouts import runs_of
from numpy.testing import assert_array_equal

from shelfkern.data.drawing import Drawing, Region, paint, runs

SHAPE = (23, 31)


def is_inside(x: float, y: float, polygon: np.ndarray) -> bool:
    """Whether a ray to the left meets an odd number of edges."""
    odd = False
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if (ay > y) != (by > y) and ax + (y - ay) * (bx - ax) / (by - ay) <= x:
            odd = not odd
    return odd


def painted(segmentation, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    labels = np.full(shape, 200, np.uint8)
    paint(labels, segmentation, 7)
    assert set(np.unique(labels)) <= {7, 200}
    return labels == 7


@pytest.mark.parametrize("seed", range(20))
def test_polygons_hold_the_pixels_whose_centres_they_hold(seed: int) -> None:
    """Any polygon: concave, crossing itself, beyond the image."""
    rng = np.random.default_rng(seed)
    polygon = rng.uniform(-6, 38, (rng.integers(3, 12), 2))
    if seed % 2:
        polygon = polygon.round()
    expected = [[is_inside(x + 0.5, y + 0.5, polygon) for x in range(31)] for y in range(23)]
    assert_array_equal(painted([polygon.ravel().tolist()]), expected)


def test_whole_pixels_are_themselves() -> None:
    expected = np.zeros(SHAPE, bool)
    expected[3:7, 5:11] = True
    assert_array_equal(painted([[5, 3, 11, 3, 11, 7, 5, 7]]), expected)
    everything = [[-50, -50, 90, -50, 90, 90, -50, 90]]
    assert painted(everything).all()


def test_polygons_side_by_side_share_no_pixel_and_leave_none() -> None:
    first = painted([[0, 0, 31, 0, 12.3, 23, 0, 23]])
    second = painted([[31, 0, 31, 23, 12.3, 23]])
    assert (first ^ second).all()


def test_several_polygons_are_one_region() -> None:
    polygons = [[0, 0, 9, 0, 9, 9, 0, 9], [5, 5, 14, 5, 14, 14, 5, 14]]
    assert_array_equal(painted(polygons), painted(polygons[:1]) | painted(polygons[1:]))


@pytest.mark.parametrize("polygon", [[], [3, 4], [3, 4, 9, 9], [3, 4, 9, 4, 20, 4], [40, 2, 50, 2, 45, 9]])
def test_polygons_without_a_pixel(polygon: list[float]) -> None:
    assert not painted([polygon]).any()


def test_run_lengths_go_down_the_columns() -> None:
    expected = np.zeros((3, 4), bool)
    expected[[2, 0, 1, 0], [0, 1, 1, 3]] = True
    assert_array_equal(painted({"size": [3, 4], "counts": [2, 3, 4, 1, 2]}, (3, 4)), expected)


def packed(lengths: list[int]) -> str:
    """Run lengths as text, by the format's description: groups of five bits, the sign in the last."""
    text = ""
    for index, length in enumerate(lengths):
        number = length - lengths[index - 2] if index > 2 else length
        while True:
            bits, number = number & 31, number >> 5
            more = number != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 * more))
            if not more:
                break
    return text


def test_text_that_pycocotools_packed() -> None:
    mask = np.random.default_rng(1).random((5, 7)) < 0.2
    assert packed(runs_of(mask)["counts"]) == "41521N9"
    assert_array_equal(painted({"size": [5, 7], "counts": "41521N9"}, (5, 7)), mask)


@pytest.mark.parametrize("seed", range(8))
def test_packed_run_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((40, 60)) < rng.choice([0.001, 0.1, 0.5, 0.99])
    lengths = runs_of(mask)["counts"]
    assert_array_equal(runs(lengths, mask.shape), mask)
    assert_array_equal(runs(packed(lengths), mask.shape), mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3]], "a polygon has 3 numbers, it must be pairs"),
        ([[1, 2, 3, float("nan")]], "pairs of finite x and y"),
        (
            {"size": [31, 23], "counts": [713]},
            r"its size is \(31, 23\), its image has .* \(23, 31\)",
        ),
        ({"size": [23, 31], "counts": [700, 12]}, "its run lengths cover 712 pixels of 713"),
        ({"size": [23, 31], "counts": [720, -7]}, "its run lengths cover 713"),
        ({"size": [23, 31], "counts": ""}, "its run lengths cover 0"),
        ({"size": [23, 31]}, "its run lengths cover 0"),
        ({"size": [23, 31], "counts": "a b"}, "its run lengths hold the character ' '"),
        ({"size": [23, 31], "counts": "1a"}, "end in the middle of a number"),
        ("polygon", "it is of type str, it must be polygons or run lengths"),
        (None, "it is of type NoneType"),
    ],
)
def test_regions_that_cannot_be_drawn(segmentation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        painted(segmentation)


def test_a_drawing_is_its_regions_in_order_on_a_background() -> None:
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    drawing = Drawing((20, 12), 9, [Region(1, 3, square), Region(2, 4, [[5, 0, 12, 0, 12, 5, 5, 5]])])
    expected = np.full((20, 12), 9)
    expected[:10, :10] = 3
    expected[:5, 5:] = 4
    assert_array_equal(drawing.labels(), expected)
    with pytest.raises(ValueError, match="annotation 61 cannot be drawn: a polygon has 1 numbers"):
        Drawing((20, 12), 0, [Region(61, 3, [[1]])]).labels()
