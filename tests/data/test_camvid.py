"""CamVid's layout, built tiny."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from shelfkern.data import camvid
from shelfkern.data.camvid import Frame, class_frequencies, load_split

SIZE = (8, 6)


def folder_of(root: Path, kind: str) -> Path:
    folder = root / "train" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def labels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (SIZE[1], SIZE[0]), np.uint8)


def add_image(root: Path, name: str, seed: int = 0) -> Path:
    path = folder_of(root, "images") / f"{name}.jpg"
    Image.fromarray(pixels_of(seed)).save(path, quality=100, subsampling=0)
    return path


def add_mask(root: Path, name: str, mask: Image.Image | None = None, seed: int = 0) -> Path:
    path = folder_of(root, "labels") / f"{name}.png"
    (mask or Image.fromarray(labels_of(seed))).save(path)
    return path


def add_frame(root: Path, name: str, mask: Image.Image | None = None, seed: int = 0) -> Path:
    add_image(root, name, seed)
    return add_mask(root, name, mask, seed)


def refused(root: Path, error: type[Exception]) -> str:
    with pytest.raises(error) as info:
        load_split(root, "train")
    assert "\n" not in str(info.value)
    return str(info.value)


def test_frames_come_by_name_with_their_own_pixels(tmp_path) -> None:
    names = {"b_2": 1, "a_9": 2, "b_10": 3, "c": 4}
    for name, seed in names.items():
        add_frame(tmp_path, name, seed=seed)
    frames = load_split(str(tmp_path), "train")
    assert [frame.name for frame in frames] == ["a_9", "b_10", "b_2", "c"]
    for frame in frames:
        assert (frame.image.mode, frame.mask.mode) == ("RGB", "L")
        assert_array_equal(np.asarray(frame.mask), labels_of(names[frame.name]))
        assert_allclose(np.asarray(frame.image, float), pixels_of(names[frame.name]), rtol=0, atol=8)


def test_splits_are_apart_and_other_files_are_passed_over(tmp_path) -> None:
    add_frame(tmp_path, "a")
    (tmp_path / "train" / "images" / "notes.txt").write_text("no frame")
    add_mask(tmp_path, "without_image")
    (tmp_path / "train").rename(tmp_path / "val")
    add_frame(tmp_path, "b")
    assert [frame.name for frame in load_split(tmp_path, "val")] == ["a"]
    assert [frame.name for frame in load_split(tmp_path, "train")] == ["b"]


def test_decoded_frames_need_their_files_no_more(tmp_path) -> None:
    image, mask = add_image(tmp_path, "a"), add_mask(tmp_path, "a")
    (frame,) = load_split(tmp_path, "train")
    image.unlink()
    mask.unlink()
    assert np.asarray(frame.image).shape == (6, 8, 3) and np.asarray(frame.mask).shape == (6, 8)


def test_a_grey_photograph_becomes_rgb(tmp_path) -> None:
    add_mask(tmp_path, "a")
    Image.new("L", SIZE, 90).save(folder_of(tmp_path, "images") / "a.jpg")
    (frame,) = load_split(tmp_path, "train")
    assert_array_equal(np.asarray(frame.image), np.full((6, 8, 3), 90))


def test_a_palette_mask_gives_its_indices(tmp_path) -> None:
    mask = Image.fromarray(labels_of(3))
    mask.putpalette([value for colour in camvid.PALETTE for value in colour] + [0, 0, 0])
    path = add_frame(tmp_path, "a", mask)
    with Image.open(path) as file:
        assert file.mode == "P"
    (frame,) = load_split(tmp_path, "train")
    assert frame.mask.mode == "L"
    assert_array_equal(np.asarray(frame.mask), labels_of(3))


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_folder(tmp_path, made: bool) -> None:
    if made:
        folder_of(tmp_path, "images")
    message = refused(tmp_path, FileNotFoundError)
    assert message.startswith(f"{tmp_path / 'train' / 'images'} holds no .jpg, data must be")


def test_a_missing_mask(tmp_path) -> None:
    add_frame(tmp_path, "a")
    add_image(tmp_path, "b")
    missing = tmp_path / "train" / "labels" / "b.png"
    assert refused(tmp_path, FileNotFoundError) == f"{missing} is missing, b.jpg needs it"


def test_a_mask_of_the_wrong_size(tmp_path) -> None:
    path = add_frame(tmp_path, "a", Image.new("L", (SIZE[1], SIZE[0])))
    assert refused(tmp_path, ValueError) == f"{path} is 6 x 8, its image 8 x 6"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_a_mask_that_holds_no_indices(tmp_path, mode: str) -> None:
    path = add_frame(tmp_path, "a", Image.new(mode, SIZE))
    message = refused(tmp_path, ValueError)
    assert message.startswith(f"{path} is of mode {mode}, it must hold class indices")


@pytest.mark.parametrize("index", [12, 255])
def test_an_index_out_of_range(tmp_path, index: int) -> None:
    labels = labels_of(0)
    labels[3, 5] = index
    path = add_frame(tmp_path, "a", Image.fromarray(labels))
    assert refused(tmp_path, ValueError).startswith(f"{path} holds the index {index}, it may hold 0 to 11,")


def test_the_largest_index_allowed(tmp_path) -> None:
    add_frame(tmp_path, "a", Image.new("L", SIZE, camvid.IGNORE))
    (frame,) = load_split(tmp_path, "train")
    assert_array_equal(np.asarray(frame.mask), np.full((6, 8), 11))


def test_class_frequencies_leave_the_unlabelled_out() -> None:
    first, second = np.full((2, 3), 11, np.uint8), np.zeros((4, 1), np.uint8)
    first[0] = 4
    second[3] = 10
    image = Image.new("RGB", (1, 1))
    frames = [Frame(str(i), image, Image.fromarray(mask)) for i, mask in enumerate((first, second))]
    expected = np.zeros(11)
    expected[[0, 4, 10]] = 3 / 7, 3 / 7, 1 / 7
    assert_allclose(class_frequencies(frames), expected, rtol=1e-15)


def test_every_class_has_a_name_and_a_colour_of_its_own() -> None:
    assert len(set(camvid.CLASSES)) == len(set(camvid.PALETTE)) == camvid.IGNORE
    assert not [name for name in camvid.CLASSES if not re.fullmatch("[a-z ]+", name)]
