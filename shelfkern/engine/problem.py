"""What both engines need to choose how a step runs: its name, tensors to time it on, its packed weights."""

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

# Of random codes.
CODES_DEVIATION = 40
# Of `tune=True`.
TUNING_SECONDS = 60.0


def key_of(
    step: p.Step, size: Size, dtype: torch.dtype, precision: str = "", extents: Extents | None = None
) -> str:
    """A problem's name: equal for steps that do the same work on activations of `dtype`.

    extents: of images that the step enlarges, where it reads them.
    """
    shapes = [value.shape(*size) for value in (*step.inputs, *step.outputs)]
    shapes += [tuple(t.shape) for t in step.weights() if t.ndim > 1]
    kind = f"{str(dtype).removeprefix('torch.')} {precision}".rstrip()
    detail = step.detail()
    if extents is not None and extents.enlarges and not step.inputs:
        detail += f", of images enlarged {extents.scale} times"
    return " ".join([step.op, detail, *("x".join(map(str, shape)) for shape in shapes), kind])


def random_value(value: p.Value, size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random values of an activation, for zeros draw less power and run faster."""
    # Of its own, for nobody expects an inference to use up random numbers.
    generator = torch.Generator(device).manual_seed(value.index)
    shape, own = value.shape(*size), value.dtype(dtype)
    if value.stride is None:
        return torch.rand(shape, dtype=own, device=device, generator=generator)
    n, c, h, w = shape
    values = torch.randn((n, h, w, c), device=device, generator=generator)
    if value.codes is not None:
        # As codes of activations spread: one step of a normal deviate would make most of int8's zeros.
        values = (CODES_DEVIATION * values).round().clamp(-127, 127)
        values = values.abs() if own is torch.uint8 else values
    return values.to(own).permute(0, 3, 1, 2)


def random_image(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normalised images as they might come."""
    n, h, w = size
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((n, 3, h, w), device=device, generator=generator).to(dtype)


class Packed:
    """Weights of one step in the forms its algorithms read, each made once.

    Those of a form that only some sizes read are kept for as long as somebody holds them.

    done: called when something was made: waits until it is there, whichever stream reads it, or gives back
        the memory that making it took.
    """

    def __init__(self, done: Callable[[], None] | None = None) -> None:
        self._done = done
        self._lock = threading.Lock()
        self._made: dict[Hashable, Any] = {}
        self._held: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def get(self, form: Hashable, make: Callable[[], T]) -> T:
        """The weights in a form, made where they are not there yet."""
        return self._get(self._made, form, make)

    def while_held(self, form: Hashable, make: Callable[[], T]) -> T:
        """As `get`, but forgotten when nobody holds what was given."""
        return self._get(self._held, form, make)

    def _get(self, made: MutableMapping[Hashable, Any], form: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            found = made.get(form)
            if found is None:
                found = made[form] = make()
                if self._done is not None:
                    self._done()
            return found
