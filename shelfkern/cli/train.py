"""`shelfkern train`: training by a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from ..data import DATASETS
from ..data import check as check_dataset
from ..data.dataset import check_labelled
from ..train import recipe as recipes
from ..train.distributed import joined
from ..train.trainer import Options, open_split
from ..train.trainer import train as run_stages


def _roots(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """The folder of each dataset; one without a name is for all that have none of their own."""
    roots: dict[str, Path] = {}
    for value in values:
        name, _, folder = value.partition("=")
        if name not in DATASETS:
            name, folder = "", value
        if not Path(folder).is_dir():
            raise click.BadParameter(f"{folder!r} is not a folder")
        roots[name] = Path(folder)
    return roots


def _check(recipe: recipes.Recipe, roots: dict[str, Path]) -> None:
    """Lists every sample that cannot be trained on; exits with status 1 if there are any."""
    problems: list[str] = []
    for data in dict.fromkeys(stage.data for stage in recipe.stages):
        for name in ("train", "validation"):
            split = getattr(data, name)
            if not split:
                continue
            found = open_split(data.dataset, roots, split)
            check_labelled(found, f"data.{name}", split)
            strange = check_dataset(found)
            click.echo(f"{data.dataset} {split}: {len(found)} samples, {len(strange)} of them unfit")
            problems += strange
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise SystemExit(1)


@click.command(
    short_help="Train a network by a recipe.", epilog=f"Bundled recipes: {', '.join(recipes.shipped())}."
)
@click.argument("config")
@click.option(
    "--data", "roots", multiple=True, required=True, callback=_roots, metavar="[NAME=]DIR",
    help="Root folder of the dataset; with NAME= for a recipe of several datasets.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for the results."
)
@click.option(
    "--set", "changes", multiple=True, metavar="[STAGE:]FIELD=VALUE",
    help="Override a field of the recipe, such as optimizer.lr=0.005; may be repeated.",
)  # fmt: skip
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one.")
@click.option(
    "--every", default=Options.every, show_default=True, type=click.IntRange(1),
    help="Steps between checkpoints, each with a validation.",
)  # fmt: skip
@click.option(
    "--log-every", default=Options.log_every, show_default=True, type=click.IntRange(1),
    help="Steps between rows of the log.",
)  # fmt: skip
@click.option(
    "--workers", default=Options.workers, show_default=True, type=click.IntRange(0),
    help="Processes that decode and augment images.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Validate all images and masks, list the bad ones, and exit.")
def train(
    config: str,
    roots: dict[str, Path],
    out: Path,
    changes: tuple[str, ...],
    device: str | None,
    every: int,
    log_every: int,
    workers: int,
    check: bool,
) -> None:
    """Trains by CONFIG, the name of a bundled recipe or a TOML file; an interrupted run in OUT is resumed.

    Each stage of the recipe writes to OUT/STAGE: best.safetensors and last.safetensors, train.csv and
    validation.csv, TensorBoard event files, and checkpoint.pt, from which it resumes. For several GPUs or
    machines start it with torchrun: `torchrun --nproc-per-node 8 -m shelfkern train ...`. Validation
    images that cannot be read are named and skipped, and the exit status is then 1.
    """
    try:
        recipe = recipes.load(config, changes)
        named = {stage.data.dataset for stage in recipe.stages}
        if "" in roots:
            roots |= {name: roots[""] for name in named if name not in roots}
        if check:
            _check(recipe, roots)
            return
        with joined(device) as processes:
            whole = run_stages(recipe, Options(out, roots, every, log_every, workers), processes)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise click.Abort from None
    if not whole:
        raise SystemExit(1)
