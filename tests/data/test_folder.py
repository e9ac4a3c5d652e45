"""Data of one's own: folders, CSV files, label maps, masks of indices and of colours."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from layouts import pixels_of, save, values_of, with_palette
from numpy.testing import assert_array_equal
from PIL import Image

from shelfkern.data import IGNORE, check, open_dataset
from shelfkern.data.folder import Folder
from shelfkern.data.labelmap import read_label_map
from shelfkern.data.reading import EXIF_ORIENTATION

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")

ROAD, SKY, CAR, FRAME = (128, 64, 128), (0, 130, 180), (0, 0, 142), (9, 9, 9)
MAP = {
    "ignore": [0, list(FRAME)],
    "classes": [
        {"name": "road", "colour": list(ROAD), "values": [1, 2]},
        {"name": "sky", "colour": list(SKY), "values": [7]},
        {"name": "car", "values": [9, list(CAR), [1, 1, 142]]},
    ],
}
MEANS = {0: IGNORE, 1: 0, 2: 0, 7: 1, 9: 2, 255: IGNORE}
COLOURS = {ROAD: 0, SKY: 1, CAR: 2, (1, 1, 142): 2, FRAME: IGNORE}
TOML = """
ignore = [0, [9, 9, 9]]
[[classes]]
name = "road"
colour = [128, 64, 128]
values = [1, 2]
[[classes]]
name = "sky"
colour = [0, 130, 180]
values = [7]
[[classes]]
name = "car"
values = [9, [0, 0, 142], [1, 1, 142]]
"""


def write_map(root: Path, content: object = MAP) -> Path:
    path = root / "labels.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def add(root: Path, name: str, seed: int, suffix: str = ".png") -> tuple[Path, Path]:
    image = save(root / "images" / f"{name}.png", pixels_of(seed))
    return image, save(root / "masks" / f"{name}{suffix}", values_of(seed, list(MEANS)))


def expected_of(seed: int) -> np.ndarray:
    return np.vectorize(MEANS.get)(values_of(seed, list(MEANS)))


def problem_of(root: Path, split: str = "train") -> str:
    (problem,) = check(Folder(root, split))
    assert "\n" not in problem
    return problem


def test_folders_of_images_and_masks(tmp_path) -> None:
    write_map(tmp_path)
    add(tmp_path / "train", "b", 1)
    add(tmp_path / "train", "a", 2, ".bmp")
    add(tmp_path / "val", "c", 3)
    dataset = open_dataset("folder", tmp_path, "train")
    assert list(dataset.names) == ["a", "b"] and dataset.classes == ("road", "sky", "car")
    assert dataset.palette[:2] == (ROAD, SKY) and len(set(dataset.palette)) == 3 and dataset.labelled
    for index, seed in enumerate((2, 1)):
        assert_array_equal(np.asarray(dataset[index].image), pixels_of(seed))
        assert_array_equal(np.asarray(dataset[index].mask), expected_of(seed))
        assert_array_equal(np.asarray(dataset.mask(index)), expected_of(seed))
    assert Folder(tmp_path, "val").names == ("c",)
    with pytest.raises(ValueError, match=f"split is 'test', {tmp_path} has train, val$"):
        Folder(tmp_path, "test")


def test_a_root_of_images_and_masks_is_one_split(tmp_path) -> None:
    write_map(tmp_path)
    add(tmp_path, "a", 1)
    assert_array_equal(np.asarray(Folder(tmp_path, "all")[0].mask), expected_of(1))
    with pytest.raises(ValueError, match=r"has all$"):
        Folder(tmp_path, "train")
    with pytest.raises(ValueError, match=r"has none: neither SPLIT\.csv nor SPLIT/images is there"):
        Folder(write_map(tmp_path / "other").parent, "train")


@pytest.mark.parametrize("head", ["", "image,mask\n", "\ufeffImage , Mask\r\n\r\n"])
def test_csv_files(tmp_path, head: str) -> None:
    write_map(tmp_path)
    add(tmp_path / "data" / "x", "a", 1)
    add(tmp_path / "data" / "y", "a", 2)
    lines = "data/y/images/a.png,data/y/masks/a.png\n data/x/images/a.png, data/x/masks/a.png \n\n"
    (tmp_path / "train.csv").write_text(head + lines, encoding="utf-8")
    for root, split in ((tmp_path, "train"), (tmp_path / "train.csv", "all")):
        dataset = Folder(root, split)
        assert dataset.names == ("data/y/images/a", "data/x/images/a") and dataset.labelled
        assert_array_equal(np.asarray(dataset[0].mask), expected_of(2))
        assert_array_equal(np.asarray(dataset[1].image), pixels_of(1))


def test_names_do_not_lead_out_of_a_folder_of_predictions(tmp_path) -> None:
    write_map(tmp_path / "root")
    image, _ = add(tmp_path / "x", "a", 1)
    (tmp_path / "root" / "test.csv").write_text(f"../x/images/a.png\n{image}\n")
    dataset = Folder(tmp_path / "root", "test")
    assert dataset.names == ("x/images/a", str(image.with_suffix(""))[1:]) and check(dataset) == []


@pytest.mark.parametrize("lines", ["train/images/a.png\n", "train/images/a.png,\n", None])
def test_data_without_masks(tmp_path, lines: str | None) -> None:
    write_map(tmp_path)
    save(tmp_path / "train" / "images" / "a.png", pixels_of(0))
    if lines:
        (tmp_path / "train.csv").write_text(lines)
    dataset = Folder(tmp_path, "train")
    assert not dataset.labelled and (np.asarray(dataset[0].mask) == IGNORE).all()


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ("a.png,b.png,c.png\n", ValueError, r"line 1 is \['a.png', 'b.png', 'c.png'\], it must be an image"),
        ("a.png,m.png\n,b.png\n", ValueError, "line 2 is "),
        ("a.png,m.png\nb.png\n", ValueError, "gives no mask for .*b.png, it must give one for all"),
        ("a.png,m.png\na.png,n.png\n", ValueError, "names a twice"),
        ("image,mask\n", FileNotFoundError, "lists no images"),
    ],
)
def test_csv_files_that_are_wrong(tmp_path, lines: str, error: type[Exception], message: str) -> None:
    write_map(tmp_path)
    path = tmp_path / "train.csv"
    path.write_text(lines)
    with pytest.raises(error, match=f"^{path} {message}"):
        Folder(tmp_path, "train")


def test_a_csv_file_that_is_missing(tmp_path) -> None:
    write_map(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\.csv is missing"):
        Folder(tmp_path / "train.csv", "all")


def test_masks_of_colours(tmp_path) -> None:
    write_map(tmp_path)
    _, path = add(tmp_path / "train", "a", 0)
    which = values_of(5, range(len(COLOURS)))
    save(path, np.array(list(COLOURS), np.uint8)[which])
    found = np.asarray(Folder(tmp_path, "train")[0].mask)
    assert_array_equal(found, np.array(list(COLOURS.values()))[which])


def test_every_channel_counts_in_its_place(tmp_path) -> None:
    colours = [list(colour) for colour in itertools.permutations((0, 1, 2, 255), 3)]
    write_map(tmp_path, {"classes": [{"name": str(colour), "colour": colour} for colour in colours]})
    _, path = add(tmp_path / "train", "a", 0)
    which = values_of(5, range(24))
    save(path, np.array(colours, np.uint8)[which])
    assert_array_equal(np.asarray(Folder(tmp_path, "train")[0].mask), which)


def test_masks_of_colours_that_mean_nothing(tmp_path) -> None:
    labels = write_map(tmp_path)
    _, path = add(tmp_path / "train", "a", 0)
    mask = np.full((6, 8, 3), ROAD, np.uint8)
    mask[2, 3:5] = 128, 64, 127
    save(path, mask)
    assert problem_of(tmp_path).startswith(
        f"{path} holds the colour [128, 64, 127] in 2 pixels, which is no class: add it to {labels}"
    )
    write_map(tmp_path, {"classes": [{"name": "road"}]})
    assert problem_of(tmp_path) == f"{path} is an RGB mask: give {labels} the colours of its classes"


def test_palette_masks_are_of_indices(tmp_path) -> None:
    write_map(tmp_path)
    _, path = add(tmp_path / "train", "a", 0)
    save(path, with_palette(values_of(4, list(MEANS))))
    assert_array_equal(np.asarray(Folder(tmp_path, "train")[0].mask), expected_of(4))


def test_values_and_sizes_that_are_wrong(tmp_path) -> None:
    labels = write_map(tmp_path)
    image, path = add(tmp_path / "train", "a", 0)
    save(path, np.full((6, 8), 3, np.uint8))
    assert problem_of(tmp_path) == (
        f"{path} holds the value 3 in 48 pixels, it may hold 0 to 2, 7, 9, 255: add it to {labels}"
    )
    for mask in (np.zeros((8, 6), np.uint8), np.full((8, 6, 3), ROAD, np.uint8)):
        save(path, mask)
        assert problem_of(tmp_path).startswith(f"{path} is 6 x 8, its image 8 x 6: scale the mask")
    path.unlink()
    assert problem_of(tmp_path) == f"{path} is missing"
    lossy = save(path.with_suffix(".jpg"), np.zeros((6, 8), np.uint8))
    assert problem_of(tmp_path).startswith(f"{lossy} is a JPEG, which changes labels")
    image.unlink()
    with pytest.raises(FileNotFoundError, match="images holds no image"):
        Folder(tmp_path, "train")


def test_names_must_be_of_one_image_and_one_mask(tmp_path) -> None:
    write_map(tmp_path)
    add(tmp_path / "train", "a", 0)
    add(tmp_path / "train", "a", 0, ".bmp")
    with pytest.raises(ValueError, match=r"masks holds a\.bmp and a\.png, an image has one mask"):
        Folder(tmp_path, "train")
    add(tmp_path / "val", "a", 0)
    save(tmp_path / "val" / "images" / "a.jpg", pixels_of(0))
    with pytest.raises(ValueError, match="images names a twice"):
        Folder(tmp_path, "val")


def test_hidden_files_are_passed_over(tmp_path) -> None:
    write_map(tmp_path)
    image, mask = add(tmp_path / "train", "a", 0)
    for path in (image, mask, tmp_path / "train.csv"):
        path.with_name(f"._{path.name}").write_bytes(b"of a Mac")
    save(tmp_path / ".trash" / "images" / "b.png", pixels_of(0))
    assert Folder(tmp_path, "train").names == ("a",)
    with pytest.raises(ValueError, match=r"has train$"):
        Folder(tmp_path, ".trash")


@needs_toml
def test_toml_and_json_say_the_same(tmp_path) -> None:
    path = tmp_path / "labels.toml"
    path.write_text(TOML)
    found, same = read_label_map(path), read_label_map(write_map(tmp_path))
    assert found.values == same.values == {value: MEANS[value] for value in (0, 1, 2, 7, 9)}
    assert found.colours == same.colours == COLOURS
    assert (found.classes, found.palette) == (same.classes, same.palette)


def test_by_default_classes_are_numbered_from_0(tmp_path) -> None:
    labels = read_label_map(write_map(tmp_path, {"classes": [{"name": "a"}, {"name": "b"}]}))
    assert labels.values == {0: 0, 1: 1} and labels.colours == {} and len(set(labels.palette)) == 2


def test_a_class_may_be_255(tmp_path) -> None:
    write_map(tmp_path, {"classes": [{"name": "no", "values": [0]}, {"name": "yes", "values": [255]}]})
    _, path = add(tmp_path / "train", "a", 0)
    raw = save(path, values_of(0, (0, 255)))
    assert raw == path
    assert_array_equal(np.asarray(Folder(tmp_path, "train")[0].mask), values_of(0, (0, 255)) == 255)


def one(**entry: object) -> dict:
    return {"classes": [{"name": "road"} | entry]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", " cannot be read: "),
        ([], r": it is \[\], it must be a table of classes, ignore"),
        ({}, ": classes must be a list of 1 to 255 tables"),
        ({"classes": []}, ": classes must be a list"),
        ({"classes": [{}] * 256}, ": classes must be a list"),
        ({"classes": ["road"]}, ": class 0 is 'road', it must be a table of name, colour, values"),
        ({"classes": [{}]}, ": class 0 must have a name of its own, it has None"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, ": class 1 must have a name of its own, it has 'a'"),
        ({"clases": []}, ": it has the key 'clases', it may have classes, ignore"),
        (one(color=[1, 2, 3]), ": class 0 has the key 'color', it may have name, colour, values"),
        (one(colour=[1, 2]), r": the colour \[1, 2\] must be three numbers from 0 to 255"),
        (one(colour=[1, 2, 256]), ": the colour"),
        (one(values=[256]), ": the value 256 must be a number from 0 to 255, or a colour"),
        (one(values=[True]), ": the value True must be"),
        (one(values=3), ": values is 3, it must be a list"),
        (one() | {"ignore": 0}, ": ignore is 0, it must be a list"),
        (one() | {"ignore": [0]}, ": the value 0 means both class 0 and nothing"),
        (
            {"classes": [{"name": "a", "values": [1]}, {"name": "b"}]},
            ": the value 1 means both class 0 and class 1",
        ),
    ],
)
def test_label_maps_that_are_wrong(tmp_path, content: object, message: str) -> None:
    path = write_map(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{path}{message}"):
        Folder(tmp_path, "train")


def test_no_label_map(tmp_path) -> None:
    add(tmp_path / "train", "a", 0)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no labels.toml or labels.json"):
        Folder(tmp_path, "train")


@pytest.mark.parametrize("orientation, cure", [(6, "the image is upright by its EXIF alone"), (3, "scale")])
def test_a_photo_on_its_side_with_an_upright_mask(orientation: int, cure: str, tmp_path) -> None:
    write_map(tmp_path)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    (tmp_path / "train" / "images").mkdir(parents=True)
    Image.fromarray(pixels_of(1)).save(tmp_path / "train" / "images" / "a.jpg", exif=exif)
    upright = values_of(1, list(MEANS)).T.copy()
    path = save(tmp_path / "train" / "masks" / "a.png", upright)
    height, width = upright.shape
    assert problem_of(tmp_path).startswith(
        f"{path} is {width} x {height}, its image {height} x {width}: {cure}"
    )


def test_folders_are_no_images(tmp_path) -> None:
    write_map(tmp_path)
    add(tmp_path / "train", "a", 1)
    (tmp_path / "train" / "images" / "b.png").mkdir()
    assert list(Folder(tmp_path, "train").names) == ["a"]
