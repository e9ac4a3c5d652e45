"""PASCAL-Context's two layouts, built tiny."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, pixels_of, runs_of, save, values_of, with_palette
from numpy.testing import assert_array_equal

from shelfkern.data import IGNORE, check, open_dataset
from shelfkern.data.context import CATEGORIES, CLASSES, PALETTE, pascal_context


def make_detail(root: Path, masks: dict[str, np.ndarray], phases: dict[str, str]) -> Path:
    """Masks of categories, each a region."""
    folder = root / "VOCdevkit" / "VOC2010"
    images, annotations = [], []
    for index, (name, mask) in enumerate(masks.items()):
        save(folder / "JPEGImages" / f"{name}.jpg", pixels_of(index))
        record = {"file_name": f"{name}.jpg", "image_id": 2008000000 + index, "phase": phases[name]}
        images.append(record | {"height": mask.shape[0], "width": mask.shape[1]})
        for category in np.unique(mask).tolist():
            region = {"segmentation": runs_of(mask == category), "category_id": category, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": record["image_id"]} | region)
    path = folder / "trainval_merged.json"
    path.write_text(json.dumps({"images": images, "annos_segmentation": annotations, "categories": []}))
    return path


def categories(seed: int) -> np.ndarray:
    """A mask of all the classes' categories and one of none."""
    flat = np.resize([*CATEGORIES, 0, 431], 80)
    return np.random.default_rng(seed).permutation(flat).reshape(8, 10)


def make_indices(root: Path, split: str, name: str, raw: np.ndarray) -> Path:
    folder = root / "VOC2010"
    names = folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    names.parent.mkdir(parents=True, exist_ok=True)
    names.write_text(f"{name}\n")
    save(folder / "JPEGImages" / f"{name}.jpg", pixels_of(0, raw.shape[::-1]))
    return save(folder / "SegmentationClassContext" / f"{name}.png", with_palette(raw))


def test_classes_by_name_are_in_order_of_their_categories() -> None:
    assert len(CLASSES) == len(CATEGORIES) == len(set(PALETTE)) == 59
    assert sorted(CLASSES) == list(CLASSES) and sorted(set(CATEGORIES)) == list(CATEGORIES)
    known = {"aeroplane": 2, "person": 284, "sky": 360, "tree": 420, "wood": 458}
    assert {name: CATEGORIES[CLASSES.index(name)] for name in known} == known


def test_the_recipes_own_layout(tmp_path) -> None:
    masks = {name: categories(seed) for seed, name in enumerate("abc")}
    make_detail(tmp_path, masks, {"a": "train", "b": "val", "c": "train"})
    for name in masks:
        save(tmp_path / "VOCdevkit" / "VOC2010" / "JPEGImages" / f"{name}.jpg", pixels_of(0, (10, 8)))
    dataset = open_dataset("context", tmp_path, "train")
    assert list(dataset.names) == ["a", "c"] and dataset.labelled and dataset.classes == CLASSES
    index_of = {category: index for index, category in enumerate(CATEGORIES)}
    expected = np.vectorize(lambda category: index_of.get(category, IGNORE))(masks["c"])
    assert_array_equal(np.asarray(dataset[1].mask), expected)
    assert set(np.unique(expected)) == {*range(59), IGNORE}
    assert check(dataset) == [] and list(pascal_context(tmp_path / "VOCdevkit", "val").names) == ["b"]


def test_pixels_without_a_region_are_ignored_and_the_last_region_counts(tmp_path) -> None:
    path = make_detail(tmp_path, {"a": np.full(SIZE[::-1], 2)}, {"a": "val"})
    content = json.loads(path.read_text())
    left, top = np.zeros((2, 6, 8), bool)
    left[:, :5] = top[:2] = True
    first = content["annos_segmentation"][0]
    content["annos_segmentation"] = [
        first | {"segmentation": runs_of(left)},
        first | {"segmentation": runs_of(top), "category_id": 9},
    ]
    path.write_text(json.dumps(content))
    expected = np.full((6, 8), IGNORE)
    expected[:, :5] = 0
    expected[:2] = 1
    assert_array_equal(np.asarray(pascal_context(tmp_path, "val")[0].mask), expected)
    with pytest.raises(FileNotFoundError, match=f"{path} has no image of phase train"):
        pascal_context(tmp_path, "train")


def test_masks_of_indices(tmp_path) -> None:
    raw = values_of(3, (*range(60), 255), (10, 8))
    make_indices(tmp_path, "val", "a", raw)
    (sample,) = (pascal_context(tmp_path, "val")[index] for index in range(1))
    assert_array_equal(np.asarray(sample.mask), np.where((raw == 0) | (raw == 255), IGNORE, raw - 1.0))
    path = make_indices(tmp_path, "train", "b", np.full((6, 8), 60, np.uint8))
    (problem,) = check(pascal_context(tmp_path / "VOC2010", "train"))
    assert problem.startswith(f"{path} holds the value 60 in 48 pixels, it may hold 0 to 59, 255: ")


def test_neither_layout(tmp_path) -> None:
    (tmp_path / "VOC2010" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"has neither trainval_merged\.json nor .*val\.txt"):
        pascal_context(tmp_path, "val")
    with pytest.raises(ValueError, match="split is 'test', PASCAL-Context has train, val"):
        pascal_context(tmp_path, "test")
