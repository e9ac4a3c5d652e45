"""Draws a run's learning curve: `python -m shelfkern.train.curve RUN/log.csv curve.png` (extra `train`)."""

from __future__ import annotations

import csv
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("log", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(log: Path, picture: Path) -> None:
    """Loss and validation mIoU by step, from LOG, which the training writes, to PICTURE (png, svg, pdf)."""
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException("drawing needs matplotlib: pip install 'shelfkern[train]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    with log.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    steps = [row["step"] for row in rows]
    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="#b8c4ce", label="loss")
    left.set(xlabel="step", ylabel="training loss")
    right = left.twinx()
    right.plot(steps, [100 * row["miou"] for row in rows], color="#1b6ca8", marker="o", markersize=3)
    right.set_ylabel("validation mIoU, %", color="#1b6ca8")
    figure.savefig(picture)


if __name__ == "__main__":
    main()
