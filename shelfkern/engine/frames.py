"""Streams of frames: upload, segmentation and download of successive batches overlap."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gpu.device import Runtime

Frame = np.ndarray | Tensor
Predict = Callable[[Tensor], Tensor]


def as_frame(frame: Frame) -> Tensor:
    """A frame as a CPU tensor.

    Raises:
        TypeError, ValueError: it is not uint8 (H, W, 3) on the CPU.
    """
    if isinstance(frame, np.ndarray):
        # Copies where rows are in reverse order, as in a mirrored view: torch has no negative strides.
        frame = torch.from_numpy(np.ascontiguousarray(frame))
    if not isinstance(frame, Tensor):
        raise TypeError(f"a frame is {type(frame).__name__}, it must be a numpy array or a tensor")
    if frame.dtype is not torch.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is {frame.dtype} {tuple(frame.shape)}, it must be uint8 (H, W, 3)")
    if frame.device.type != "cpu":
        raise ValueError(f"a frame is on {frame.device}, it must be on the cpu")
    return frame


def batches(frames: Iterable[Frame], batch: int) -> Iterator[list[Tensor]]:
    """Frames in lists of up to `batch`; frames of one list have the same size."""
    for _, same in itertools.groupby(map(as_frame, frames), key=lambda frame: frame.shape):
        while some := list(itertools.islice(same, batch)):
            yield some


class _Slot:
    """Pinned memory and device memory of one batch in flight."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, runtime: Runtime) -> None:
        self.upload = runtime.pinned(shape)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.download = runtime.pinned(shape[:3])
        # Marks the end of reading `images`, and at first of the memory's previous use: the allocator hands it
        # out as soon as that work has been launched on this stream.
        self.segmented = runtime.mark()
        # Marks the end of the copy of the labels into `download`.
        self.downloaded: Any = None


class FrameStream:
    """Labels of batches in order, with `depth` batches in flight."""

    def __init__(self, predict: Predict, device: torch.device, runtime: Runtime, depth: int = 2) -> None:
        self._predict, self._device, self._runtime = predict, device, runtime
        self._depth = depth
        self._upload, self._download = runtime.side_stream(), runtime.side_stream()
        self._slots: collections.deque[_Slot] = collections.deque()

    def run(self, batches: Iterable[list[Tensor]]) -> Iterator[Tensor]:
        """Labels (H, W) uint8 on the CPU, a separate tensor per frame."""
        pending: collections.deque[_Slot] = collections.deque()
        for frames in batches:
            shape = (len(frames), *frames[0].shape)
            while pending and (len(pending) == self._depth or pending[0].images.shape != shape):
                yield from self._collect(pending.popleft())
            pending.append(self._submit(frames, shape))
        while pending:
            yield from self._collect(pending.popleft())

    def _submit(self, frames: list[Tensor], shape: tuple[int, ...]) -> _Slot:
        """Starts the upload of a batch, its segmentation and the download of its labels."""
        slot, runtime = self._free_slot(shape), self._runtime
        for target, frame in zip(slot.upload, frames, strict=True):
            target.copy_(frame)
        with runtime.on(self._upload):
            runtime.wait(slot.segmented)
            slot.images.copy_(slot.upload, non_blocking=True)
            uploaded = runtime.mark()
        runtime.wait(uploaded)
        labels = self._predict(slot.images)
        slot.segmented = runtime.mark()
        with runtime.on(self._download):
            runtime.wait(slot.segmented)
            slot.download.copy_(labels, non_blocking=True)
            runtime.keep(labels)
            slot.downloaded = runtime.mark()
        return slot

    def _free_slot(self, shape: tuple[int, ...]) -> _Slot:
        """Memory of an earlier batch of this size whose labels have been collected, or new memory."""
        while self._slots:
            slot = self._slots.popleft()
            if slot.images.shape == shape:
                return slot
        return _Slot(shape, self._device, self._runtime)

    def _collect(self, slot: _Slot) -> Iterator[Tensor]:
        """Waits for a batch; its memory may then be reused."""
        self._runtime.synchronize(slot.downloaded)
        labels = slot.download.clone()
        self._slots.append(slot)
        yield from labels
