"""One arena for all activations of a forward pass: which value is where, and for how long."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .order import Order, in_sequence
from .plan import Plan, Value

# A CPU cache line, which is also one AVX-512 vector; and two 32-byte sectors of a GPU.
ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Memory that only a step's algorithm uses."""

    step: int


Tenant = Value | Scratch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Byte offsets of activations and scratch memory inside an arena of `size` bytes."""

    offsets: dict[Tenant, int]
    size: int


def value_bytes(value: Value, n: int, h: int, w: int, dtype: torch.dtype) -> int:
    """Size of a value in bytes, rounded up to whole cache lines."""
    return _rounded(value.bytes(n, h, w, dtype))


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def lay_out(
    plan: Plan,
    values: set[Value],
    n: int,
    h: int,
    w: int,
    dtype: torch.dtype,
    order: Order | None = None,
    scratch: Mapping[int, int] | None = None,
) -> Layout:
    """Places `values` so that those alive at the same time never overlap.

    Greedy by size: the largest first, each at the lowest offset that is free over its whole lifetime. Two
    values may share memory if all steps that use the one have ended before the other is written: no step
    overwrites its own inputs, or those of a step that runs beside it.

    Args:
        plan: plan that the values belong to.
        values: values to place in the arena.
        n, h, w: number of images, and the size they are seen as.
        dtype: dtype of activations.
        order: order in which the steps run; one after the other by default.
        scratch: bytes of scratch memory by step.
    """
    order = order or in_sequence(plan)
    scratch = {step: size for step, size in (scratch or {}).items() if size}
    sizes: dict[Tenant, int] = {value: value_bytes(value, n, h, w, dtype) for value in values}
    sizes |= {Scratch(step): _rounded(size) for step, size in scratch.items()}
    touched = _touched(plan)
    touched |= {Scratch(step): [step] for step in scratch}
    offsets: dict[Tenant, int] = {}
    for tenant in sorted(sizes, key=lambda t: (-sizes[t], touched[t][0], _rank(t))):
        apart = _apart_from(touched[tenant], order)
        neighbours = sorted(
            (offsets[other], offsets[other] + sizes[other]) for other in offsets if not apart(touched[other])
        )
        offsets[tenant] = _first_gap(neighbours, sizes[tenant])
    total = max((offsets[t] + sizes[t] for t in offsets), default=0)
    return Layout(offsets, total)


def _rank(tenant: Tenant) -> int:
    return -1 if isinstance(tenant, Scratch) else tenant.index


def _touched(plan: Plan) -> dict[Tenant, list[int]]:
    """For each value, the steps that use it, its writer first. The scores outlive all steps."""
    touched: dict[Tenant, list[int]] = {}
    for index, step in enumerate(plan.steps):
        for value in (*step.outputs, *step.temporaries):
            touched[value] = [index]
        for value in step.inputs:
            touched[value].append(index)
    touched[plan.scores].append(len(plan.steps))
    return touched


def _apart_from(steps: list[int], order: Order) -> Callable[[list[int]], bool]:
    """A test whether a value used by other steps is dead before this one is written, or vice versa."""

    def apart(others: list[int]) -> bool:
        return all(_ended(step, others[0], order) for step in steps) or all(
            _ended(step, steps[0], order) for step in others
        )

    return apart


def _ended(step: int, begins: int, order: Order) -> bool:
    return step < len(order.before) and order.ended(step, begins)


def _first_gap(taken: list[tuple[int, int]], size: int) -> int:
    offset = 0
    for start, end in taken:
        if start - offset >= size:
            break
        offset = max(offset, end)
    return offset


def view(arena: Tensor, layout: Layout, value: Value, n: int, h: int, w: int, dtype: torch.dtype) -> Tensor:
    """A value's tensor inside the arena: channels_last (N, C, H, W), or a float32 gate (N, C)."""
    shape, own = value.shape(n, h, w), value.dtype(dtype)
    start = layout.offsets[value]
    flat = arena[start : start + math.prod(shape) * own.itemsize].view(own)
    if value.stride is None:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def like(out: Tensor, memory: Tensor) -> Tensor:
    """A tensor of out's shape and dtype in NHWC storage, at the start of `memory`."""
    n, c, h, w = out.shape
    flat = memory[: out.numel() * out.element_size()].view(out.dtype)
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
