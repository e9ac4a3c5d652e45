"""A small network and a data set in memory; a module of its own, so that spawned processes can import it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed, nn

from shelfkern.data import IGNORE, Sample
from shelfkern.evaluate import Protocol, evaluate
from shelfkern.nn import ShelfNet, ShelfNetConfig
from shelfkern.normalisation import Normalisation
from shelfkern.process_group import process_group

CLASSES = ("road", "sky", "tree", "car", "sign")
PALETTE = ((200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200))
SIZES = ((70, 90), (64, 96), (33, 47))


def tiny(dtype: torch.dtype = torch.float32, **changes: object) -> ShelfNet:
    """A model that tells scenes apart: batch norms with statistics, scores of some size."""
    torch.manual_seed(1)
    config = dict(
        num_classes=len(CLASSES), backbone="resnet18", backbone_width=4, widths=(4, 8, 12), merge="attention",
        negative_slope=0.01, head="conv", head_width=4, presence=False,
    ) | changes  # fmt: skip
    model = ShelfNet(ShelfNetConfig(**config)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    # Scores of a trained network's size: exp of larger ones is infinite.
    last = [module for module in model.head.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight /= model(torch.randn(1, 3, 64, 96)).std() / 3
    # Not ImageNet's, so that a fixed normalisation would show.
    model.normalisation = Normalisation((0.3, 0.5, 0.4), (0.2, 0.3, 0.25))
    return model.to(dtype)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth blobs, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def mask(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blobs of every class and of `IGNORE`, uint8 (H, W)."""
    coarse = np.random.default_rng(seed + 99).integers(0, len(CLASSES) + 1, (4, 5)).astype(np.uint8)
    coarse[coarse == len(CLASSES)] = IGNORE
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


@dataclasses.dataclass
class Scenes:
    """Pictures with masks, of several sizes, `alike` in a row of one; those in `broken` cannot be read."""

    count: int = 5
    broken: tuple[int, ...] = ()
    classes: tuple[str, ...] = CLASSES
    palette: tuple[tuple[int, int, int], ...] = PALETTE
    labelled: bool = True
    alike: int = 1

    @property
    def names(self) -> list[str]:
        return [f"town/scene_{index}" for index in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.broken:
            raise OSError(f"scene_{index}.png cannot be decoded\nit is damaged")
        pixels = picture(*self.size(index), index)
        return Sample(self.names[index], Image.fromarray(pixels), self.mask(index))

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index // self.alike % len(SIZES)]

    def mask(self, index: int) -> Image.Image:
        size = self.size(index)
        return Image.fromarray(mask(*size, index) if self.labelled else np.full(size, IGNORE, np.uint8))


def evaluate_share(rank: int, folder: str, processes: int) -> None:
    """One of several processes that evaluate the same data set; each writes what it found."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", processes)
    with process_group("gloo", store=store, rank=rank, world_size=processes):
        saved: list[str] = []
        found = evaluate(
            tiny(),
            Scenes(7, broken=(2, 3)),
            Protocol(boundary=True),
            save=lambda name, labels: saved.append(name),
        )
        Path(folder, f"{rank}.json").write_text(found.to_json())
        Path(folder, f"{rank}.txt").write_text("\n".join(saved))
