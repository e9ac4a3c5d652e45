"""`shelfkern average`: the mean of weights files, and norms' statistics anew from images."""

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
    """Says before the work what cannot be done."""
    if (dataset is None) != (data is None):
        raise click.ClickException("--norms-from and --data belong together: give both or neither")
    if len(weights) == 1 and dataset is None:
        raise click.ClickException(f"WEIGHTS is {weights[0]} alone: give two or more, or --norms-from")
    check_device(device)
    if not out.parent.is_dir():
        raise click.ClickException(f"--out {out} cannot be written: {out.parent} is not a folder")


def _estimate(model: ShelfNet, dataset: str, data: Path, split: str, batch: int) -> None:
    source = open_dataset(dataset, data, split)
    with progress_bar("norms") as show:
        estimate_norms(model, source, batch, show)


@click.command()
@click.argument("weights", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="For the mean.")
@click.option("--norms-from", "dataset", type=click.Choice(list(DATASETS)),
              help="A data set that the norms take their statistics from, anew.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), help="The data set's root folder.")
@click.option("--split", default="train", show_default=True, help="Of the data set.")
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=2),
              help="Images that the norms take statistics over at once, at least.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]),
              help="That the statistics are taken on.")  # fmt: skip
def average(
    weights: tuple[str, ...],
    out: Path,
    dataset: str | None,
    data: Path | None,
    split: str,
    batch: int,
    device: str,
) -> None:
    """Averages WEIGHTS, shipped names or weights files of one network, into a weights file.

    The mean of what one run gave at several steps, or of runs that began with the same weights, is often
    better than each. With --norms-from its batch norms take their statistics anew from whole images as they
    are, all of one size; of a single file that alone is done.
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
