"""Time, memory and launches of whole networks, with the clocks of the op benchmarks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from cases import Case
from clocks import GRAPH_CALLS, Ceilings, Stopwatch, measure_ceilings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shelfkern.timing import Timing, time_interleaved

Run = Callable[[], object]
MIB = 2**20
# Seconds that a timer treats as unlimited.
FOREVER = 1e6


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one variant's calls.

    Attributes:
        call: on a GPU between events around a call that the host has launched ahead; on a CPU the call.
        wall: on a GPU from the call until the host has waited for it; on a CPU the same as `call`.
    """

    call: Timing
    wall: Timing


@contextlib.contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """Context in which torch uses a case's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Meter:
    """Measures variants on one device, each set of them for about `seconds` per clock."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self._stopwatch = Stopwatch(device, seconds)

    def ceilings(self, dtypes: tuple[torch.dtype, ...]) -> Ceilings:
        """The machine's measured peak rates."""
        return measure_ceilings(self._stopwatch, dtypes)

    def context_lost(self) -> bool:
        """Whether the GPU's context is broken for the rest of the process."""
        return self._stopwatch.context_lost()

    def measure(self, runs: Mapping[str, Run]) -> dict[str, Times]:
        """Times of every variant, interleaved."""
        if self.device == "cpu":
            return {name: Times(timing, timing) for name, timing in self._stopwatch.on_cpu(runs).items()}
        calls = self._stopwatch.on_gpu(runs, cold=False)
        rounds = len(next(iter(calls.values())).seconds)
        waited = time_interleaved({name: _waited(run) for name, run in runs.items()}, rounds)
        return {name: Times(calls[name], waited[name]) for name in runs}

    def in_graphs(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        """Times of one call within a replayed CUDA graph of several calls, without launches by the host."""
        graphs = {name: record(_repeated(run)) for name, run in runs.items()}
        replays = {name: graph.replay for name, graph in graphs.items()}
        return {
            name: Timing(tuple(seconds / GRAPH_CALLS for seconds in timing.seconds))
            for name, timing in self._stopwatch.on_gpu(replays, cold=False).items()
        }

    def launches(self, run: Run) -> int | None:
        """Kernels launched by a call, including those in graphs; None on a CPU, or if none are reported."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
                run()
                torch.cuda.synchronize()
        except RuntimeError:
            return None
        return sum(map(_is_kernel, found.events())) or None


def _waited(run: Run) -> Run:
    def call() -> None:
        run()
        torch.cuda.synchronize()

    return call


def _repeated(run: Run) -> Run:
    def calls() -> None:
        for _ in range(GRAPH_CALLS):
            run()

    return calls


def _is_kernel(event: Any) -> bool:
    on_gpu = getattr(event, "device_type", None) is torch.autograd.DeviceType.CUDA
    other = event.name.startswith(("Memcpy", "Memset")) or getattr(event, "is_user_annotation", False)
    return bool(on_gpu and not other)


def record(run: Run) -> torch.cuda.CUDAGraph:
    """Calls a function twice on a separate stream, then records a third call as a CUDA graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    # If a capture fails, torch leaves its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    return graph


class Footprint:
    """Memory of a variant: create before preparing the variant, query afterwards."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        free()
        if self._on_gpu:
            self._before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def of(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Peak MiB of a call, weights included; empty on a CPU.

        allocated_mib: in tensors, without those inside recorded graphs.
        reserved_mib: reserved by the allocator, including those.
        """
        if not self._on_gpu:
            return {}
        free()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        allocated, reserved = self._before
        return {
            "allocated_mib": round((torch.cuda.max_memory_allocated() - allocated) / MIB, 1),
            "reserved_mib": round((torch.cuda.max_memory_reserved() - reserved) / MIB, 1),
        }


def free() -> None:
    """Frees memory that is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OutOfTime(BaseException):
    """The time limit was reached. Not an Exception, which interrupted code might catch and continue."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in its block after this many seconds; only in the main thread, not nested."""

    def interrupt(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    # Repeats every second, in case the exception is swallowed after all.
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), FOREVER), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Deadline:
    """When a run must end."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative once it has passed."""
        return self._end - self._clock()
