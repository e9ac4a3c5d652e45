"""Timing on a CPU and on a GPU, and the machine's peak rates to compare times with."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from shelfkern import native
from shelfkern.timing import Timing, time_interleaved

Runs = Mapping[str, Callable[[], object]]

MIN_ROUNDS, MAX_ROUNDS = 5, 200
# Written before every call on a GPU. Many times the size of L2, and long enough that the host has launched
# the call before the device reaches it.
FLUSH_BYTES = 1 << 30
# Calls per graph, so that the events around it add little to each.
GRAPH_CALLS = 20
# Longest call, in seconds, that is also timed in a graph.
GRAPH_LIMIT = 200e-6

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
PRODUCT_EXTENT = {"cpu": 2048, "cuda": 8192}
# Runs of the register loop on a CPU, of which the fastest counts, because other processes can only slow it
# down.
PEAK_RUNS, PEAK_MILLISECONDS = 5, 100


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one variant, interleaved with the others.

    Attributes:
        warm: with inputs in the caches, as far as they fit.
        cold: with nothing in a GPU's L2; None on a CPU.
        graph: one call in a replayed CUDA graph, inputs in L2; None on a CPU, for long calls, and for calls
            that cannot be captured.
    """

    warm: Timing
    cold: Timing | None = None
    graph: Timing | None = None


class Stopwatch:
    """Times variants on one device, each set of them for about `seconds`."""

    def __init__(self, device: str, seconds: float, max_autotune: bool = False) -> None:
        self.device = device
        self.seconds = seconds
        self.compile_options: dict[str, Any] = {"freezing": True, "max_autotune": max_autotune}
        self._flush = None
        if device == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
            torch.backends.cudnn.benchmark = True

    def context_lost(self) -> bool:
        """Whether the GPU's context is broken for the rest of the process, as by an out-of-bounds write."""
        if self.device == "cpu":
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def measure(self, runs: Runs) -> dict[str, Times]:
        """Times of every variant."""
        if self._flush is None:
            return {name: Times(timing) for name, timing in self.on_cpu(runs).items()}
        cold, warm = self.on_gpu(runs, cold=True), self.on_gpu(runs, cold=False)
        graphs = self._graphs({name: run for name, run in runs.items() if warm[name].median < GRAPH_LIMIT})
        return {name: Times(warm[name], cold[name], graphs.get(name)) for name in runs}

    def on_cpu(self, runs: Runs) -> dict[str, Timing]:
        """Times of single calls."""
        return time_interleaved(runs, self._rounds(runs), warmup=1)

    def on_gpu(self, runs: Runs, cold: bool) -> dict[str, Timing]:
        """Times between events around single calls, after a flush; unless cold, after one more call."""
        names = list(runs)
        rounds = self._rounds(runs)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
        for index in range(rounds):
            start = index % len(names)
            for name in names[start:] + names[:start]:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flush.zero_()
                if not cold:
                    runs[name]()
                begin.record()
                runs[name]()
                end.record()
                events[name].append((begin, end))
            # Keeps the launch queue below its limit, at which the host would block in mid-call.
            torch.cuda.synchronize()
        return {
            name: Timing(tuple(begin.elapsed_time(end) / 1e3 for begin, end in pairs))
            for name, pairs in events.items()
        }

    def _rounds(self, runs: Runs) -> int:
        """As many rounds as fit, estimated from one that also warms up."""
        for run in runs.values():
            run()
        begin = time.perf_counter()
        for run in runs.values():
            if self._flush is not None:
                self._flush.zero_()
            run()
        if self._flush is not None:
            torch.cuda.synchronize()
        one = time.perf_counter() - begin
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(self.seconds / one)))

    def _graphs(self, runs: Runs) -> dict[str, Timing]:
        captured = {name: graph for name, run in runs.items() if (graph := _capture(run))}
        if not captured:
            return {}
        timings = self.on_gpu({name: graph.replay for name, graph in captured.items()}, cold=False)
        return {
            name: Timing(tuple(seconds / GRAPH_CALLS for seconds in timing.seconds))
            for name, timing in timings.items()
        }


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        # If a capture fails, torch leaves its stream the current one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The machine's measured peak rates.

    Attributes:
        bytes_per_s: rate of a large copy, counting reads and writes.
        flop_per_s: by kind of arithmetic: on a GPU that of a large matrix product, on a CPU that of a loop on
            registers alone, on as many threads as torch has.
    """

    bytes_per_s: float
    flop_per_s: dict[str, float]

    def arithmetic(self, dtype: torch.dtype) -> str:
        """The kind of arithmetic to compare a dtype with: TF32 for float32 where it was measured.

        A CPU without products of a dtype computes them in float32, those of int8 in int16 where it has these:
        there the fastest of them counts.
        """
        if dtype is torch.float32:
            return "tf32" if "tf32" in self.flop_per_s else "float32"
        name = str(dtype).removeprefix("torch.")
        kinds = (name, "int16", "float32") if dtype is torch.int8 else (name, "float32")
        return max(kinds, key=lambda kind: self.flop_per_s.get(kind, 0.0))

    def seconds(self, flop: float, nbytes: float, dtype: torch.dtype) -> float:
        """The minimum time for this much arithmetic and traffic."""
        return max(flop / self.flop_per_s[self.arithmetic(dtype)], nbytes / self.bytes_per_s)


def measure_ceilings(stopwatch: Stopwatch, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
    """Measures this machine's peak rates."""
    device = stopwatch.device
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = _median(stopwatch, lambda: target.copy_(source))
    if device == "cpu":
        return Ceilings(2 * source.numel() / copy, peaks(stopwatch, dtypes))
    flop_per_s = {str(d).removeprefix("torch."): _product(stopwatch, d) for d in dtypes}
    torch.backends.cuda.matmul.allow_tf32 = True
    flop_per_s["tf32"] = _product(stopwatch, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    return Ceilings(2 * source.numel() / copy, flop_per_s)


def peaks(stopwatch: Stopwatch, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """FLOP/s of a CPU by dtype: float32, and the dtypes that it has instructions for.

    Without native code, a large float32 matrix product is measured instead.
    """
    if native.module is None:
        return {"float32": _product(stopwatch, torch.float32)}
    found = {}
    for kind in dict.fromkeys(str(d).removeprefix("torch.") for d in (torch.float32, *dtypes)):
        # The instruction set may not support the dtype.
        with contextlib.suppress(ValueError):
            found[kind] = max(
                native.module.peak(kind, torch.get_num_threads(), PEAK_MILLISECONDS) for _ in range(PEAK_RUNS)
            )
    return found


def _product(stopwatch: Stopwatch, dtype: torch.dtype) -> float:
    extent = PRODUCT_EXTENT[stopwatch.device]
    # Random, because with zeros a GPU draws less power and runs faster.
    a, b = (torch.randn(extent, extent, device=stopwatch.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * math.pow(extent, 3) / _median(stopwatch, lambda: torch.mm(a, b, out=out))


def _median(stopwatch: Stopwatch, run: Callable[[], object]) -> float:
    measure = (
        stopwatch.on_cpu if stopwatch.device == "cpu" else lambda runs: stopwatch.on_gpu(runs, cold=False)
    )
    return measure({"it": run})["it"].median
