"""`shelfkern bench`: eager against accelerated on this machine."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from .. import nn as models
from ..nn import ShelfNet
from ..timing import Timing, environment, median_ratio, time_interleaved
from .options import BACKENDS, DTYPES, MODELS, Predictor, Size, make_fast, open_model

# Largest `error_of` a result that is timed.
MAX_ERROR = {"float32": 1e-3, "bfloat16": 0.3}


def error_of(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error of scores, or for labels what their scores lack to the best, over the deviation."""
    if result.dtype is torch.uint8:
        error = truth.amax(1) - truth.gather(1, result.long()[:, None])[:, 0]
    else:
        error = (result.float() - truth).abs()
    return (error.max() / truth.std()).item()


def variants(
    model: ShelfNet, fast: Predictor, size: tuple[int, int], compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed: scores by eager channels_last, perhaps torch.compile, and ours; ours also labels."""
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    x_last = x.contiguous(memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    eager.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    runs: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: eager(x_last)}
    if compiled:
        frozen = torch.compile(eager, options={"freezing": True})
        runs["torch.compile"] = lambda: frozen(x_last)
    runs["accelerated"] = lambda: fast(x)
    runs["accelerated, labels"] = lambda: fast.predict(x)
    return runs


def report(timings: dict[str, Timing], errors: dict[str, float], size: tuple[int, int]) -> Table:
    """A table of medians, spread, ratio to eager and error."""
    table = Table(
        "", "median ms", "p10-p90 ms", "images/s", "times eager", "error", title="x".join(map(str, size))
    )
    for name, timing in timings.items():
        spread = f"{timing.quantile(0.1) * 1e3:.1f}-{timing.quantile(0.9) * 1e3:.1f}"
        ratio = f"{median_ratio(timings['eager'], timing):.2f}"
        table.add_row(
            name,
            f"{timing.median * 1e3:.1f}",
            spread,
            f"{1 / timing.median:.1f}",
            ratio,
            f"{errors[name]:.1e}",
        )
    return table


def rows(timings: dict[str, Timing], errors: dict[str, float], about: dict[str, object]) -> list[str]:
    """JSON lines of the same."""
    return [
        json.dumps(
            about
            | {
                "variant": name,
                "median_s": timing.median,
                "seconds": timing.seconds,
                "error": errors[name],
            }
        )
        for name, timing in timings.items()
    ]


@click.command()
@click.option("--model", type=click.Choice(MODELS), help="A published model, randomly initialised.")
@click.option("--weights", default="camvid", show_default=True, help="Used where no --model is given.")
@click.option("--size", "sizes", type=Size(), multiple=True, default=["512x512"], show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--backend", type=click.Choice(BACKENDS[:-1]), default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile with frozen weights.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Appends JSON lines."
)
@torch.no_grad()
def bench(
    model: str | None,
    weights: str,
    sizes: tuple[tuple[int, ...], ...],
    dtype: str,
    device: str,
    backend: str,
    compiled: bool,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Times eager against accelerated, batch 1, interleaved; a wrong result is not timed."""
    if json_path and not json_path.parent.is_dir():
        raise click.ClickException(f"json {json_path} cannot be written: {json_path.parent} is not a folder")
    network = getattr(models, model)().eval() if model else open_model(weights, None)
    fast = make_fast(network, dtype, device, backend)
    for size in sizes:
        height, width = size if len(size) == 2 else (size[0], size[0])
        runs = variants(network, fast, (height, width), compiled)
        truth = runs["eager"]()
        errors = {name: error_of(run(), truth) for name, run in runs.items()}
        wrong = {name: error for name, error in errors.items() if not error <= MAX_ERROR[dtype]}
        if wrong:
            raise click.ClickException(f"wrong results, not timed: {wrong}")
        timings = time_interleaved(runs, rounds)
        Console().print(report(timings, errors, (height, width)))
        if json_path:
            case = {"model": model or weights, "size": [height, width], "dtype": dtype}
            about = case | environment() | {"command": " ".join(["shelfkern", *sys.argv[1:]])}
            with json_path.open("a") as file:
                file.writelines(line + "\n" for line in rows(timings, errors, about))
