"""Cityscapes' layout, built tiny."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, pixels_of, save, values_of
from numpy.testing import assert_array_equal

from shelfkern.data import IGNORE, check, open_dataset
from shelfkern.data.cityscapes import CLASSES, LABEL_IDS, PALETTE, Cityscapes, CoarseCityscapes

# From the table of labels that the benchmark publishes: id, and id to train on where there is one.
TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def add(root: Path, split: str, name: str, seed: int, annotations: str = "gtFine") -> Path:
    city = name.split("_")[0]
    save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", pixels_of(seed))
    mask = root / annotations / split / city / f"{name}_{annotations}_labelIds.png"
    for kind in ("color", "instanceIds"):
        save(mask.with_name(f"{name}_{annotations}_{kind}.png"), pixels_of(seed))
    return save(mask, values_of(seed, range(34)))


def trained_on(raw: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: TRAIN_IDS.get(value, IGNORE))(raw)


def test_fine_annotations(tmp_path) -> None:
    names = {"zurich_000000_000019": 1, "aachen_000001_000019": 2, "aachen_000000_000019": 3}
    for name, seed in names.items():
        add(tmp_path, "train", name, seed)
    dataset = open_dataset("cityscapes", tmp_path, "train")
    assert list(dataset.names) == sorted(names) and dataset.classes == CLASSES and dataset.labelled
    for index, name in enumerate(dataset.names):
        sample = dataset[index]
        assert_array_equal(np.asarray(sample.image), pixels_of(names[name]))
        assert_array_equal(np.asarray(sample.mask), trained_on(values_of(names[name], range(34))))
        assert_array_equal(np.asarray(dataset.mask(index)), np.asarray(sample.mask))


def test_coarse_annotations(tmp_path) -> None:
    add(tmp_path, "train_extra", "ulm_000000_000019", 4, "gtCoarse")
    dataset = open_dataset("cityscapes_coarse", tmp_path, "train_extra")
    assert_array_equal(np.asarray(dataset[0].mask), trained_on(values_of(4, range(34))))
    assert check(dataset) == []


def test_splits(tmp_path) -> None:
    for split, name in (("train", "b_1"), ("val", "a_1"), ("test", "c_1")):
        add(tmp_path, split, name, 0)
    assert Cityscapes(tmp_path, "trainval").names == ("b_1", "a_1")
    test = Cityscapes(tmp_path, "test")
    # The test split's files are there, and hold no truth.
    assert not test.labelled and check(test) == []
    assert_array_equal(np.asarray(test[0].mask), np.full(SIZE[::-1], IGNORE))
    with pytest.raises(ValueError, match="'train_extra', Cityscapes gtFine has train, val, trainval, test"):
        Cityscapes(tmp_path, "train_extra")
    with pytest.raises(ValueError, match="'test', Cityscapes gtCoarse has train, val, train_extra"):
        CoarseCityscapes(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit/val holds no CITY/NAME_leftImg8bit\.png"):
        Cityscapes(tmp_path / "leftImg8bit", "val")


def test_a_missing_mask_and_one_of_ids_to_train_on(tmp_path) -> None:
    first, second = add(tmp_path, "val", "a_1", 0), add(tmp_path, "val", "a_2", 0)
    first.unlink()
    save(second, values_of(0, (0, 18, 255)))
    assert check(Cityscapes(tmp_path, "val")) == [
        f"{first} is missing",
        f"{second} holds the value 255 in 16 pixels, it may hold 0 to 33: "
        "give those pixels label ids, not ids to train on",
    ]


def test_classes_are_the_published_ones() -> None:
    assert {value: index for index, value in enumerate(LABEL_IDS)} == TRAIN_IDS
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == 19
    assert dict(zip(CLASSES, PALETTE, strict=True))["car"] == (0, 0, 142)
