"""`shelfkern average`: the mean of weights files, and batch-norm statistics recomputed from images."""

from __future__ import annotations

from pathlib import Path

import click

from ..data import DATASETS, open_dataset
from ..nn import ShelfNet, save_weights
from ..train.average import mean_of
from ..train.norms import estimate_norms
from .options import check_device
from .progress import progress_bar


def _check(weights: tuple[str, ...], out: Path, dataset: str | None, data: Path | None, device: str) -> None:
    """Checks the options before the work."""
    if (dataset is None) != (data is None):
        raise click.ClickException("--norms-from and --data belong together: give both or neither")
    if len(weights) == 1 and dataset is None:
        raise click.ClickException(f"WEIGHTS is {weights[0]} alone: give two or more, or --norms-from")
    check_device(device)
    if out.suffix != ".safetensors":
        raise click.ClickException(f"out is {out}, weights are read from .safetensors")
    if not out.parent.is_dir():
        raise click.ClickException(f"--out {out} cannot be written: {out.parent} is not a folder")


def _estimate(model: ShelfNet, dataset: str, data: Path, split: str, batch: int) -> None:
    source = open_dataset(dataset, data, split)
    with progress_bar("norms") as show:
        estimate_norms(model, source, batch, show)


@click.command(short_help="Average weights files.")
@click.argument("weights", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--norms-from", "dataset", type=click.Choice(list(DATASETS)),
              help="Dataset to recompute the batch norms' statistics on.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="The dataset's root folder.")
@click.option("--split", default="train", show_default=True, help="Split of the dataset.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=2),
              help="Images per batch of statistics, at least.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]),
              help="Device for the statistics.")  # fmt: skip
def average(
    weights: tuple[str, ...],
    out: Path,
    dataset: str | None,
    data: Path | None,
    split: str,
    batch: int,
    device: str,
) -> None:
    """Averages WEIGHTS, weights files or names of bundled weights of one network, into a weights file.

    The mean of several steps of one run, or of runs that began with the same weights, is often more
    accurate than each of them. With --norms-from the statistics of its batch norms are recomputed on whole
    images of one size, without augmentation; with a single file nothing else is done.
    """
    _check(weights, out, dataset, data, device)
    # A stage and its file: the folders above are this machine's.
    extra = {"mean_of": ", ".join("/".join(Path(name).parts[-2:]) for name in weights)}
    try:
        model = mean_of(weights)
        if dataset is not None and data is not None:
            _estimate(model.to(device), dataset, data, split, batch)
            extra["norms_from"] = f"{dataset} {split}"
        save_weights(model, out, extra=extra)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    told = ", ".join(f"{what.replace('_', ' ')} {of}" for what, of in extra.items())
    click.echo(f"{out}: {told}")
