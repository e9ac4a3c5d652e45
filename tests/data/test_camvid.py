"""What CamVid has of its own; test_dataset.py reads it for all data sets."""

from __future__ import annotations

import re

import numpy as np
import pytest
from layouts import SIZE, pixels_of, save, values_of
from numpy.testing import assert_array_equal

from shelfkern.data import IGNORE, class_frequencies
from shelfkern.data.camvid import CLASSES, PALETTE, CamVid

RAW = tuple(range(12))


def test_a_test_split_may_lack_masks(tmp_path) -> None:
    save(tmp_path / "test" / "images" / "a.png", pixels_of(0))
    dataset = CamVid(tmp_path, "test")
    assert not dataset.labelled
    assert_array_equal(np.asarray(dataset[0].mask), np.full(SIZE[::-1], IGNORE))
    with pytest.raises(ValueError, match="no labelled pixel"):
        class_frequencies(dataset)
    save(tmp_path / "test" / "labels" / "a.png", values_of(0, RAW))
    assert CamVid(tmp_path, "test").labelled


def test_the_layout_of_the_segnet_authors(tmp_path) -> None:
    save(tmp_path / "val" / "a.png", pixels_of(3))
    save(tmp_path / "valannot" / "a.png", values_of(3, range(11)))
    (sample,) = iter(CamVid(tmp_path, "val"))
    assert_array_equal(np.asarray(sample.image), pixels_of(3))
    assert_array_equal(np.asarray(sample.mask), values_of(3, range(11)))


def test_every_class_has_a_name_and_a_colour_of_its_own() -> None:
    assert len(set(CLASSES)) == len(set(PALETTE)) == 11
    assert not [name for name in CLASSES if not re.fullmatch("[a-z ]+", name)]
