"""`shelfkern bench`: eager and accelerated, timed side by side on this machine."""

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

from ..engine import FastShelfNet
from ..nn import ShelfNet, create_model
from ..timing import Timing, environment, median_ratio, time_interleaved
from .options import (
    BACKEND_HELP,
    BACKENDS,
    DEVICE_HELP,
    DTYPES,
    MODELS,
    SAVE,
    TUNE_HELP,
    WEIGHTS_HELP,
    Size,
    make_fast,
    open_model,
)

# Largest `error_of` a result that is timed. On a GPU float32 is TF32, as precise as float16.
MAX_ERROR = {"float32": 1e-3, "tf32": 0.1, "float16": 0.1, "bfloat16": 0.3}


def error_of(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error of scores, or how far those of labels are below the best, over their deviation."""
    if result.dtype is torch.uint8:
        error = truth.amax(1) - truth.gather(1, result.long()[:, None])[:, 0]
    else:
        error = (result.float() - truth).abs()
    return (error.max() / truth.std()).item()


def variants(
    model: ShelfNet, fast: FastShelfNet, x: torch.Tensor, compiled: bool
) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed: scores of eager channels_last, perhaps torch.compile, and ours; of ours labels too.

    Args:
        model: on the device and of the dtype of x.
        x: normalised images.
    """
    x_last = x.contiguous(memory_format=torch.channels_last)
    eager = copy.deepcopy(model)
    eager.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    runs: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: eager(x_last)}
    if compiled:
        # On a GPU with CUDA graphs, as its mode "reduce-overhead" has them.
        graphs = {"triton.cudagraphs": True} if x.is_cuda else {}
        frozen = torch.compile(eager, options={"freezing": True, **graphs})
        runs["torch.compile"] = lambda: frozen(x_last)
    runs["accelerated"] = lambda: fast(x)
    runs["accelerated, labels"] = lambda: fast.predict(x)
    return runs


def measure(
    exact: ShelfNet, fast: FastShelfNet, size: tuple[int, int], compiled: bool, rounds: int
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Times and errors of all variants at one size.

    Args:
        exact: the model in float32 on the device.

    Raises:
        click.ClickException: a result is wrong.
    """
    on_gpu = fast.device.type == "cuda"
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(fast.device)
    plain = exact
    # On a CPU eager runs in float32, in which it is fastest.
    if on_gpu:
        x, plain = x.to(fast.dtype), copy.deepcopy(exact).to(fast.dtype)
    runs = variants(plain, fast, x, compiled)
    if on_gpu:
        runs = {name: _waited(run) for name, run in runs.items()}
    truth = exact(x.float())
    errors = {name: error_of(run(), truth) for name, run in runs.items()}
    kind = str(fast.dtype).removeprefix("torch.")
    limit = MAX_ERROR["tf32" if on_gpu and kind == "float32" else kind]
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        raise click.ClickException(f"wrong results, not timed: {wrong}")
    return time_interleaved(runs, rounds), errors


def _waited(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same call, which returns when the GPU is done."""

    def call() -> torch.Tensor:
        result = run()
        torch.cuda.synchronize(result.device)
        return result

    return call


def report(timings: dict[str, Timing], errors: dict[str, float], size: tuple[int, int]) -> Table:
    """A table of medians, spread, ratio to eager and error."""
    table = Table(
        "", "median ms", "p10-p90 ms", "images/s", "times eager", "error", title="x".join(map(str, size))
    )
    for name, timing in timings.items():
        # Of a GPU's fractions of a millisecond two more.
        digits = 1 if timing.median > 0.01 else 3
        spread = f"{timing.quantile(0.1) * 1e3:.{digits}f}-{timing.quantile(0.9) * 1e3:.{digits}f}"
        ratio = f"{median_ratio(timings['eager'], timing):.2f}"
        table.add_row(
            name,
            f"{timing.median * 1e3:.{digits}f}",
            spread,
            f"{1 / timing.median:.1f}",
            ratio,
            f"{errors[name]:.1e}",
        )
    return table


def rows(timings: dict[str, Timing], errors: dict[str, float], about: dict[str, object]) -> list[str]:
    """The same as JSON lines."""
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


@click.command(short_help="Time eager against accelerated.")
@click.option("--model", type=click.Choice(MODELS), help="A published model with random weights.")
@click.option("--weights", help=f"{WEIGHTS_HELP[:-1]} (default: camvid, without --model).")
@click.option("--size", "sizes", type=Size(), multiple=True, default=["512x512"], show_default=True,
              help="HEIGHTxWIDTH, or one number: 512 means 512x512; may be repeated.")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True,
              help="Compute dtype of the accelerated model.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP)
@click.option("--backend", type=click.Choice(BACKENDS[:-1]), default="auto", show_default=True,
              help=BACKEND_HELP.format(""))  # fmt: skip
@click.option("--tune", is_flag=True, help=TUNE_HELP)
@click.option("--graphs/--no-graphs", default=True, help="Record CUDA graphs, on a GPU (default: yes).")
@click.option("--compile", "compiled", is_flag=True, help="Also time torch.compile with frozen weights.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1),
              help="Timed calls of each variant, interleaved.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False),
              help="Append the results to a file of JSON lines.")  # fmt: skip
@torch.no_grad()
def bench(
    model: str | None,
    weights: str | None,
    sizes: tuple[tuple[int, ...], ...],
    dtype: str,
    device: str,
    backend: str,
    tune: bool,
    graphs: bool,
    compiled: bool,
    rounds: int,
    json_path: Path | None,
) -> None:
    """Times the eager model against the accelerated one, at batch 1, interleaved.

    Results are compared first; a wrong one is an error and is not timed.
    """
    if json_path and not json_path.parent.is_dir():
        raise click.ClickException(
            f"--json {json_path} cannot be written: {json_path.parent} is not a folder"
        )
    if model and weights:
        raise click.ClickException(
            f"--model {model} and --weights {weights} exclude each other: give one of them"
        )
    weights = weights or "camvid"
    network = create_model(model).eval() if model else open_model(weights, None, remedy=SAVE)
    fast = make_fast(network, dtype, device, backend, tune, graphs)
    exact = copy.deepcopy(network).to(fast.device)
    for size in sizes:
        height, width = size if len(size) == 2 else (size[0], size[0])
        timings, errors = measure(exact, fast, (height, width), compiled, rounds)
        Console().print(report(timings, errors, (height, width)))
        if json_path:
            case = {"model": model or weights, "size": [height, width], "dtype": dtype}
            about = (
                case | environment() | _gpu(fast.device) | {"command": " ".join(["shelfkern", *sys.argv[1:]])}
            )
            with json_path.open("a") as file:
                file.writelines(line + "\n" for line in rows(timings, errors, about))


def _gpu(device: torch.device) -> dict[str, object]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
