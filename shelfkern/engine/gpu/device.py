"""GPU properties, and the engine's interface to streams, events and graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

# Captures are rare and share torch's flags and the caching allocator: one at a time per process.
_CAPTURING = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU's properties.

    Attributes:
        name: name given by the driver.
        capability: compute capability.
        multiprocessors: number of multiprocessors.
        shared_bytes: shared memory available to a block.
        l2_bytes: size of the L2 cache.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int


# The GPU for which plans are made where there is none.
H200 = Gpu("NVIDIA H200", (9, 0), 132, 227 * 1024, 60 << 20)


def gpu_of(device: torch.device) -> Gpu:
    """The properties of a device's GPU; for the CPU an H200, whose kernels are emulated there."""
    if device.type != "cuda":
        return H200
    found: Any = torch.cuda.get_device_properties(device)  # the type stub lacks attributes
    return Gpu(
        found.name,
        (found.major, found.minor),
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.L2_cache_size,
    )


class Graph(Protocol):
    """A recorded forward pass."""

    def replay(self) -> None:
        """Runs it on the current stream."""


class Runtime(Protocol):
    """Streams, events and graphs: those of `torch.cuda`, or of a stand-in that records the calls."""

    def side_stream(self) -> Any:
        """A new stream."""

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Context in which `stream` is the current one."""

    def current(self) -> Any:
        """The current stream, comparable with others."""

    def mark(self) -> Any:
        """An event after all work submitted to the current stream."""

    def wait(self, event: Any) -> None:
        """Makes the current stream wait for an event."""

    def synchronize(self, event: Any) -> None:
        """Makes the host wait for an event."""

    def keep(self, tensor: Tensor) -> None:
        """Keeps a tensor's memory from being reused until the current stream's present work is done."""

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """Page-locked uint8 host memory, which copies to and from the device can use asynchronously."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Runs a function once as warm-up, and records a second run."""


class CudaRuntime:
    """The streams, events and graphs of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def side_stream(self) -> torch.cuda.Stream:
        """A new stream."""
        return torch.cuda.Stream(self.device)

    def on(self, stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[Any]:
        """Context in which `stream` is the current one."""
        return torch.cuda.stream(stream)

    def current(self) -> torch.cuda.Stream:
        """The current stream."""
        return torch.cuda.current_stream(self.device)

    def mark(self) -> torch.cuda.Event:
        """An event after all work submitted to the current stream."""
        event = torch.cuda.Event()
        event.record(self.current())
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Makes the current stream wait for an event."""
        self.current().wait_event(event)

    def synchronize(self, event: torch.cuda.Event) -> None:
        """Makes the host wait for an event."""
        event.synchronize()

    def keep(self, tensor: Tensor) -> None:
        """Keeps a tensor's memory from being reused until the current stream's present work is done."""
        tensor.record_stream(self.current())

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """Page-locked uint8 host memory."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def capture(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Runs a function once on a separate stream, then records it.

        The first run compiles kernels and lets cuDNN choose, which is not allowed during capture. Other
        threads may launch work meanwhile.
        """
        graph, stream = torch.cuda.CUDAGraph(), self.side_stream()
        with _CAPTURING, torch.cuda.device(self.device), _cudnn_measures():
            stream.wait_stream(self.current())
            with torch.cuda.stream(stream):
                run()
            stream.synchronize()
            # If a capture fails, torch leaves its stream the current one.
            recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            with torch.cuda.stream(self.current()), recording:
                run()
        return graph


@contextlib.contextmanager
def _cudnn_measures() -> Iterator[None]:
    """Context in which cuDNN times its algorithms the first time it sees a shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class HostRuntime:
    """For kernels emulated on the CPU: one stream, and a graph is the function itself."""

    def side_stream(self) -> None:
        """There is only one stream."""

    @contextlib.contextmanager
    def on(self, stream: None) -> Iterator[None]:
        """Does nothing."""
        yield

    def current(self) -> None:
        """There is only one stream."""

    def mark(self) -> object:
        """A completed event: all work runs synchronously."""
        return self

    def wait(self, event: object) -> None:
        """Does nothing: all work runs synchronously."""

    def synchronize(self, event: object) -> None:
        """Does nothing: all work runs synchronously."""

    def keep(self, tensor: Tensor) -> None:
        """Does nothing: all work runs synchronously."""

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        """Ordinary host memory."""
        return torch.empty(shape, dtype=torch.uint8)

    def capture(self, run: Callable[[], None]) -> Graph:
        """Keeps the function."""
        return _HostGraph(run)


@dataclasses.dataclass(frozen=True)
class _HostGraph:
    run: Callable[[], None]

    def replay(self) -> None:
        self.run()


def runtime_of(device: torch.device) -> Runtime:
    """The runtime of a device."""
    return CudaRuntime(device) if device.type == "cuda" else HostRuntime()


def empty_bytes(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
