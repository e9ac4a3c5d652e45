"""Helpers shared by the ops: argument checks and memory layouts. For the backends see _backends.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import native

# Bytes. Mapping tensors of 2 MiB or less too would make a step 2 to 4 percent slower.
MAPPED = 8 * 1024 * 1024


def check_tensor(op: str, name: str, x: object) -> None:
    """Raises unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}, it must be a tensor")


def check_4d(op: str, name: str, x: Tensor) -> None:
    """Raises unless x is a floating (N, C, H, W) tensor."""
    check_tensor(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {x.dtype}, it must be floating")
    if x.ndim != 4:
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}, it must be (N, C, H, W)")


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raises unless x has this shape; `why` says what requires it."""
    check_tensor(op, name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}, {why} needs {tuple(shape)}")


def check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """Raises unless x is on the device of `like`, the op's input."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on the input's {like.device}")


def check_same(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """Raises unless x has the device and dtype of `like`, which is the op's argument x."""
    check_device(op, name, x, like)
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} is {x.dtype}, x is {like.dtype}: they must have one dtype")


def autocast(x: object) -> Any:
    """x, cast as torch.autocast, if enabled for x's device, casts the input of a convolution."""
    return x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x


def autocast_dtype(x: Tensor) -> torch.dtype:
    """dtype of what `autocast` makes of x."""
    # Not torch.amp.is_autocast_available: torch.compile of torch 2.11 cannot trace it.
    if x.device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def check_slope(op: str, slope: float | None) -> None:
    """Raises unless slope is None or from 0 to 1."""
    if slope is not None and not 0 <= slope <= 1:
        raise ValueError(f"{op}: slope is {slope}, it may be None (no activation) or from 0 (relu) to 1")


def channels_last(x: Tensor) -> Tensor:
    """x in NHWC storage, without strides left over from dimensions of size 1."""
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def channels_innermost(x: Tensor) -> Tensor:
    """x itself if its channel stride is 1, otherwise a copy in NHWC storage."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else channels_last(x)


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of n, h and w, as passed to GPU kernels for a tensor with channel stride 1; zeros for None."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(2), x.stride(3))


def empty_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (N, C, H, W) tensor in NHWC storage, of x's dtype."""
    _, c, h, w = shape
    # Not a view of another tensor: autograd accumulates gradients into it in place.
    return x.new_empty_strided(shape, (h * w * c, 1, w * c, c))


def keep_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`empty_channels_last` for a tensor kept for a gradient; on a CPU, if large, in its own memory mapping.

    Such memory returns to the system at once. In the C library's heap, between smaller blocks, it would leave
    gaps too small for later allocations.
    """
    if math.prod(shape) * x.dtype.itemsize < MAPPED:
        return empty_channels_last(x, shape)
    return _of_buffer(x, shape, pooled=False)


def borrow_channels_last(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`empty_channels_last` for a short-lived tensor; on a CPU in memory that is reused."""
    return _of_buffer(x, shape, pooled=True)


def _of_buffer(x: Tensor, shape: tuple[int, ...], pooled: bool) -> Tensor:
    if x.device.type != "cpu":
        return empty_channels_last(x, shape)
    n, c, h, w = shape
    return native.empty((n, h, w, c), x.dtype, pooled).permute(0, 3, 1, 2)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def float32(x: Tensor) -> Tensor:
    """x as a contiguous float32 tensor, as kernels take parameters."""
    return x.detach().to(torch.float32).contiguous()


def activate(x: Tensor, slope: float | None) -> Tensor:
    """relu for slope 0, leaky relu up to 1, no activation for None."""
    if slope is None:
        return x
    return torch.nn.functional.leaky_relu(x, slope) if slope else torch.relu(x)


def native_slope(slope: float | None) -> float:
    """A slope as the native kernels take it: 1 means no activation."""
    return 1.0 if slope is None else slope
