"""The tiny network that `segment` is tested with, and what is made of its results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from PIL import Image

from shelfkern.nn import ShelfNet, ShelfNetConfig

CLASSES = ("road", "sky", "tree", "car", "sign")
PALETTE = ((200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200))
CONFIG = ShelfNetConfig(
    num_classes=len(CLASSES),
    backbone="resnet18",
    backbone_width=4,
    widths=(4, 8, 12),
    merge="attention",
    negative_slope=0.01,
    head="conv",
    head_width=4,
    presence=False,
)


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def scores_of(model: ShelfNet, image: Image.Image) -> torch.Tensor:
    mean, std = torch.tensor(model.normalisation.mean), torch.tensor(model.normalisation.std)
    x = torch.from_numpy(np.array(image)).float() / 255
    return model(((x - mean) / std).permute(2, 0, 1)[None])[0]


def assert_labels(path: Path, scores: torch.Tensor) -> None:
    """The argmax, but for pixels whose two best scores are equal up to rounding."""
    best = scores.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-3 * scores.std()).numpy()
    labels, expected = np.asarray(Image.open(path)), scores.argmax(0).numpy()
    assert labels.shape == expected.shape and clear.mean() > 0.98
    assert np.array_equal(labels[clear], expected[clear])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def results(*stems: str) -> set[str]:
    return {f"{stem}_{kind}.png" for stem in stems for kind in ("overlay", "labels")}


def complaints(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.strip()]
