"""A stand-in for CUDA's streams, events and graphs that remembers what it was asked."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@dataclasses.dataclass
class Event:
    """What had been given to a stream when it was marked, and what that stream had waited for."""

    number: int
    done: frozenset[object]
    happened: bool = False


@dataclasses.dataclass
class Recording:
    """Runs everything at once, on the CPU, and keeps for every stream what has ended before its next work.

    Attributes:
        log: what was asked, in order.
        ended: of each stream, the work that has ended before what it is given next.
    """

    log: list[tuple[object, ...]] = dataclasses.field(default_factory=list)
    ended: dict[str, set[object]] = dataclasses.field(default_factory=lambda: {"main": set()})
    stream: str = "main"
    kept: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def side_stream(self) -> str:
        name = f"side{next(self._numbers)}"
        self.ended[name] = set()
        return name

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def current(self) -> str:
        return self.stream

    def mark(self) -> Event:
        event = Event(next(self._numbers), frozenset(self.ended[self.stream]))
        self.log.append(("mark", self.stream, event.number))
        return event

    def wait(self, event: Event) -> None:
        self.ended[self.stream] |= event.done
        self.log.append(("wait", self.stream, event.number))

    def synchronize(self, event: Event) -> None:
        self.ended.setdefault("host", set()).update(event.done)
        self.log.append(("synchronize", "host", event.number))

    def keep(self, tensor: Tensor) -> None:
        self.kept.append((self.stream, tensor.data_ptr()))

    def pinned(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8)

    def work(self, what: object) -> None:
        """Some work on the current stream."""
        self.log.append(("work", self.stream, what))
        self.ended[self.stream].add(what)

    def capture(self, run: Callable[[], None]) -> Graph:
        self.log.append(("capture", self.stream))
        return Graph(self, run)


@dataclasses.dataclass
class Graph:
    runtime: Recording
    run: Callable[[], None]

    def replay(self) -> None:
        self.runtime.log.append(("replay", self.runtime.stream))
        self.run()
