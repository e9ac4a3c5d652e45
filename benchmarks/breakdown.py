"""Where a forward pass spends its time: each of our layers compared with the machine's limits."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from arithmetic import step_flop
from cases import Case, range_images
from clocks import Ceilings
from measure import Times
from peers.ours import CPU_TUNING_SECONDS
from rows import Row, about_case
from shapes import plan_of

import shelfkern
from shelfkern.engine.accelerate import FastShelfNet
from shelfkern.engine.image import image_size
from shelfkern.engine.plan import Step, step_bytes, step_macs
from shelfkern.engine.problem import Size
from shelfkern.nn import ShelfNet
from shelfkern.timing import Timing

MICRO = 1e6
# Passes on a CPU, after an untimed one.
CPU_ROUNDS = 20


class Layer(Protocol):
    """A step of a forward pass that has run, as returned by `FastShelfNet.bound_steps`."""

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
    if case.device == "cpu":
        calibration = {"calibration": range_images(case.size)} if case.dtype == "int8" else {}
        fast = shelfkern.accelerate(model, case.torch_dtype, tune=tune and CPU_TUNING_SECONDS, **calibration)
        layers, times, together = cpu_layers(fast, images)
        return table_rows(case, layers, times, together, ceilings)
    fast = shelfkern.accelerate(model, case.torch_dtype, case.device, tune=tune)
    whole = fast.bind(images)
    return rows(case, fast.bound_steps(images), whole, clock, ceilings)


@dataclasses.dataclass(frozen=True)
class CpuLayer:
    """A step of a forward pass on a CPU.

    Attributes:
        shape: shape of its result.
    """

    step: Step
    algorithm: Any
    shape: tuple[int, ...]


def cpu_layers(
    fast: FastShelfNet, images: torch.Tensor, rounds: int = CPU_ROUNDS
) -> tuple[list[CpuLayer], list[Timing], float]:
    """Layers of a forward pass on a CPU, their times, and the median of the whole with its resize, seconds.

    The layers are timed within whole passes, with the cache contents that they find there.

    fast: not usable afterwards, because its steps now time themselves.
    """
    program = fast._program()
    batch, height, width = image_size(images)
    extents = program.plan.extents
    full, size = extents.padded(height, width), (batch, *extents.seen(height, width))
    with program.pool.borrow((size, torch.get_num_threads())) as workspace:
        seconds: list[list[float]] = [[] for _ in workspace.runs]
        workspace.runs[:] = [_timed(run, times) for run, times in zip(workspace.runs, seconds, strict=True)]
        whole = []
        for _ in range(1 + rounds):
            begin = time.perf_counter()
            low = program.low_resolution_scores(images, workspace)
            program.resize(low, full, (height, width))
            whole.append(time.perf_counter() - begin)
    chosen = zip(program.plan.steps, program.chosen(size), strict=True)
    layers = [CpuLayer(step, algorithm, step.output.shape(*size)) for step, algorithm in chosen]
    # The first pass allocates memory.
    return layers, [Timing(tuple(times[1:])) for times in seconds], statistics.median(whole[1:])


def _timed(run: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        begin = time.perf_counter()
        out = run(*arguments)
        times.append(time.perf_counter() - begin)
        return out

    return call


def rows(
    case: Case, layers: Sequence[Layer], whole: Callable[[], object], clock: Clock, ceilings: Ceilings
) -> list[Row]:
    """The rows on a GPU, from the layers and a call of all of them.

    Each layer is timed alone in a graph of consecutive calls, with its inputs in L2; in the whole some layers
    run side by side. So the sum is not the time of the whole.
    """
    times = clock.in_graphs({str(index): layer.run for index, layer in enumerate(layers)})
    # Already a graph, which cannot be captured into another.
    together = clock.measure({"whole": whole})["whole"].call.median
    return table_rows(case, layers, [times[str(index)] for index in range(len(layers))], together, ceilings)


def table_rows(
    case: Case,
    layers: Sequence[Layer | CpuLayer],
    times: Sequence[Timing],
    together: float,
    ceilings: Ceilings,
) -> list[Row]:
    """The rows, from the times of the layers and of the whole, in seconds."""
    size = case.batch, *plan_of(case.model).extents.seen(*case.size)
    found = [
        _row(case, size, index, layer, timing, ceilings) | {"share": None}
        for index, (layer, timing) in enumerate(zip(layers, times, strict=True))
    ]
    total = sum(row["median_us"] for row in found)
    for row in found:
        row["share"] = _round(row["median_us"] / total)
    return [*found, _sum(case, found, total, together)]


def _row(
    case: Case, size: Size, index: int, layer: Layer | CpuLayer, timing: Timing, ceilings: Ceilings
) -> Row:
    step = layer.step
    # Unquantized layers of an 8-bit network are floating: 16 bits on a GPU, float32 on a CPU.
    floating = case.torch_dtype if case.torch_dtype.is_floating_point else torch.float32
    dtype = _multiplied(layer, floating)
    direct, nbytes = 2 * step_macs(step, *size), step_bytes(step, floating, *size)
    flop = step_flop(step, layer.algorithm.name, size[0], size[1:])
    floor = ceilings.seconds(flop, nbytes, dtype)
    return about_case(case) | {
        "layer": index,
        "op": step.op,
        "detail": step.detail(),
        "module": step.name,
        "shape": list(layer.shape),
        "algorithm": layer.algorithm.name,
        "launches": getattr(layer.algorithm, "launches", None),
        "predicted_us": _round(layer.algorithm.microseconds),
        "median_us": _round(timing.median * MICRO),
        "p10_us": _round(timing.quantile(0.1) * MICRO),
        "p90_us": _round(timing.quantile(0.9) * MICRO),
        "flop": flop,
        "direct_flop": direct,
        "bytes": nbytes,
        "floor_us": _round(floor * MICRO),
        "bound_by": "flop" if flop / ceilings.flop_per_s[ceilings.arithmetic(dtype)] == floor else "bytes",
        "fraction": _round(floor / timing.median),
    }


def _multiplied(layer: Layer | CpuLayer, floating: torch.dtype) -> torch.dtype:
    """dtype of a layer's products: for Winograd's filtering it differs from that of its activations."""
    name = layer.algorithm.name
    if "winograd" in name:
        return torch.int16 if "int16" in name else torch.float32
    return layer.step.weights_dtype(floating)


def _sum(case: Case, found: list[Row], total: float, together: float) -> Row:
    totals = {
        key: _round(sum(row[key] for row in found))
        for key in ("predicted_us", "flop", "direct_flop", "bytes", "floor_us")
    }
    launches = [row["launches"] for row in found]
    totals["launches"] = None if None in launches else sum(launches)
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
    lines = [f"{'us':>8} {'floor':>8} {'share':>6}  op, shape, algorithm (launches), module"]
    for row in sorted(layers, key=lambda row: -row["median_us"]):
        shape = "x".join(map(str, row["shape"]))
        launches = "" if row["launches"] is None else f" ({row['launches']})"
        names = f"{row['op']} {row['detail']}, {shape}, {row['algorithm']}{launches}, {row['module']}"
        lines.append(f"{row['median_us']:8.2f} {row['floor_us']:8.2f} {row['fraction']:6.0%}  {names}")
    summary = f"{len(layers)} layers take {whole['layers_us']:.1f} us one by one"
    summary += (
        f", their floors {whole['floor_us']:.1f} us; the whole with its resize {whole['median_us']:.1f} us"
    )
    return [*lines, summary]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
