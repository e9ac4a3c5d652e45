"""Draws a run's learning curve: `python -m shelfkern.train.curve RUN/STAGE ... curve.svg` (extra `train`)."""

from __future__ import annotations

import csv
from pathlib import Path

import click

Points = list[tuple[float, float]]


def read(log: Path) -> tuple[Points, Points]:
    """(step, loss) and (step, mIoU) of a stage's folder, or of one CSV file with both."""
    files = [log / "train.csv", log / "validation.csv"] if log.is_dir() else [log]
    loss: Points = []
    miou: Points = []
    for path in files:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, points in (("loss", loss), ("miou", miou)):
                    if name in row:
                        points.append((float(row["step"]), float(row[name])))
    return loss, miou


def joined(logs: tuple[Path, ...]) -> tuple[Points, Points]:
    """The points of stages that followed each other, their steps counted on."""
    loss: Points = []
    miou: Points = []
    for log in logs:
        done = max((step for step, _ in (*loss, *miou)), default=0.0)
        for points, more in zip((loss, miou), read(log), strict=True):
            points += [(done + step, value) for step, value in more]
    return loss, miou


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("logs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(logs: tuple[Path, ...], picture: Path) -> None:
    """Loss and validation mIoU by step, from the folders of stages in their order, to PICTURE (png, svg)."""
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException("drawing needs matplotlib: pip install 'shelfkern[train]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    try:
        loss, miou = joined(logs)
    except (OSError, ValueError, KeyError) as error:
        raise click.ClickException(f"logs cannot be read: {error}") from error
    figure, left = plt.subplots(figsize=(6, 3.5), layout="constrained")
    left.plot([step for step, _ in loss], [value for _, value in loss], color="#b8c4ce")
    left.set(xlabel="step", ylabel="training loss")
    right = left.twinx()
    percent = [100 * value for _, value in miou]
    right.plot([step for step, _ in miou], percent, color="#1b6ca8", marker="o", markersize=3)
    right.set_ylabel("validation mIoU, %", color="#1b6ca8")
    figure.savefig(picture)


if __name__ == "__main__":
    main()
