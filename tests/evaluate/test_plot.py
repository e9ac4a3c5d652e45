"""The confusion plot: what is in it, and which files it can become."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shelfkern.evaluate import ConfusionMatrix
from shelfkern.evaluate.plot import save_confusion

pytest.importorskip("matplotlib")

MATRIX = ConfusionMatrix.of([[90, 10, 0], [0, 0, 0], [3, 1, 996]])
CLASSES = ("road", "sky", "<tree> & $x^2$")


def test_a_drawing_names_classes_and_percentages(tmp_path: Path, monkeypatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    save_confusion(MATRIX, CLASSES, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for word in ("road", "sky", "&lt;tree&gt; &amp; $x^2$", ">90<", ">10<", ">100<", "predicted", "true"):
        assert word in text
    # The class without a pixel has a column and no row.
    assert text.count(">sky<") == 1 and text.count(">road<") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["plot.svg"]


@pytest.mark.parametrize("classes", [1, 3, 32])
def test_a_picture(classes: int, tmp_path: Path) -> None:
    counts = np.eye(classes, dtype=int) * 50 + 1
    save_confusion(
        ConfusionMatrix.of(counts), [f"class {index}" for index in range(classes)], tmp_path / "plot.png"
    )
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(
        ValueError, match=r"^plot .*plot.txt is of no kind of picture, it may end in .png, .svg or"
    ):
        save_confusion(MATRIX, CLASSES, tmp_path / "plot.txt")
    with pytest.raises(ValueError, match=r"^matrix has no labelled pixel, a plot needs one$"):
        save_confusion(ConfusionMatrix(3), CLASSES, tmp_path / "plot.png")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        save_confusion(MATRIX, CLASSES, tmp_path / "missing" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        RuntimeError, match=r"^a confusion plot needs matplotlib: pip install 'shelfkern\[train\]'$"
    ):
        save_confusion(MATRIX, CLASSES, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
