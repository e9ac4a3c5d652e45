"""COCO's layout, built tiny."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import pixels_of, runs_of, save
from numpy.testing import assert_array_equal

from shelfkern.data import IGNORE, check, open_dataset, voc
from shelfkern.data.coco import COCO, LABELS

SIZE = (64, 48)
# Of COCO's categories, those that VOC has, by VOC's names.
NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorbike", 5: "aeroplane", 6: "bus", 7: "train", 9: "boat",
    16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 44: "bottle", 62: "chair",
    63: "sofa", 64: "pottedplant", 67: "diningtable", 72: "tvmonitor",
}  # fmt: skip


def rectangle(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(left: int, top: int, right: int, bottom: int) -> dict:
    inside = np.zeros(SIZE[::-1], bool)
    inside[top:bottom, left:right] = True
    return runs_of(inside)


def make(root: Path, images: dict[str, list[dict]], split: str = "train2017", folder: str = "") -> Path:
    """Images by name, each with its annotations; an image's place is its seed, annotations count from 1."""
    records, annotations = [], []
    for index, (name, own) in enumerate(images.items()):
        save(root / folder / split / f"{name}.jpg", pixels_of(index, SIZE))
        record = {"id": 500 - index, "file_name": f"{name}.jpg", "width": SIZE[0], "height": SIZE[1]}
        records.append(record)
        for one in own:
            annotations.append({"id": len(annotations) + 1, "image_id": record["id"], "iscrowd": 0} | one)
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": records, "annotations": annotations, "categories": []}))
    return path


def thing(category: int, segmentation, **more) -> dict:
    return {"category_id": category, "segmentation": segmentation} | more


FULL = thing(1, rectangle(0, 0, 40, 40))


def test_categories_are_vocs_classes() -> None:
    assert {category: voc.CLASSES[label] for category, label in LABELS.items()} == NAMES


def test_the_first_annotation_lies_on_top_and_crowds_below_all(tmp_path) -> None:
    crowd = thing(17, runs(30, 0, 64, 20), iscrowd=1)
    car, dog = thing(3, rectangle(0, 10, 50, 48)), thing(18, rectangle(0, 0, 20, 30))
    # VOC has no backpacks.
    backpack = thing(27, rectangle(0, 0, 64, 48))
    make(tmp_path, {"a": [backpack, crowd, dog, car]})
    dataset = open_dataset("coco", tmp_path, "train")
    expected = np.zeros(SIZE[::-1], int)
    expected[:20, 30:] = IGNORE
    expected[10:, :50] = voc.CLASSES.index("car")
    expected[:30, :20] = voc.CLASSES.index("dog")
    assert dataset.classes == voc.CLASSES and dataset.palette == voc.PALETTE and dataset.labelled
    sample = dataset[0]
    assert (sample.name, sample.mask.mode, sample.image.size) == ("a", "L", SIZE)
    assert_array_equal(np.asarray(sample.mask), expected)
    assert_array_equal(np.asarray(dataset.mask(0)), expected)


@pytest.mark.parametrize(("rows", "kept"), [(24, False), (25, True)])
def test_images_with_few_labelled_pixels_are_left_out(tmp_path, rows: int, kept: bool) -> None:
    """40 x 24 = 960 pixels, twice over; neither crowds nor other categories count."""
    own = [
        thing(1, rectangle(0, 0, 40, rows)),
        thing(2, rectangle(0, 0, 40, rows)),
        thing(2, runs(0, 0, 64, 48), iscrowd=1),
        thing(90, rectangle(0, 0, 64, 48)),
    ]
    make(tmp_path, {"few": own, "none": [], "others": own[3:], "full": [FULL]})
    assert COCO(tmp_path, "train").names == (("few", "full") if kept else ("full",))


def test_images_of_nothing_but_few_pixels(tmp_path) -> None:
    path = make(tmp_path, {"a": [thing(1, rectangle(0, 0, 2, 2))]})
    with pytest.raises(FileNotFoundError, match=f"{path} has no image with 1000 pixels of VOC's classes"):
        COCO(tmp_path, "train")


@pytest.mark.parametrize("folder", ["", "images"])
@pytest.mark.parametrize("year", [2014, 2017])
def test_years_and_folders(tmp_path, folder: str, year: int) -> None:
    make(tmp_path, {"a": [FULL]}, f"val{year}", folder)
    dataset = COCO(tmp_path, "val")
    assert check(dataset) == [] and str(year) in str(dataset.items[0].image)
    with pytest.raises(FileNotFoundError, match=r"instances_train2017\.json and .*2014\.json are missing"):
        COCO(tmp_path, "train")
    with pytest.raises(ValueError, match="split is 'test', COCO has train, val"):
        COCO(tmp_path, "test")


def test_it_travels_to_workers(tmp_path) -> None:
    make(tmp_path, {"a": [FULL]})
    dataset = COCO(tmp_path, "train")
    again = pickle.loads(pickle.dumps(dataset))
    assert_array_equal(np.asarray(again[0].mask), np.asarray(dataset[0].mask))


def test_what_is_wrong_names_the_file_and_the_image(tmp_path) -> None:
    bad = [thing(1, rectangle(0, 0, 64, 48)), thing(1, [[1, 2, 3]])]
    path = make(tmp_path, {"a": [FULL], "b": bad[1:], "c": [FULL], "d": [FULL]})
    turned = save(tmp_path / "train2017" / "c.jpg", pixels_of(0, SIZE[::-1]))
    (tmp_path / "train2017" / "d.jpg").unlink()
    assert check(COCO(tmp_path, "train")) == [
        f"{path}, image b: annotation 2 cannot be drawn: "
        "a polygon has 3 numbers, it must be pairs of finite x and y",
        f"{turned} is 48 x 64, {path} says 64 x 48: take the images that the annotations were made for",
        f"{tmp_path / 'train2017' / 'd.jpg'} is missing",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON, it may be damaged"),
        ("[]", "has no images, annotations, it must be the published"),
        ('{"images": []}', "has no annotations,"),
        ('{"images": [], "annotations": [{"id": 1}]}', "has a record without category_id: {'id': 1}"),
        ('{"images": [{"id": 1}], "annotations": []}', "has a record without height"),
    ],
)
def test_damaged_annotations(tmp_path, text: str, message: str) -> None:
    path = make(tmp_path, {"a": [FULL]})
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path} {message}"):
        COCO(tmp_path, "train")
