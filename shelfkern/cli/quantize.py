"""`shelfkern quantize`: an int8 network, calibrated on images, as a file."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from ..engine import accelerate
from . import inputs
from .options import MODEL_HELP, MODELS, SIZE_HELP, Size, check_device, open_model, tell_licence
from .progress import counted_images, progress_bar


def _chosen(paths: tuple[str, ...], most: int) -> list[Path]:
    """The image files that paths name, videos left out: at most so many, spread evenly."""
    files = [file for file, _ in inputs.expand(paths) if not inputs.is_video(file)]
    count = min(most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def _read(files: list[Path], size: tuple[int, ...] | None) -> tuple[list[torch.Tensor], bool]:
    """Raw images (1, H, W, 3) uint8, and whether some were skipped."""
    images: list[torch.Tensor] = []
    with progress_bar("reading") as show:
        for index, file in enumerate(files):
            show(index, len(files))
            try:
                image = inputs.resized(inputs.read_image(file), size)
                images.append(torch.from_numpy(np.array(image))[None])
            except inputs.SKIPPED as error:
                click.echo(f"{file} is skipped: {inputs.sentence_of(error)}", err=True)
    return images, len(images) < len(files)


@click.command(short_help="Quantize a network to int8.")
@click.argument("weights")
@click.option("--calibration", "paths", multiple=True, required=True, metavar="PATH",
              help="Images to calibrate on: a file, a folder or a glob; may be repeated.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path),
              help="File to write.")  # fmt: skip
@click.option("--images", default=32, show_default=True, type=click.IntRange(min=1),
              help="Use at most this many, evenly spread over those found.")  # fmt: skip
@click.option("--size", type=Size(), help=SIZE_HELP)
@click.option("--model", type=click.Choice(MODELS), help=MODEL_HELP)
@click.option("--device", default="cpu", show_default=True,
              help="Kind of device the file is for: cpu, or a GPU: cuda, cuda:1.")  # fmt: skip
def quantize(
    weights: str,
    paths: tuple[str, ...],
    out: Path,
    images: int,
    size: tuple[int, ...] | None,
    model: str | None,
    device: str,
) -> None:
    """Quantizes WEIGHTS, the name of bundled weights or a weights file, to int8.

    The ranges of the activations are calibrated on a few dozen images such as those to come, without
    labels. The file holds an accelerated network: use it with `shelfkern segment --weights OUT`,
    `shelfkern evaluate OUT` or `shelfkern.load`, on the kind of device it is for. Images that cannot be
    read are listed and skipped, and the exit status is then 1.
    """
    check_device(device)
    if not out.parent.is_dir():
        raise click.ClickException(f"--out {out} cannot be written: {out.parent} is not a folder")
    network = open_model(weights, model, "WEIGHTS")
    calibration, skipped = _read(_chosen(paths, images), size)
    if not calibration:
        raise click.ClickException(f"--calibration {', '.join(paths)} has no image that can be read")
    try:
        accelerate(network, torch.int8, device, calibration=calibration).save(out)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    mebibytes = out.stat().st_size / 2**20
    click.echo(f"{out}: int8, calibrated on {counted_images(len(calibration))}, {mebibytes:.1f} MiB")
    tell_licence(weights)
    if skipped:
        raise SystemExit(1)
