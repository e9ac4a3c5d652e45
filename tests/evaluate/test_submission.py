"""Predictions as the servers want them, file by file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from shelfkern.evaluate.submission import CityscapesSubmission, VocSubmission, open_submission

LABELS = np.arange(20 * 30).reshape(20, 30).astype(np.uint8)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_voc(tmp_path: Path) -> None:
    labels = LABELS % 21
    VocSubmission(tmp_path / "new" / "folder")("2008_000006", labels)
    name = "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"
    assert files(tmp_path / "new" / "folder") == [name]
    with Image.open(tmp_path / "new" / "folder" / name) as image:
        assert image.mode == "P" and image.size == (30, 20)
        assert_array_equal(np.asarray(image), labels)
        # As published with the development kit: background, aeroplane, television, and the border.
        colours = np.array(image.getpalette()).reshape(-1, 3)
        assert colours[[0, 1, 20, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 64, 128], [224, 224, 192]]
    VocSubmission(tmp_path, "val")("2008_000006", labels)
    assert "results/VOC2012/Segmentation/comp6_val_cls/2008_000006.png" in files(tmp_path)


def test_cityscapes(tmp_path: Path) -> None:
    # From the benchmark's own table of labels: what has a train id, in its order.
    named = {
        "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
        "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25,
        "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
    }  # fmt: skip
    labels = LABELS % 19
    save = CityscapesSubmission(tmp_path / "out")
    for name in ("berlin/berlin_000000_000019", "bad-homburg_000001_000002_leftImg8bit"):
        save(name, labels)
    assert files(tmp_path / "out") == [
        "bad-homburg_000001_000002_pred_labelIds.png",
        "berlin_000000_000019_pred_labelIds.png",
    ]
    with Image.open(tmp_path / "out" / "berlin_000000_000019_pred_labelIds.png") as image:
        assert image.mode == "L"
        assert_array_equal(np.asarray(image), np.array(list(named.values()))[labels])


@pytest.mark.parametrize("name", ["scene_1", "berlin_000000", "berlin_000000_0000190", "_000000_000019"])
def test_names_that_are_not_of_cityscapes(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"^name is '{name}', for Cityscapes it must be such as berlin_000000_0"
    ):
        CityscapesSubmission(tmp_path)(name, LABELS % 19)
    assert files(tmp_path) == []


@pytest.mark.parametrize(("kind", "classes"), [("voc", 21), ("cityscapes", 19)])
def test_labels_that_are_no_class(kind: str, classes: int, tmp_path: Path) -> None:
    save = open_submission(kind, tmp_path, classes)
    with pytest.raises(
        ValueError, match=rf"^labels is \(20, 30\) up to {classes}, it must be \(H, W\) of 0 to "
    ):
        save("berlin_000000_000019", LABELS % (classes + 1))
    with pytest.raises(ValueError, match=r"^labels is \(1, 20, 30\)"):
        save("berlin_000000_000019", LABELS[None] % classes)
    assert files(tmp_path) == []


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^submission is 'coco', it may be one of voc, cityscapes$"):
        open_submission("coco", tmp_path, 21)
    with pytest.raises(ValueError, match=r"^submission voc is of 21 classes, the model has 19$"):
        open_submission("voc", tmp_path, 19)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        open_submission("voc", tmp_path / "file", 21)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch) -> None:
    def save(self: Image.Image, path: Path, *args: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        VocSubmission(tmp_path)("2008_000006", LABELS % 21)
    assert files(tmp_path) == []
