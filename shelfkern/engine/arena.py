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


def lay_out(
    plan: Plan, values: set[Value], n: int, h: int, w: int, dtype: torch.dtype
) -> Layout:
    """Places `values` so that values alive at the same time never overlap.

    Greedy by size: the largest first, each at the lowest offset free over its whole life. A value
    lives from the step that writes it to the last that reads it, both included: no step writes over
    what it reads.
    """
    born = {step.output: index for index, step in enumerate(plan.steps) if step.output in values}
    dies = plan.last_uses()
    sizes = {value: value_bytes(value, n, h, w, dtype) for value in born}
    offsets: dict[Value, int] = {}
    for value in sorted(born, key=lambda v: (-sizes[v], born[v])):
        neighbours = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if born[other] <= dies[value] and born[value] <= dies[other]
        )
        offsets[value] = _first_gap(neighbours, sizes[value])
    total = max((offsets[v] + sizes[v] for v in offsets), default=0)
    return Layout(offsets, total)


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
