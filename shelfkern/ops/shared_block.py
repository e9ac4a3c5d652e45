"""shared_block: the shared-weights residual block (paper 3.3), one weight tensor for both convolutions."""

from __future__ import annotations

from torch import Tensor

from . import _backends as backends
from . import _common as common
from .conv_bn_act import PackedConv, conv_bn_act_native, conv_bn_act_reference, pack_conv

OP = "shared_block"


def shared_block_reference(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None = 0.0,
    skip: bool = False,
) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    h = conv_bn_act_reference(x, w, scale1, shift1, padding=1, slope=slope)
    return conv_bn_act_reference(h, w, scale2, shift2, x, x if skip else None, padding=1)


def can_run(x: Tensor) -> backends.Reasons:
    """Why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def shared_block_native(
    x: Tensor,
    packed: PackedConv,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    hidden: Tensor,
    out: Tensor,
    slope: float | None,
    skip: bool,
) -> None:
    """The native kernel into `out`, unchecked; `hidden` is memory of x's shape for what lies between."""
    conv_bn_act_native(x, packed, scale1, shift1, None, None, hidden, slope)
    conv_bn_act_native(hidden, packed, scale2, shift2, x, x if skip else None, out, 0.0)


@backends.custom_op(OP)
def _op(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None,
    skip: bool,
    backend: str,
) -> Tensor:
    shape = tuple(x.shape)
    hidden, out = common.empty_channels_last(x, shape), common.empty_channels_last(x, shape)
    shared_block_native(
        common.channels_last(x),
        pack_conv(w, padding=1),
        common.float32(scale1),
        common.float32(shift1),
        common.float32(scale2),
        common.float32(shift2),
        hidden,
        out,
        slope,
        skip,
    )
    return out


@_op.register_fake
def _(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None,
    skip: bool,
    backend: str,
) -> Tensor:
    return common.empty_channels_last(x, tuple(x.shape))


def shared_block(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    slope: float | None = 0.0,
    skip: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h = act(scale1 * conv(x, w) + shift1); relu(scale2 * conv(h, w) + shift2 + x), + x if `skip`.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        w: (C, C, 3, 3), used by both convolutions, padding 1.
        scale1, shift1, scale2, shift2: (C,), the two folded batch norms.
        slope: of the first activation: 0 relu, up to 1 leaky relu, None nothing.
        skip: whether x is added once more at the end, as at the entry of a down column.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, H, W), dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    c = x.shape[1]
    common.check_shape(OP, "w", w, (c, c, 3, 3), f"x of {tuple(x.shape)}")
    common.check_device(OP, "w", w, x)
    affine = dict(scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2)
    for name, value in affine.items():
        common.check_shape(OP, name, value, (c,), f"x of {tuple(x.shape)}")
        common.check_device(OP, name, value, x)
    common.check_slope(OP, slope)
    tensors = (x, w, scale1, shift1, scale2, shift2)
    chosen = backends.choose(OP, backend, can_run(x), tensors)
    if chosen == "reference":
        return shared_block_reference(*tensors, slope, skip)
    return _op(*tensors, slope, skip, chosen)
