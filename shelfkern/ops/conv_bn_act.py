"""conv_bn_act: act(scale * conv(x, w) + shift + residual) + skip in one pass."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common

OP = "conv_bn_act"
PANEL = 16
# Products that are summed from zero before they join the rest. A running sum of 576 is off from float64
# by up to 1.7 times what eager's blocked sums are, one of 1152 by 2.5 times, one of 288 no more than they.
MAX_TERMS = 288


@dataclasses.dataclass(frozen=True)
class PackedConv:
    """A convolution's weights as the native kernels read them.

    Attributes:
        data: float32, per panel of 16 output channels and chunk of input channels:
            kernel_h x kernel_w x chunk x 16, zeros beyond the last output channel.
        out_channels, in_channels, kernel: of the convolution.
        stride, padding: of both sides, at the top and left; what lies beyond the input is zero.
        chunk: input channels in a chunk; the last may have fewer.
    """

    data: Tensor
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    chunk: int


def pack_conv(w: Tensor, stride: int = 1, padding: int = 0, terms: int = MAX_TERMS) -> PackedConv:
    """Packs weights (K, C, kernel_h, kernel_w) for the native kernels, which sum `terms` products at once."""
    k, c, kernel_h, kernel_w = w.shape
    chunks = -(-c // max(1, terms // (kernel_h * kernel_w)))
    chunk = -(-c // chunks)
    panels = -(-k // PANEL)
    padded = F.pad(common.float32(w), (0, 0, 0, 0, 0, 0, 0, panels * PANEL - k))
    parts = [
        part.reshape(panels, PANEL, part.shape[1], kernel_h, kernel_w).permute(0, 3, 4, 2, 1).flatten(1)
        for part in padded.split(chunk, dim=1)
    ]
    data = torch.cat(parts, dim=1).contiguous()
    return PackedConv(data, k, c, (kernel_h, kernel_w), stride, padding, chunk)


def conv_bn_act_reference(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    slope: float | None = 0.0,
) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    y = F.conv2d(x, w.to(x.dtype), None, stride, padding)
    if scale is not None:
        y = y * scale.to(x.dtype)[:, None, None]
    if shift is not None:
        y = y + shift.to(x.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    y = common.activate(y, slope)
    return y if skip is None else y + skip


def can_run(x: Tensor) -> backends.Reasons:
    """Why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def conv_bn_act_native(
    x: Tensor,
    packed: PackedConv,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    out: Tensor,
    slope: float | None,
) -> None:
    """The native kernel into `out`, unchecked: x in NHWC storage, parameters float32.

    out, residual and skip have one stride of channels, 1, and the same other strides; they need not be
    dense.
    """
    n, c, h, w = x.shape
    _, k, out_h, out_w = out.shape
    stride_n, _, stride_h, stride_w = out.stride()
    native.module.conv_bn_act(
        x.data_ptr(),
        packed.data.data_ptr(),
        native.address(scale),
        native.address(shift),
        native.address(residual),
        native.address(skip),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c, out_h, out_w, k,
        *packed.kernel,
        packed.stride,
        packed.padding,
        packed.padding,
        packed.chunk,
        stride_n, stride_h, stride_w,
        common.native_slope(slope),
        torch.get_num_threads(),
    )  # fmt: skip


def out_shape(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """(N, K, H', W') of a convolution."""
    extents = [(x.shape[i] + 2 * padding - w.shape[i]) // stride + 1 for i in (2, 3)]
    return x.shape[0], w.shape[0], extents[0], extents[1]


@backends.custom_op(OP)
def _op(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    stride: int,
    padding: int,
    slope: float | None,
    backend: str,
) -> Tensor:
    out = common.empty_channels_last(x, out_shape(x, w, stride, padding))
    conv_bn_act_native(
        common.channels_last(x),
        pack_conv(w, stride, padding),
        None if scale is None else common.float32(scale),
        None if shift is None else common.float32(shift),
        None if residual is None else common.channels_last(residual),
        None if skip is None else common.channels_last(skip),
        out,
        slope,
    )
    return out


@_op.register_fake
def _(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    stride: int,
    padding: int,
    slope: float | None,
    backend: str,
) -> Tensor:
    return common.empty_channels_last(x, out_shape(x, w, stride, padding))


def conv_bn_act(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    slope: float | None = 0.0,
    backend: str = "auto",
) -> Tensor:
    """act(scale * conv(x, w) + shift + residual) + skip.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        w: (K, C, kernel_h, kernel_w). The public op packs it at every call; the engine packs once.
        scale, shift: (K,), a folded batch norm; None for 1 and 0.
        residual: (N, K, H', W'), added before the activation, dtype and device of x, or None.
        skip: the same, added after the activation.
        stride, padding: of both sides.
        slope: of the activation: 0 relu, up to 1 leaky relu, None nothing.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, K, H', W'), dtype of x; sums are in float32 or wider. channels_last from the native kernel.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    shape = _check(x, w, stride, padding, slope)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            common.check_shape(OP, name, value, (w.shape[0],), f"w of {tuple(w.shape)}")
            common.check_device(OP, name, value, x)
    for name, value in (("residual", residual), ("skip", skip)):
        if value is not None:
            common.check_shape(OP, name, value, shape, f"x of {tuple(x.shape)} and w of {tuple(w.shape)}")
            common.check_same(OP, name, value, x)
    tensors = (x, w, scale, shift, residual, skip)
    chosen = backends.choose(OP, backend, can_run(x), tensors)
    if chosen == "reference":
        return conv_bn_act_reference(*tensors, stride, padding, slope)
    return _op(*tensors, stride, padding, slope, chosen)


def _check(x: Tensor, w: Tensor, stride: int, padding: int, slope: float | None) -> tuple[int, ...]:
    common.check_4d(OP, "x", x)
    common.check_tensor(OP, "w", w)
    common.check_device(OP, "w", w, x)
    if w.ndim != 4 or w.shape[1] != x.shape[1]:
        needs = f"(K, {x.shape[1]}, kernel_h, kernel_w)"
        raise ValueError(f"{OP}: w is {tuple(w.shape)}, x of {tuple(x.shape)} needs {needs}")
    if min(w.shape) < 1:
        raise ValueError(f"{OP}: w is {tuple(w.shape)}, every extent must be at least 1")
    if stride < 1 or padding < 0:
        raise ValueError(
            f"{OP}: stride is {stride} and padding {padding}, they must be at least 1 and at least 0"
        )
    common.check_slope(OP, slope)
    shape = out_shape(x, w, stride, padding)
    if min(shape[2:]) < 1:
        raise ValueError(f"{OP}: x is {tuple(x.shape)}, too small for w of {tuple(w.shape)}")
    return shape
