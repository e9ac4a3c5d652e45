"""Memory of forward passes, reused from call to call."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from torch import Tensor


class _HasArena(Protocol):
    @property
    def arena(self) -> Tensor: ...


Key = TypeVar("Key")
Space = TypeVar("Space", bound=_HasArena)


class WorkspacePool(Generic[Key, Space]):
    """Workspaces by key, such as a size. Each call gets one for itself.

    Up to `keep` idle ones are kept. The least recently used are freed first, so memory stays bounded when
    sizes vary.
    """

    def __init__(self, build: Callable[[Key], Space], keep: int = 4) -> None:
        self._build = build
        self._keep = keep
        self._idle: collections.deque[tuple[Key, Space]] = collections.deque()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, key: Key) -> Iterator[Space]:
        """A workspace for this key that no other call has."""
        workspace = self._take(key) or self._build(key)
        try:
            yield workspace
        finally:
            with self._lock:
                self._idle.append((key, workspace))
                while len(self._idle) > self._keep:
                    self._idle.popleft()

    def _take(self, key: Key) -> Space | None:
        with self._lock:
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index][0] == key:
                    workspace = self._idle[index][1]
                    del self._idle[index]
                    return workspace
        return None

    def bytes(self) -> int:
        """Bytes of the idle arenas."""
        with self._lock:
            return sum(workspace.arena.numel() for _, workspace in self._idle)
