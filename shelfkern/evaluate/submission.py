"""Predictions as the test servers of PASCAL VOC and Cityscapes want them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import cityscapes, voc
from ..files import replacing
from ..visualise import label_image

KINDS = ("voc", "cityscapes")


class VocSubmission:
    """Writes results/VOC2012/Segmentation/comp6_SPLIT_cls/NAME.png below a folder, to be packed and sent.

    Label images with VOC's palette; comp6 is the competition in which any training data is allowed.

    Args:
        folder: where `results` begins; it is made.
        split: "test", or another for one's own use.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = "test") -> None:
        self.folder = Path(folder) / "results" / "VOC2012" / "Segmentation" / f"comp6_{split}_cls"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._palette = voc.palette(256)

    def __call__(self, name: str, labels: np.ndarray) -> None:
        """Writes one image's labels (H, W) of 0 to 20, in one step."""
        _check(labels, len(voc.CLASSES))
        _save(label_image(labels, self._palette), self.folder / f"{_file_name(name)}.png")


class CityscapesSubmission:
    """Writes CITY_SEQUENCE_FRAME_pred_labelIds.png into a folder: 8-bit grey, of label ids 7 to 33.

    Args:
        folder: it is made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, labels: np.ndarray) -> None:
        """Writes one image's labels (H, W) of 0 to 18, in one step.

        Raises:
            ValueError: the name does not begin with a city, a sequence and a frame.
        """
        _check(labels, len(cityscapes.CLASSES))
        match = re.match(r"[A-Za-z-]+_\d{6}_\d{6}(?!\d)", _file_name(name))
        if not match:
            raise ValueError(f"name is {name!r}, for Cityscapes it must be such as berlin_000000_000019")
        ids = np.array(cityscapes.LABEL_IDS, np.uint8)[labels]
        _save(Image.fromarray(ids), self.folder / f"{match[0]}_pred_labelIds.png")


def open_submission(
    kind: str, folder: str | os.PathLike[str], num_classes: int, split: str = "test"
) -> VocSubmission | CityscapesSubmission:
    """A writer for `evaluate`'s `save`.

    Raises:
        ValueError: kind is unknown, or its server wants other classes.
        OSError: the folder cannot be made.
    """
    if kind not in KINDS:
        raise ValueError(f"submission is {kind!r}, it may be one of {', '.join(KINDS)}")
    needed = len((voc if kind == "voc" else cityscapes).CLASSES)
    if num_classes != needed:
        raise ValueError(f"submission {kind} is of {needed} classes, the model has {num_classes}")
    return VocSubmission(folder, split) if kind == "voc" else CityscapesSubmission(folder)


def _file_name(name: str) -> str:
    """The last part of a sample's name, which may hold folders."""
    return name.rpartition("/")[2]


def _check(labels: np.ndarray, classes: int) -> None:
    if labels.ndim != 2 or (labels.size and not 0 <= labels.min() <= labels.max() < classes):
        raise ValueError(
            f"labels is {labels.shape} up to {labels.max()}, it must be (H, W) of 0 to {classes - 1}"
        )


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, "PNG")
