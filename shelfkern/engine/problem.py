"""Shared by both engines to choose how a step runs: problem keys, tensors for timing, packed weights."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..nn.extents import Extents
from . import plan as p

# n images seen as h x w.
Size = tuple[int, int, int]
T = TypeVar("T")

# Standard deviation of random 8-bit values.
CODES_DEVIATION = 40
# Default time limit of `tune=True`.
TUNING_SECONDS = 60.0


def key_of(
    step: p.Step, size: Size, dtype: torch.dtype, precision: str = "", extents: Extents | None = None
) -> str:
    """A problem's name: equal for steps that do the same work on activations of `dtype`.

    extents: resizing of the images, for a step that reads and enlarges them.
    """
    shapes = [value.shape(*size) for value in (*step.inputs, *step.outputs)]
    shapes += [tuple(t.shape) for t in step.weights() if t.ndim > 1]
    kind = f"{str(dtype).removeprefix('torch.')} {precision}".rstrip()
    detail = step.detail()
    if extents is not None and extents.enlarges and not step.inputs:
        detail += f", of images enlarged {extents.scale} times"
    return " ".join([step.op, detail, *("x".join(map(str, shape)) for shape in shapes), kind])


def random_value(value: p.Value, size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values of an activation: zeros would draw less power and run faster."""
    # A generator of its own, because inference should not consume the user's random numbers.
    generator = torch.Generator(device).manual_seed(value.index)
    shape, own = value.shape(*size), value.dtype(dtype)
    if value.stride is None:
        return torch.rand(shape, dtype=own, device=device, generator=generator)
    n, c, h, w = shape
    values = torch.randn((n, h, w, c), device=device, generator=generator)
    if value.codes is not None:
        # Spread like real 8-bit activations: with a step of one normal deviate most int8 values would be 0.
        values = (CODES_DEVIATION * values).round().clamp(-127, 127)
        values = values.abs() if own is torch.uint8 else values
    return values.to(own).permute(0, 3, 1, 2)


def random_image(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random images with the statistics of normalised ones."""
    n, h, w = size
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((n, 3, h, w), device=device, generator=generator).to(dtype)


class Packed:
    """Weights of one step in the layouts its algorithms read, each made once.

    Layouts that only some sizes need are kept only as long as something refers to them.

    done: called after a layout was made: waits until the data is there, whichever stream reads it, or frees
        the memory that making it took.
    """

    def __init__(self, done: Callable[[], None] | None = None) -> None:
        self._done = done
        self._lock = threading.Lock()
        self._made: dict[Hashable, Any] = {}
        self._held: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def get(self, form: Hashable, make: Callable[[], T]) -> T:
        """The weights in a layout, made on first use."""
        return self._get(self._made, form, make)

    def while_held(self, form: Hashable, make: Callable[[], T]) -> T:
        """Like `get`, but the weights are freed when nothing refers to them any more."""
        return self._get(self._held, form, make)

    def _get(self, made: MutableMapping[Hashable, Any], form: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            found = made.get(form)
            if found is None:
                found = made[form] = make()
                if self._done is not None:
                    self._done()
            return found
