"""mIoU of weights on validation frames that were changed: light, blur, noise, size and mirror images.

python benchmarks/robustness.py camvid runs/camvid/last/best.safetensors --data CAMVID

Labels are the accelerated network's in bfloat16. Noise is the same for all weights.
"""

from __future__ import annotations

from collections.abc import Callable

import click
import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from shelfkern import accelerate
from shelfkern.data import open_dataset
from shelfkern.data.dataset import Dataset
from shelfkern.evaluate.metrics import ConfusionMatrix
from shelfkern.nn import from_weights

# Pixels (H, W, 3) and labels (H, W), both uint8.
Changed = tuple[np.ndarray, np.ndarray]
Change = Callable[[Image.Image, Image.Image, np.random.Generator], Changed]
Predict = Callable[[np.ndarray], np.ndarray]


def light(gain: float, colours: tuple[float, float, float], gamma: float) -> Change:
    """(image^gamma * gain * colours), with image from 0 to 1."""

    def change(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
        values = (np.asarray(image) / 255) ** gamma * gain * np.array(colours)
        return np.uint8(np.clip(values, 0, 1) * 255), np.array(mask)

    return change


def size(scale: float) -> Change:
    """The image (bilinear) and its mask (nearest) scaled."""

    def change(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
        shape = (int(image.width * scale), int(image.height * scale))
        scaled = image.resize(shape, Image.Resampling.BILINEAR)
        return np.array(scaled), np.array(mask.resize(shape, Image.Resampling.NEAREST))

    return change


def plain(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
    """The frame as it is."""
    return np.array(image), np.array(mask)


def blur(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
    """A Gaussian blur with a radius of 1.2 pixels."""
    return np.array(image.filter(ImageFilter.GaussianBlur(1.2))), np.array(mask)


def noise(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
    """Normal noise with a standard deviation of 10 of 255."""
    values = np.asarray(image) + rng.normal(0, 10, (image.height, image.width, 3))
    return np.uint8(np.clip(values, 0, 255)), np.array(mask)


def mirror(image: Image.Image, mask: Image.Image, rng: np.random.Generator) -> Changed:
    """Left for right."""
    return np.array(image)[:, ::-1].copy(), np.array(mask)[:, ::-1].copy()


CHANGES: dict[str, Change] = {
    "none": plain,
    "dusk": light(0.4, (0.9, 0.95, 1.15), 1.2),
    "bright": light(1.35, (1.05, 1.0, 0.92), 0.8),
    "blur": blur,
    "noise": noise,
    "mirror": mirror,
    "3/4 size": size(0.75),
    "5/4 size": size(1.25),
}


def miou(predict: Predict, frames: Dataset, change: Change) -> float:
    """Mean IoU of labels (H, W) uint8 that `predict` makes of changed frames (H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    confusion = ConfusionMatrix(len(frames.classes))
    for index in range(len(frames)):
        sample = frames[index]
        pixels, mask = change(sample.image, sample.mask, rng)
        confusion.update(mask, predict(pixels))
    return confusion.mean_iou()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("weights", nargs=-1, required=True)
@click.option("--dataset", default="camvid", help="As of `shelfkern evaluate`.")
@click.option("--data", required=True, help="Folder of the data set.")
@click.option("--split", default="val")
def main(weights: tuple[str, ...], dataset: str, data: str, split: str) -> None:
    """Prints the mIoU of WEIGHTS, bundled names or files, under each change, and the mean over changes."""
    frames = open_dataset(dataset, data, split)
    found: dict[str, list[float]] = {}
    for name in weights:
        fast = accelerate(from_weights(name), torch.bfloat16)

        def predict(pixels: np.ndarray, fast: torch.nn.Module = fast) -> np.ndarray:
            return fast.predict(pixels).numpy()

        found[name] = [miou(predict, frames, change) for change in CHANGES.values()]
    table = Table("weights", *CHANGES, "mean")
    for name, values in found.items():
        table.add_row(name, *(f"{100 * value:.2f}" for value in (*values, float(np.mean(values)))))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
