"""What all data sets share: reading lazily, checks of masks and images, frequencies."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from layouts import SIZE, pixels_of, save, values_of, with_palette
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from shelfkern.data import DATASETS, IGNORE, check, class_frequencies, open_dataset
from shelfkern.data.camvid import CLASSES, CamVid
from shelfkern.data.reading import ranges
from shelfkern.train import recipe as recipes

RAW = tuple(range(12))


def add(root: Path, name: str, seed: int = 0, split: str = "train") -> tuple[Path, Path]:
    image = save(root / split / "images" / f"{name}.jpg", pixels_of(seed))
    return image, save(root / split / "labels" / f"{name}.png", values_of(seed, RAW))


def refused(root: Path, error: type[Exception]) -> str:
    """Why the first training sample cannot be had, which `mask` alone says too, and `check` collects."""
    dataset = CamVid(root, "train")
    with pytest.raises(error) as info:
        dataset[0]
    message = str(info.value)
    assert "\n" not in message and check(dataset) == [message]
    return message


def mask_refused(root: Path, error: type[Exception]) -> str:
    message = refused(root, error)
    with pytest.raises(error) as info:
        CamVid(root, "train").mask(0)
    assert str(info.value) == message
    return message


def test_samples_come_by_name_with_their_own_pixels(tmp_path) -> None:
    seeds = {"b_2": 1, "a_9": 2, "b_10": 3, "c": 4}
    for name, seed in seeds.items():
        add(tmp_path, name, seed)
    dataset = open_dataset("camvid", str(tmp_path), "train")
    assert list(dataset.names) == ["a_9", "b_10", "b_2", "c"] and len(dataset) == 4
    assert dataset.classes == CLASSES and len(dataset.palette) == 11 and dataset.labelled
    for index, name in enumerate(dataset.names):
        sample = dataset[index]
        assert (sample.name, sample.image.mode, sample.mask.mode) == (name, "RGB", "L")
        raw = values_of(seeds[name], RAW)
        assert_array_equal(np.asarray(sample.mask), np.where(raw == 11, IGNORE, raw))
        assert_array_equal(np.asarray(dataset.mask(index)), np.asarray(sample.mask))
        assert_allclose(np.asarray(sample.image, float), pixels_of(seeds[name]), rtol=0, atol=8)
    with pytest.raises(IndexError):
        dataset[4]


def test_files_are_read_when_asked_for(tmp_path) -> None:
    add(tmp_path, "a", 0)
    dataset = CamVid(tmp_path, "train")
    add(tmp_path, "a", 5)
    raw = values_of(5, RAW)
    assert_array_equal(np.asarray(dataset[0].mask), np.where(raw == 11, IGNORE, raw))


def test_a_dataset_travels_to_workers(tmp_path) -> None:
    add(tmp_path, "a")
    dataset = CamVid(tmp_path, "train")
    again = pickle.loads(pickle.dumps(dataset))
    assert_array_equal(np.asarray(again[0].mask), np.asarray(dataset[0].mask))
    assert again.names == dataset.names and again.classes == dataset.classes


def test_splits_are_apart_and_other_files_are_passed_over(tmp_path) -> None:
    add(tmp_path, "a")
    add(tmp_path, "b", split="val")
    (tmp_path / "train" / "images" / "notes.txt").write_text("no picture")
    save(tmp_path / "train" / "labels" / "without_image.png", values_of(0, RAW))
    assert CamVid(tmp_path, "train").names == ("a",) and CamVid(tmp_path, "val").names == ("b",)


def test_unknown_names_and_splits(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^dataset is 'kitti', it may be .*camvid"):
        open_dataset("kitti", tmp_path, "train")
    with pytest.raises(ValueError, match=r"^split is 'minival', CamVid has train, val, test$"):
        open_dataset("camvid", tmp_path, "minival")


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_split_says_where_it_looked(tmp_path, made: bool) -> None:
    folder = tmp_path / "train" / "images"
    if made:
        folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as info:
        CamVid(tmp_path, "train")
    assert str(info.value).startswith(f"{folder} {'holds no image' if made else 'is no folder'}, there must")


def test_a_grey_photograph_becomes_rgb(tmp_path) -> None:
    image, _ = add(tmp_path, "a")
    save(image, Image.new("L", SIZE, 90))
    assert_array_equal(np.asarray(CamVid(tmp_path, "train")[0].image), np.full((6, 8, 3), 90))


def test_a_palette_mask_gives_its_indices(tmp_path) -> None:
    _, mask = add(tmp_path, "a")
    save(mask, with_palette(values_of(3, range(11))))
    with Image.open(mask) as file:
        assert file.mode == "P"
    sample = CamVid(tmp_path, "train")[0]
    assert sample.mask.mode == "L"
    assert_array_equal(np.asarray(sample.mask), values_of(3, range(11)))


def test_missing_files(tmp_path) -> None:
    image, mask = add(tmp_path, "a")
    dataset = CamVid(tmp_path, "train")
    mask.unlink()
    assert mask_refused(tmp_path, FileNotFoundError) == f"{mask} is missing"
    image.unlink()
    assert check(dataset) == [f"{image} is missing"]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_file(tmp_path, which: int, suffix: str) -> None:
    path = add(tmp_path, "a")[which]
    picture = save(tmp_path / f"whole{suffix}", np.random.default_rng(0).integers(0, 99, (64, 64), np.uint8))
    for content in (picture.read_bytes()[:1500], b"", b"no picture", picture.read_bytes()[:40]):
        path.write_bytes(content)
        assert refused(tmp_path, OSError).startswith(f"{path} cannot be decoded, it may be damaged: ")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_an_image_of_more_than_8_bits(tmp_path, mode: str) -> None:
    image, _ = add(tmp_path, "a")
    image.unlink()
    path = save(image.with_suffix(".tif"), Image.new(mode, SIZE))
    assert refused(tmp_path, ValueError).startswith(f"{path} is of mode {mode}, it must be grey or RGB of 8")


def test_a_mask_of_the_wrong_size(tmp_path) -> None:
    _, mask = add(tmp_path, "a")
    save(mask, Image.new("L", SIZE[::-1]))
    assert mask_refused(tmp_path, ValueError).startswith(f"{mask} is 6 x 8, its image 8 x 6: scale the mask")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_that_holds_no_indices(tmp_path, mode: str) -> None:
    _, mask = add(tmp_path, "a")
    save(mask, Image.new(mode, SIZE))
    assert mask_refused(tmp_path, ValueError) == (
        f"{mask} is of mode {mode}, it must hold class indices: save it as 8-bit grey"
    )


@pytest.mark.parametrize("value", [12, 254, 255])
def test_a_value_out_of_range(tmp_path, value: int) -> None:
    raw = values_of(0, range(11))
    raw[3, 4:6] = value
    _, mask = add(tmp_path, "a")
    save(mask, raw)
    assert mask_refused(tmp_path, ValueError) == (
        f"{mask} holds the value {value} in 2 pixels, it may hold 0 to 11: "
        "give those pixels one of these values"
    )


def test_check_names_every_problem_and_nothing_else(tmp_path) -> None:
    add(tmp_path, "a")
    assert check(CamVid(tmp_path, "train")) == []
    _, first = add(tmp_path, "b")
    second, _ = add(tmp_path, "c")
    first.unlink()
    second.write_bytes(b"no picture")
    problems = check(CamVid(tmp_path, "train"))
    assert [problem.split()[0] for problem in problems] == [str(first), str(second)]


def test_class_frequencies_leave_the_unlabelled_out(tmp_path) -> None:
    for name in "ab":
        add(tmp_path, name)
    first, second = np.full((6, 8), 11, np.uint8), np.full((6, 8), 10, np.uint8)
    first[0] = 4
    second[3:] = 0
    save(tmp_path / "train" / "labels" / "a.png", first)
    save(tmp_path / "train" / "labels" / "b.png", second)
    expected = np.zeros(11)
    expected[[0, 4, 10]] = 24 / 56, 8 / 56, 24 / 56
    assert_allclose(class_frequencies(CamVid(tmp_path, "train")), expected, rtol=1e-15)


def test_ranges_for_people() -> None:
    assert (
        ranges([]) == "" and ranges([3]) == "3" and ranges([0, 1, 2, 5, 254, 255]) == "0 to 2, 5, 254 to 255"
    )


@pytest.mark.parametrize("name", recipes.shipped())
def test_recipes_name_splits_that_there_are(tmp_path, name: str) -> None:
    for stage in recipes.load(name).stages:
        for split in (stage.data.train, stage.data.validation):
            # Of the files, not of the split.
            with pytest.raises(FileNotFoundError):
                open_dataset(stage.data.dataset, tmp_path, split)


def test_the_page_names_every_dataset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(DATASETS)
