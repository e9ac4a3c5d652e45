"""One arena for all activations of a forward pass: who lives where, and when."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .plan import Plan, Value

# A cache line, which is also a whole AVX-512 vector.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Layout:
    """Byte offsets of activations inside an arena of `size` bytes."""

    offsets: dict[Value, int]
    size: int


def value_bytes(value: Value, n: int, h: int, w: int, dtype: torch.dtype) -> int:
    """Bytes of a value, rounded up to whole cache lines. Gates are float32."""
    itemsize = 4 if value.stride is None else dtype.itemsize
    size = math.prod(value.shape(n, h, w)) * itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(plan: Plan, values: set[Value], n: int, h: int, w: int, dtype: torch.dtype) -> Layout:
    """Places `values` so that those alive at the same time never overlap.

    Greedy by size: the largest first, each at the lowest offset free over its whole life. A value
    lives from the step that writes it to the last that reads it, both included: no step writes over
    what it reads.
    """
    lives = {value: life for value, life in _lives(plan).items() if value in values}
    sizes = {value: value_bytes(value, n, h, w, dtype) for value in lives}
    offsets: dict[Value, int] = {}
    for value in sorted(lives, key=lambda v: (-sizes[v], v.index)):
        born, dies = lives[value]
        neighbours = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[other][0] <= dies and born <= lives[other][1]
        )
        offsets[value] = _first_gap(neighbours, sizes[value])
    total = max((offsets[v] + sizes[v] for v in offsets), default=0)
    return Layout(offsets, total)


def _lives(plan: Plan) -> dict[Value, tuple[int, int]]:
    """First and last step of every value's life."""
    dies = plan.last_uses()
    lives = {step.output: (index, dies[step.output]) for index, step in enumerate(plan.steps)}
    for index, step in enumerate(plan.steps):
        lives.update({value: (index, index) for value in step.temporaries})
    return lives


def _first_gap(taken: list[tuple[int, int]], size: int) -> int:
    offset = 0
    for start, end in taken:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset


def view(arena: Tensor, layout: Layout, value: Value, n: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """The tensor of a value inside the arena: channels_last (N, C, H, W), or a float32 gate (N, C)."""
    shape = value.shape(n, h, w)
    dtype = torch.float32 if value.stride is None else dtype
    start = layout.offsets[value]
    flat = arena[start : start + math.prod(shape) * dtype.itemsize].view(dtype)
    if value.stride is None:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
