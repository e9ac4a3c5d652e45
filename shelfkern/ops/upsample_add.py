"""upsample_add: skip + gate * nearest_x2(x), the merge of the real-time models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common

OP = "upsample_add"


def upsample_add_reference(x: Tensor, skip: Tensor, gate: Tensor | None = None) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    if gate is not None:
        x = x * gate.to(x.dtype)[:, :, None, None]
    return skip + F.interpolate(x, scale_factor=2.0, mode="nearest")


def can_run(x: Tensor) -> backends.Reasons:
    """Why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def upsample_add_native(x: Tensor, skip: Tensor, gate: Tensor | None, out: Tensor) -> None:
    """The native kernel into `out`, unchecked: NHWC storage, one dtype, gate float32."""
    n, c, h, w = x.shape
    native.module.upsample_add(
        x.data_ptr(),
        skip.data_ptr(),
        native.address(gate),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c,
        torch.get_num_threads(),
    )  # fmt: skip


def upsample_add_cuda(
    x: Tensor, skip: Tensor, gate: Tensor | None, out: Tensor, backend: str = "cuda"
) -> None:
    """The CUDA kernel into `out`, unchecked: channels contiguous, any other strides, gate float32."""
    n, c, h, w = x.shape
    backends.call_cuda(
        backend,
        OP,
        x,
        x.data_ptr(),
        skip.data_ptr(),
        native.address(gate),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c,
        backends.strides(x),
        backends.strides(skip),
        backends.strides(out),
    )  # fmt: skip


@backends.custom_op(OP)
def _op(x: Tensor, skip: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    out = common.empty_channels_last(x, tuple(skip.shape))
    gate = None if gate is None else common.float32(gate)
    if backend == "native":
        upsample_add_native(common.channels_last(x), common.channels_last(skip), gate, out)
    else:
        innermost = common.channels_innermost(x), common.channels_innermost(skip)
        upsample_add_cuda(*innermost, gate, out, backend)
    return out


@_op.register_fake
def _(x: Tensor, skip: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return common.empty_channels_last(x, tuple(skip.shape))


def upsample_add(x: Tensor, skip: Tensor, gate: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """skip + gate[n, c] * nearest_x2(x).

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        skip: (N, C, 2H, 2W), dtype and device of x.
        gate: (N, C) floating, or None for ones.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, 2H, 2W), dtype of x; channels_last from the native kernel.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    n, c, h, w = x.shape
    common.check_shape(OP, "skip", skip, (n, c, 2 * h, 2 * w), f"x of {tuple(x.shape)}")
    common.check_same(OP, "skip", skip, x)
    if gate is not None:
        common.check_shape(OP, "gate", gate, (n, c), f"x of {tuple(x.shape)}")
        common.check_device(OP, "gate", gate, x)
    chosen = backends.choose(OP, backend, can_run(x), (x, skip, gate))
    if chosen == "reference":
        return upsample_add_reference(x, skip, gate)
    return _op(x, skip, gate, chosen)
