"""Whole networks on this machine, beside their peers: `make bench` runs it.

Every row is checked against eager first and not timed if it is wrong. Variants of one case run
interleaved in one process. Rows go to benchmarks/results as JSON lines; `table.py` makes the README's
table from them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shelfkern
from shelfkern import nn as models
from shelfkern.cli.bench import MAX_ERROR, error_of
from shelfkern.timing import Timing, command, environment, median_ratio, time_interleaved

RESULTS = Path(__file__).parent / "results"
# Share of equal labels.
MIN_AGREEMENT = 0.999


def build(name: str) -> nn.Module:
    """A published model, randomly initialised: time does not depend on the values."""
    torch.manual_seed(0)
    return getattr(models, name)().eval()


def peers(model: nn.Module, x: Tensor, labels: bool) -> dict[str, Callable[[], Tensor]]:
    """Eager, eager channels_last, and torch.compile with frozen weights, each giving scores or labels."""
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)

    def finished(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: run().argmax(1).to(torch.uint8)) if labels else run

    compiled = torch.compile(_Labels(channels_last) if labels else channels_last, options={"freezing": True})
    return {
        "eager": finished(lambda: model(x)),
        "eager channels_last": finished(lambda: channels_last(x_last)),
        "torch.compile, freezing": lambda: compiled(x_last),
    }


class _Labels(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).argmax(1).to(torch.uint8)


def check(result: Tensor, truth: Tensor, labels: bool) -> tuple[bool, float]:
    """Whether a result is right, and its error: over the scores' deviation, or the share of other labels."""
    if labels:
        error = (result != truth.argmax(1)).double().mean().item()
        return error <= 1 - MIN_AGREEMENT, error
    error = error_of(result, truth)
    return error <= MAX_ERROR["float32"], error


def run_case(name: str, size: tuple[int, int], labels: bool, rounds: int) -> list[dict[str, object]]:
    """Rows of one model, size and kind of output, fastest peer and ours in one interleaved run."""
    model = build(name)
    x = torch.randn(1, 3, *size)
    fast = shelfkern.accelerate(model)
    ours = "shelfkern predict" if labels else "shelfkern"
    variants = {**peers(model, x, labels), ours: lambda: fast.predict(x) if labels else fast(x)}
    truth = model(x)
    errors = {}
    for variant, run in list(variants.items()):
        right, errors[variant] = check(run(), truth, labels)
        if not right:
            click.echo(f"{name} {size}: {variant} is wrong by {errors[variant]:.2g}, not timed", err=True)
            del variants[variant]
    timings = time_interleaved(variants, rounds)
    return [
        {
            "model": name,
            "size": list(size),
            "output": "labels" if labels else "scores",
            "dtype": "float32",
            "variant": variant,
            "error": errors[variant],
            **_figures(timing, timings.get(ours), fast.plan.macs(1, *size)),
        }
        for variant, timing in timings.items()
    ]


def _figures(timing: Timing, ours: Timing | None, macs: int) -> dict[str, object]:
    return {
        "median_ms": round(timing.median * 1e3, 2),
        "p10_ms": round(timing.quantile(0.1) * 1e3, 2),
        "p90_ms": round(timing.quantile(0.9) * 1e3, 2),
        "images_per_s": round(1 / timing.median, 2),
        "gflop_per_s": round(2 * macs / timing.median / 1e9, 1),
        "ours_times_faster": round(median_ratio(timing, ours), 3) if ours else None,
    }


def show(rows: list[dict[str, object]]) -> None:
    """Prints rows as a table."""
    table = Table("model", "size", "output", "variant", "ms (p10-p90)", "GFLOP/s", "ours faster", "error")
    for row in rows:
        height, width = row["size"]
        spread = f"{row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f})"
        ratio = "" if row["ours_times_faster"] is None else f"{row['ours_times_faster']:.2f}x"
        table.add_row(
            row["model"], f"{height}x{width}", row["output"], row["variant"], spread,
            f"{row['gflop_per_s']:.0f}", ratio, f"{row['error']:.1e}",
        )  # fmt: skip
    Console(width=130).print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", "names", multiple=True, default=["shelfnet18_lw"])
@click.option("--size", "sizes", nargs=2, type=int, multiple=True, default=[(512, 512), (512, 1024)])
@click.option("--rounds", default=15)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "models_cpu.jsonl")
@torch.no_grad()
def main(names: tuple[str, ...], sizes: tuple[tuple[int, int], ...], rounds: int, out: Path) -> None:
    """Times models on the CPU beside eager and torch.compile; replaces OUT."""
    rows = []
    for name in names:
        for size in sizes:
            for labels in (False, True):
                rows += run_case(name, size, labels, rounds)
                torch.compiler.reset()
    about = environment() | {"command": command()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row | about) + "\n" for row in rows))
    show(rows)


if __name__ == "__main__":
    main()
