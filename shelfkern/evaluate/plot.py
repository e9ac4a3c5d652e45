"""The confusion matrix as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..files import replacing
from .metrics import ConfusionMatrix

# Above so many classes numbers in the cells would be unreadable.
NUMBERED = 30


def check_plot(path: str | os.PathLike[str]) -> None:
    """Says what `save_confusion` would, before there is a matrix.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: path's suffix is no kind of picture.
    """
    if Path(path).suffix[1:] not in _figure_type()().canvas.get_supported_filetypes():
        raise ValueError(f"plot {path} is of no kind of picture, it may end in .png, .svg or .pdf")


def save_confusion(matrix: ConfusionMatrix, classes: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Draws where the pixels of each class went: a heat map whose rows sum to 100 %.

    Args:
        classes: a name per class; those without a true pixel have no row.
        path: a file; its suffix says of which kind, such as .png, .svg or .pdf. Replaced in one step.

    Raises:
        RuntimeError: matplotlib is missing.
        ValueError: path's suffix is no kind of picture; or no pixel is labelled.
        FileNotFoundError: the folder does not exist.
    """
    check_plot(path)
    present = np.flatnonzero(matrix.counts.sum(1)).tolist()
    if not present:
        raise ValueError("matrix has no labelled pixel, a plot needs one")
    rows = matrix.counts[present]
    percent = 100 * rows / rows.sum(1, keepdims=True)
    size = (2.5 + 0.42 * len(classes), 1.8 + 0.42 * len(present))
    figure = _figure_type()(figsize=size, layout="constrained")
    _draw(figure.add_subplot(), percent, [classes[index] for index in present], classes)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)


def _draw(axes, percent: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:  # type: ignore[no-untyped-def]  # matplotlib brings no types
    image = axes.imshow(percent, vmin=0, vmax=100, cmap="Blues", aspect="equal")
    names = dict(parse_math=False)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", **names)
    axes.set_yticks(range(len(rows)), rows, **names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.figure.colorbar(image, ax=axes, label="% of the class's pixels", shrink=0.8)
    if len(columns) > NUMBERED:
        return
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.5:
            colour = "white" if value > 55 else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)


def _figure_type():  # type: ignore[no-untyped-def]  # matplotlib brings no types
    try:
        # Not pyplot, which would choose a window system and keep the figure.
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("a confusion plot needs matplotlib: pip install 'shelfkern[train]'") from None
    return Figure
