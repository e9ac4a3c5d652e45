"""Where the time of a forward pass goes: every layer of ours against what the machine allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from cases import Case
from clocks import Ceilings
from measure import Times
from rows import Row, about_case

import shelfkern
from shelfkern.engine.plan import Step, step_bytes, step_macs
from shelfkern.nn import ShelfNet
from shelfkern.timing import Timing

MICRO = 1e6


class Layer(Protocol):
    """A step of a forward pass that has run, as `FastShelfNet.bound_steps` gives them."""

    step: Step
    algorithm: Any
    shape: tuple[int, ...]
    run: Callable[[], None]


class Clock(Protocol):
    """`measure.Meter`, or a stand-in."""

    def in_graphs(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, Timing]: ...
    def measure(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, Times]: ...


def break_down(
    case: Case, model: ShelfNet, images: torch.Tensor, tune: bool, clock: Clock, ceilings: Ceilings
) -> list[Row]:
    """A row for each layer of our forward pass to scores, and one for the whole with its final resize."""
    fast = shelfkern.accelerate(model, case.torch_dtype, case.device, tune=tune)
    whole = fast.bind(images)
    layers = fast.bound_steps(images)
    return rows(case, layers, whole, clock, ceilings)


def rows(
    case: Case, layers: Sequence[Layer], whole: Callable[[], object], clock: Clock, ceilings: Ceilings
) -> list[Row]:
    """The rows, from the layers and a call of all of them.

    Each layer's calls are alone in a graph, with their inputs in L2, one after the other; in the whole
    some run side by side. So the sum is not the whole.
    """
    times = clock.in_graphs({str(index): layer.run for index, layer in enumerate(layers)})
    # A graph already, which cannot be recorded into another.
    together = clock.measure({"whole": whole})["whole"].call.median
    found = [
        _row(case, index, layer, times[str(index)], ceilings) | {"share": None}
        for index, layer in enumerate(layers)
    ]
    total = sum(row["median_us"] for row in found)
    for row in found:
        row["share"] = _round(row["median_us"] / total)
    return [*found, _sum(case, found, total, together)]


def _row(case: Case, index: int, layer: Layer, timing: Timing, ceilings: Ceilings) -> Row:
    step, dtype = layer.step, case.torch_dtype
    height, width = (32 * -(-extent // 32) for extent in case.size)
    size = (case.batch, height, width)
    flop, nbytes = 2 * step_macs(step, *size), step_bytes(step, dtype, *size)
    floor = ceilings.seconds(flop, nbytes, dtype)
    return about_case(case) | {
        "layer": index,
        "op": step.op,
        "detail": step.detail(),
        "module": step.name,
        "shape": list(layer.shape),
        "algorithm": layer.algorithm.name,
        "launches": layer.algorithm.launches,
        "predicted_us": _round(layer.algorithm.microseconds),
        "median_us": _round(timing.median * MICRO),
        "p10_us": _round(timing.quantile(0.1) * MICRO),
        "p90_us": _round(timing.quantile(0.9) * MICRO),
        "flop": flop,
        "bytes": nbytes,
        "floor_us": _round(floor * MICRO),
        "bound_by": "flop" if flop / ceilings.flop_per_s[ceilings.arithmetic(dtype)] == floor else "bytes",
        "fraction": _round(floor / timing.median),
    }


def _sum(case: Case, found: list[Row], total: float, together: float) -> Row:
    totals = {
        key: _round(sum(row[key] for row in found))
        for key in ("launches", "predicted_us", "flop", "bytes", "floor_us")
    }
    return (
        about_case(case)
        | totals
        | {
            "layer": None,
            "op": "whole",
            "layers_us": _round(total),
            "median_us": _round(together * MICRO),
            "fraction": _round(totals["floor_us"] / (together * MICRO)),
        }
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a table of one case's rows, the slowest layers first."""
    *layers, whole = rows
    lines = [f"{'us':>8} {'floor':>8} {'of it':>6}  op, shape, algorithm (launches), module"]
    for row in sorted(layers, key=lambda row: -row["median_us"]):
        shape = "x".join(map(str, row["shape"]))
        names = (
            f"{row['op']} {row['detail']}, {shape}, {row['algorithm']} ({row['launches']}), {row['module']}"
        )
        lines.append(f"{row['median_us']:8.2f} {row['floor_us']:8.2f} {row['fraction']:6.0%}  {names}")
    summary = f"{len(layers)} layers take {whole['layers_us']:.1f} us one by one"
    summary += (
        f", their floors {whole['floor_us']:.1f} us; the whole with its resize {whole['median_us']:.1f} us"
    )
    return [*lines, summary]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
