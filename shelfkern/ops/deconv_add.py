"""deconv_add: a 3x3 transposed convolution of stride 2, plus bias, plus skip: the merge of ShelfNet50/101.

Every output pixel sees 1, 2, 2 or 4 of the nine taps, by the parity of its row and column. Four small
convolutions of the input, one a parity, write every second pixel: no zeros are multiplied.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from . import _backends as backends
from . import _common as common
from .conv_bn_act import PackedConv, conv_bn_act_native, pack_conv

OP = "deconv_add"
# Taps of the transposed kernel that reach even and odd outputs, for the input at and after it.
TAPS = ([1], [2, 0])

# Eager sums every tap apart, so that fewer products than a convolution's make one running sum.
MAX_TERMS = 128

PackedDeconv = tuple[PackedConv, PackedConv, PackedConv, PackedConv]


def pack_deconv(w: Tensor) -> PackedDeconv:
    """Packs weights (C, K, 3, 3) as four convolutions, for even and odd rows and columns."""
    kernels = [w[:, :, rows][:, :, :, columns] for rows in TAPS for columns in TAPS]
    a, b, c, d = (pack_conv(kernel.transpose(0, 1), terms=MAX_TERMS) for kernel in kernels)
    return a, b, c, d


def deconv_add_reference(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    return F.conv_transpose2d(x, w.to(x.dtype), bias.to(x.dtype), 2, 1, 1) + skip


def can_run(x: Tensor) -> backends.Reasons:
    """Why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def deconv_add_native(x: Tensor, packed: PackedDeconv, bias: Tensor, skip: Tensor, out: Tensor) -> None:
    """The native kernel into `out`, unchecked: NHWC storage, bias float32."""
    for parity, conv in enumerate(packed):
        row, column = divmod(parity, 2)
        part = (slice(None), slice(None), slice(row, None, 2), slice(column, None, 2))
        conv_bn_act_native(x, conv, None, bias, skip[part], None, out[part], None)


@backends.custom_op(OP)
def _op(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor, backend: str) -> Tensor:
    out = common.empty_channels_last(x, tuple(skip.shape))
    deconv_add_native(
        common.channels_last(x), pack_deconv(w), common.float32(bias), common.channels_last(skip), out
    )
    return out


@_op.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor, backend: str) -> Tensor:
    return common.empty_channels_last(x, tuple(skip.shape))


def deconv_add(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor, *, backend: str = "auto") -> Tensor:
    """conv_transpose2d(x, w, stride 2, padding 1, output padding 1) + bias + skip.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        w: (C, K, 3, 3).
        bias: (K,).
        skip: (N, K, 2H, 2W), dtype and device of x.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, K, 2H, 2W), dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    n, c, h, width = x.shape
    common.check_tensor(OP, "w", w)
    common.check_device(OP, "w", w, x)
    if w.ndim != 4 or w.shape[0] != c or tuple(w.shape[2:]) != (3, 3):
        raise ValueError(f"{OP}: w is {tuple(w.shape)}, x of {tuple(x.shape)} needs ({c}, K, 3, 3)")
    k = w.shape[1]
    common.check_shape(OP, "bias", bias, (k,), f"w of {tuple(w.shape)}")
    common.check_device(OP, "bias", bias, x)
    common.check_shape(OP, "skip", skip, (n, k, 2 * h, 2 * width), f"x of {tuple(x.shape)}")
    common.check_same(OP, "skip", skip, x)
    chosen = backends.choose(OP, backend, can_run(x), (x, w, bias, skip))
    if chosen == "reference":
        return deconv_add_reference(x, w, bias, skip)
    return _op(x, w, bias, skip, chosen)
