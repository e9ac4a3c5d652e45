"""VOC's and SBD's layouts, built tiny."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from layouts import SIZE, pixels_of, save, values_of, with_palette
from numpy.testing import assert_allclose, assert_array_equal

from shelfkern.data import IGNORE, check, open_dataset
from shelfkern.data.voc import CLASSES, PALETTE, VOC, AugmentedVOC, palette

VALUES = (*range(21), 255)


def add_list(path: Path, names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names.split()))


def make_voc(root: Path, lists: dict[str, str], folder: str = "VOCdevkit/VOC2012") -> Path:
    """Every name a letter, whose place in the alphabet is its seed; masks of all but "test"."""
    base = root / folder
    for split, names in lists.items():
        add_list(base / "ImageSets" / "Segmentation" / f"{split}.txt", names)
        for name in names.split():
            save(base / "JPEGImages" / f"{name}.jpg", pixels_of(ord(name)))
            if split != "test":
                save(base / "SegmentationClass" / f"{name}.png", with_palette(values_of(ord(name), VALUES)))
    return base


def save_mat(path: Path, mask: np.ndarray, **parts: object) -> Path:
    """As SBD's cls/*.mat: a struct GTcls with Segmentation, Boundaries and CategoriesPresent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": np.unique(mask)}
    scipy.io.savemat(path, {"GTcls": struct | parts}, do_compression=True)
    return path


def make_sbd(root: Path, lists: dict[str, str], folder: str = "benchmark_RELEASE/dataset") -> Path:
    base = root / folder
    for split, names in lists.items():
        add_list(base / f"{split}.txt", names)
        for name in names.split():
            save(base / "img" / f"{name}.jpg", pixels_of(ord(name)))
            save_mat(base / "cls" / f"{name}.mat", values_of(ord(name) + 1000, range(21)))
    return base


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_in_its_layout(tmp_path, below: str) -> None:
    make_voc(tmp_path, {"train": "b a", "val": "c", "trainval": "a b c", "test": "d"})
    dataset = open_dataset("voc", tmp_path / below, "train")
    assert list(dataset.names) == ["b", "a"] and dataset.classes == CLASSES and dataset.labelled
    for sample in (dataset[index] for index in range(2)):
        assert_array_equal(np.asarray(sample.mask), values_of(ord(sample.name), VALUES))
        assert_allclose(np.asarray(sample.image, float), pixels_of(ord(sample.name)), rtol=0, atol=8)
    assert VOC(tmp_path / below, "trainval").names == ("a", "b", "c")
    test = VOC(tmp_path / below, "test")
    assert not test.labelled and test.names == ("d",) and check(test) == []
    assert_array_equal(np.asarray(test[0].mask), np.full(SIZE[::-1], IGNORE))


def test_colours_as_published() -> None:
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == 21
    known = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 8: (64, 0, 0), 15: (192, 128, 128)}
    known |= {16: (0, 64, 0), 20: (0, 64, 128), 255: (224, 224, 192)}
    colours = palette(256)
    assert {index: colours[index] for index in known} == known and len(set(colours)) == 256


def test_voc_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=f"root {tmp_path} is wrong: no JPEGImages in {tmp_path},"):
        VOC(tmp_path, "train")
    base = make_voc(tmp_path, {"train": "a"})
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing, it lists the split"):
        VOC(tmp_path, "val")
    add_list(base / "ImageSets" / "Segmentation" / "val.txt", "")
    with pytest.raises(FileNotFoundError, match=r"val\.txt is empty"):
        VOC(tmp_path, "val")
    with pytest.raises(ValueError, match="split is 'minival', VOC 2012 has train, val, trainval, test"):
        VOC(tmp_path, "minival")


def test_voc_refuses_other_indices(tmp_path) -> None:
    base = make_voc(tmp_path, {"train": "a b"})
    raw = values_of(0, range(21))
    raw[0, 0] = 21
    path = save(base / "SegmentationClass" / "a.png", raw)
    other = save(base / "SegmentationClass" / "b.png", pixels_of(0))
    first, second = check(VOC(tmp_path, "train"))
    assert first.startswith(f"{path} holds the value 21 in 1 pixels, it may hold 0 to 20, 255: ")
    assert second.startswith(f"{other} is of mode RGB, it must hold class indices")


LISTS = {"train": "a d e", "val": "f g", "trainval": "a d e f g"}
SBD_LISTS = {"train": "a b f", "val": "c g h", "train_noval": "a b"}


@pytest.mark.parametrize("folder", ["benchmark_RELEASE/dataset", "dataset", "sbd", "."])
def test_augmented_voc_is_both_without_val(tmp_path, folder: str) -> None:
    make_voc(tmp_path, LISTS)
    make_sbd(tmp_path, SBD_LISTS, folder)
    dataset = open_dataset("voc_aug", tmp_path, "train_aug")
    assert list(dataset.names) == ["a", "b", "c", "d", "e", "h"]
    for index, name in enumerate(dataset.names):
        sample = dataset[index]
        own = name in "ade"
        expected = values_of(ord(name), VALUES) if own else values_of(ord(name) + 1000, range(21))
        assert sample.mask.mode == "L"
        assert_array_equal(np.asarray(sample.mask), expected)
        assert_array_equal(np.asarray(dataset.mask(index)), expected)
        assert_allclose(np.asarray(sample.image, float), pixels_of(ord(name)), rtol=0, atol=8)


def test_augmented_voc_has_other_splits(tmp_path) -> None:
    make_voc(tmp_path, LISTS)
    make_sbd(tmp_path, SBD_LISTS)
    noval, val = AugmentedVOC(tmp_path, "train_noval"), AugmentedVOC(tmp_path, "val")
    assert noval.names == ("a", "b") and val.names == ("f", "g")
    whole = AugmentedVOC(tmp_path, "trainval_aug")
    assert whole.names == tuple("abcdefgh")
    assert_array_equal(np.asarray(whole[5].mask), values_of(ord("f"), VALUES))
    assert_array_equal(np.asarray(noval[0].mask), values_of(ord("a") + 1000, range(21)))
    assert_array_equal(np.asarray(val[0].mask), values_of(ord("f"), VALUES))
    with pytest.raises(ValueError, match="augmented VOC has train_aug, trainval_aug, train_noval, val"):
        AugmentedVOC(tmp_path, "test")


def test_sbd_missing(tmp_path) -> None:
    make_voc(tmp_path, LISTS)
    with pytest.raises(FileNotFoundError, match=f"no cls in {tmp_path / 'benchmark_RELEASE'}"):
        AugmentedVOC(tmp_path, "train_aug")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"no matrix"), "cannot be decoded, it may be damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be decoded, it may be damaged"),
        (lambda path: scipy.io.savemat(path, {"GTinst": 3}), "has no uint8 matrix GTcls.Segmentation"),
        (lambda path: save_mat(path, np.zeros((6, 8))), "has no uint8 matrix GTcls.Segmentation"),
        (lambda path: save_mat(path, np.zeros((8, 6), np.uint8)), "is 6 x 8, its image 8 x 6"),
        (lambda path: save_mat(path, np.full((6, 8), 21, np.uint8)), "holds the value 21 in 48 pixels"),
    ],
)
def test_damaged_masks_of_sbd(tmp_path, spoil, message: str) -> None:
    path = make_sbd(tmp_path, {"train_noval": "a"}) / "cls" / "a.mat"
    spoil(path)
    (problem,) = check(AugmentedVOC(tmp_path, "train_noval"))
    assert problem.startswith(f"{path} {message}") and "\n" not in problem


def test_sbd_without_scipy(tmp_path, monkeypatch) -> None:
    make_sbd(tmp_path, {"train_noval": "a"})
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    monkeypatch.setitem(__import__("sys").modules, "scipy", None)
    with pytest.raises(ImportError, match=r"SBD's masks need SciPy: pip install 'shelfkern\[train\]'"):
        AugmentedVOC(tmp_path, "train_noval")
