"""bn_act_dropout: batch norm by the batch's own statistics, a residual, an activation and Dropout2d.

For training. Between forward and backward it keeps x, the statistics, one bit per element that says whether
the activation's argument was positive, and the dropout's noise, one number per channel of an image: neither
the activations nor the residual. All sums are taken over fixed pieces in a fixed order, so that runs with the
same seed are bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _triton
from ._triton import jit, rounded, tl

# On a CPU "auto" takes the native kernel at any size: forward plus backward is 1.05 to 1.3 times as fast as
# torch's calls from 65 thousand to a million elements, 2.6 to 4 times at four million float32 elements, and
# in the worst case, bfloat16 without residual and dropout, equally fast (2 threads, AVX-512). A network's
# step in bfloat16 with the plain loss takes 1 to 3 percent longer, and keeps 2 to 5 percent less for the
# gradient.
OP = "bn_act_dropout"
# Elements of a tile: 16 per thread.
TRITON_TILE = 2048
# Pieces that are summed in parallel, each by one program per block of channels: enough for every
# multiprocessor, and few compared with the pixels.
TRITON_PIECES = 512


def bn_act_dropout_reference(
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None = None,
    *,
    slope: float | None = 0.0,
    p: float = 0.0,
) -> Tensor:
    """bn_act_dropout in torch calls, for any device, dtype and norm, also in eval mode; differentiable."""
    y = bn(x)
    if residual is not None:
        y = y + residual
    return F.dropout2d(common.activate(y, slope), p)


def can_run(x: Tensor, bn: nn.Module | None = None) -> backends.Reasons:
    """Reason why each kernel cannot take x and the norm bn (None: any that fits); None for those that can."""
    return norm_reasons(x, bn, "bn")


def norm_reasons(x: Tensor, bn: nn.Module | None, name: str) -> backends.Reasons:
    """`can_run` for a norm passed as the argument `name`."""
    unfit = "x has no pixels" if x.numel() == 0 else None if bn is None else _unfit(bn, name)
    return dict.fromkeys(backends.KERNELS[OP], unfit) if unfit else backends.reasons(OP, x)


def _unfit(bn: nn.Module, name: str) -> str | None:
    if type(bn) is not nn.BatchNorm2d:
        return f"{name} is {type(bn).__name__}, the kernels are for BatchNorm2d"
    if not bn.training:
        return f"{name} is in eval mode, the kernels are for training"
    for part in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(bn, part)
        if value is not None and value.dtype is not torch.float32:
            return f"{name}.{part} is {value.dtype}, the kernels take float32"
    return None


def bn_act_dropout_native(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    noise: Tensor | None,
    eps: float,
    slope: float | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    given: bool = False,
) -> None:
    """Runs the native kernel into the last four, unchecked: NHWC storage; parameters and noise float32.

    given: whether mean and var are inputs, so that only `out` and `mask` are computed.
    """
    n, c, h, w = x.shape
    native.module.bn_act_dropout(
        *map(native.address, (x, residual, weight, bias, noise, out, mean, var, mask)),
        native.DTYPE_CODES[x.dtype],
        n, h * w, c,
        eps,
        common.native_slope(slope),
        given,
        torch.get_num_threads(),
    )  # fmt: skip


def bn_act_dropout_backward_native(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    eps: float,
    slope: float | None,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Runs the native gradient kernel into the last four, unchecked: NHWC storage."""
    n, c, h, w = x.shape
    outputs = (grad_x, grad_residual, grad_weight, grad_bias)
    native.module.bn_act_dropout_backward(
        *map(native.address, (grad, x, weight, mean, var, noise, mask, *outputs)),
        native.DTYPE_CODES[x.dtype],
        n, h * w, c,
        eps,
        common.native_slope(slope),
        torch.get_num_threads(),
    )  # fmt: skip


@jit
def tile_at(first, pixels, channels, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixels, channels, offsets and valid mask of BLOCK_M pixels from `first` and the program's channels."""
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (rows < pixels)[:, None] & (columns < channels)[None, :]
    return rows, columns, rows.to(tl.int64)[:, None] * channels + columns[None, :], valid


@jit
def moments_kernel(
    x, means, squares, pixels, channels, tiles, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Mean of a piece of `tiles` tiles, and the sum of squared deviations from it."""
    piece = tl.program_id(0)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for tile in range(tiles):
        first = (piece * tiles + tile) * BLOCK_M
        _, _, at, valid = tile_at(first, pixels, channels, BLOCK_M, BLOCK_C)
        values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
        found = tl.minimum(tl.maximum(pixels - first, 0), BLOCK_M).to(tl.float32)
        centre = tl.sum(values, 0) / tl.maximum(found, 1.0)
        away = tl.where(valid, values - centre[None, :], 0.0)
        before = tile * BLOCK_M * 1.0
        # Corrects the rounding error of the mean.
        centre += tl.sum(away, 0) / tl.maximum(found, 1.0)
        share = found / (before + tl.maximum(found, 1.0))
        apart = centre - mean
        mean += apart * share
        square += tl.sum(away * away, 0) + apart * apart * (before * share)
    to = piece * channels + columns
    tl.store(means + to, mean, mask=columns < channels)
    tl.store(squares + to, square, mask=columns < channels)


@jit
def merge_moments_kernel(
    means, squares, mean, var, pieces, piece_pixels, pixels, channels,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all pixels, merged from pieces of `piece_pixels` pixels."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, pieces, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = (rows < pieces)[:, None] & (columns < channels)[None, :]
        found = tl.minimum(tl.maximum(pixels - rows * piece_pixels, 0), piece_pixels).to(tl.float64)
        values = tl.load(means + rows[:, None] * channels + columns[None, :], mask=valid, other=0.0)
        total += tl.sum(values.to(tl.float64) * found[:, None], 0)
    centre = total / pixels
    square = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, pieces, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = (rows < pieces)[:, None] & (columns < channels)[None, :]
        found = tl.minimum(tl.maximum(pixels - rows * piece_pixels, 0), piece_pixels).to(tl.float64)
        at = rows[:, None] * channels + columns[None, :]
        apart = tl.load(means + at, mask=valid, other=0.0).to(tl.float64) - centre[None, :]
        inside = tl.load(squares + at, mask=valid, other=0.0).to(tl.float64)
        square += tl.sum(tl.where(valid, inside + apart * apart * found[:, None], 0.0), 0)
    tl.store(mean + columns, centre.to(tl.float32), mask=columns < channels)
    tl.store(var + columns, (square / pixels).to(tl.float32), mask=columns < channels)


@jit
def apply_kernel(
    x, weight, bias, residual, noise, mean, var, out, mask, pixels, channels, image_pixels, eps, slope,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, NOISE: tl.constexpr, ACT: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the result, and its mask bits."""
    rows, columns, at, valid = tile_at(tl.program_id(0) * BLOCK_M, pixels, channels, BLOCK_M, BLOCK_C)
    inside = columns < channels
    scale = 1.0 / tl.sqrt_rn(tl.load(var + columns, mask=inside, other=1.0) + eps)
    values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    values -= tl.load(mean + columns, mask=inside, other=0.0)[None, :]
    if AFFINE:
        scale *= tl.load(weight + columns, mask=inside, other=0.0)
        values = values * scale[None, :] + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    else:
        values *= scale[None, :]
    if RESIDUAL:
        values += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    if MASK:
        bits = (values > 0).to(tl.int32).reshape(BLOCK_M, BLOCK_C // 8, 8)
        byte = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
        row_bytes = (channels + 7) // 8
        positions = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        to = rows.to(tl.int64)[:, None] * row_bytes + positions[None, :]
        tl.store(
            mask + to, byte.to(tl.uint8), mask=(rows < pixels)[:, None] & (positions < row_bytes)[None, :]
        )
    if ACT != "none":
        # This order of comparison keeps NaN.
        values = tl.where(values < 0, values * slope if ACT == "leaky" else 0.0, values)
    if NOISE:
        dropped = (rows // image_pixels)[:, None] * channels + columns[None, :]
        values *= tl.load(noise + dropped, mask=valid, other=0.0)
    tl.store(out + at, rounded(values, out), mask=valid)


@jit
def gradient_at(
    grad, noise, mask, rows, columns, at, valid, channels, image_pixels, slope,
    NOISE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """The gradient of the activation's argument."""
    values = tl.load(grad + at, mask=valid, other=0.0).to(tl.float32)
    if NOISE:
        dropped = (rows // image_pixels)[:, None] * channels + columns[None, :]
        values *= tl.load(noise + dropped, mask=valid, other=0.0)
    if ACT != "none":
        byte = rows.to(tl.int64)[:, None] * ((channels + 7) // 8) + (columns // 8)[None, :]
        bits = tl.load(mask + byte, mask=valid, other=0).to(tl.int32)
        positive = ((bits >> (columns % 8)[None, :]) & 1) != 0
        values = tl.where(positive, values, values * slope)
    return values


@jit
def gradient_sums_kernel(
    grad, x, mean, noise, mask, sums, products, pixels, channels, image_pixels, tiles, slope,
    NOISE: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a piece of the gradient of the activation's argument, and of its products with x - mean."""
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre = tl.load(mean + columns, mask=columns < channels, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        first = (piece * tiles + tile) * BLOCK_M
        rows, columns, at, valid = tile_at(first, pixels, channels, BLOCK_M, BLOCK_C)
        values = gradient_at(
            grad, noise, mask, rows, columns, at, valid, channels, image_pixels, slope, NOISE, ACT
        )
        apart = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) - centre[None, :]
        total += tl.sum(values, 0)
        product += tl.sum(values * apart, 0)
    to = piece * channels + columns
    tl.store(sums + to, total, mask=columns < channels)
    tl.store(products + to, product, mask=columns < channels)


@jit
def merge_sums_kernel(
    sums, products, var, grad_weight, grad_bias, pieces, channels, eps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds up the pieces' sums: gradients of weight and bias."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float64)
    product = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, pieces, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        valid = (rows < pieces)[:, None] & (columns < channels)[None, :]
        at = rows[:, None] * channels + columns[None, :]
        total += tl.sum(tl.load(sums + at, mask=valid, other=0.0).to(tl.float64), 0)
        product += tl.sum(tl.load(products + at, mask=valid, other=0.0).to(tl.float64), 0)
    inverse = 1.0 / tl.sqrt_rn(tl.load(var + columns, mask=columns < channels, other=1.0) + eps)
    tl.store(grad_bias + columns, total.to(tl.float32), mask=columns < channels)
    tl.store(grad_weight + columns, product.to(tl.float32) * inverse, mask=columns < channels)


@jit
def gradient_kernel(
    grad, x, weight, mean, var, noise, mask, grad_weight, grad_bias, grad_x, grad_residual,
    pixels, channels, image_pixels, eps, slope,
    AFFINE: tl.constexpr, RESIDUAL: tl.constexpr, NOISE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of x and residual."""
    rows, columns, at, valid = tile_at(tl.program_id(0) * BLOCK_M, pixels, channels, BLOCK_M, BLOCK_C)
    values = gradient_at(
        grad, noise, mask, rows, columns, at, valid, channels, image_pixels, slope, NOISE, ACT
    )
    if RESIDUAL:
        tl.store(grad_residual + at, rounded(values, grad_residual), mask=valid)
    inside = columns < channels
    inverse = 1.0 / tl.sqrt_rn(tl.load(var + columns, mask=inside, other=1.0) + eps)
    apart = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    apart -= tl.load(mean + columns, mask=inside, other=0.0)[None, :]
    average = tl.load(grad_bias + columns, mask=inside, other=0.0) / pixels
    slant = inverse * tl.load(grad_weight + columns, mask=inside, other=0.0) / pixels
    if AFFINE:
        inverse *= tl.load(weight + columns, mask=inside, other=0.0)
    values = (values - average[None, :] - apart * slant[None, :]) * inverse[None, :]
    tl.store(grad_x + at, rounded(values, grad_x), mask=valid)


def _pieces(pixels: int, block_m: int) -> tuple[int, int]:
    """Number of pieces, and tiles per piece: depends on sizes alone, not on the device."""
    tiles = conv.cdiv(conv.cdiv(pixels, block_m), TRITON_PIECES)
    return conv.cdiv(pixels, block_m * tiles), tiles


def _blocks(x: Tensor) -> tuple[int, int]:
    """Pixels and channels of a tile; eight channels share a byte of the mask."""
    block_c = max(8, min(64, 1 << (x.shape[1] - 1).bit_length()))
    return TRITON_TILE // block_c, block_c


def bn_act_dropout_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    noise: Tensor | None,
    eps: float,
    slope: float | None,
    out: Tensor,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    given: bool = False,
) -> None:
    """Runs the three kernels into the last four, unchecked: NHWC storage; parameters and noise float32.

    given: whether mean and var are inputs, so that one launch computes only `out` and `mask`.
    """
    n, c, h, w = x.shape
    pixels = n * h * w
    block_m, block_c = _blocks(x)
    act, slope = conv.activation(slope)
    size = dict(BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4)
    columns = conv.cdiv(c, block_c)
    with _triton.on_device_of(x):
        if not given:
            pieces, tiles = _pieces(pixels, block_m)
            means, squares = mean.new_empty((2, pieces, c))
            moments_kernel[(pieces, columns)](x, means, squares, pixels, c, tiles, **size)
            merge_moments_kernel[(columns,)](
                means, squares, mean, var, pieces, block_m * tiles, pixels, c, **size
            )
        apply_kernel[(conv.cdiv(pixels, block_m), columns)](
            x, weight, bias, residual, noise, mean, var, out, mask, pixels, c, h * w, eps, slope,
            AFFINE=weight is not None, RESIDUAL=residual is not None, NOISE=noise is not None, ACT=act,
            MASK=mask is not None, **size,
        )  # fmt: skip


def bn_act_dropout_backward_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    noise: Tensor | None,
    mask: Tensor | None,
    eps: float,
    slope: float | None,
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Runs the three gradient kernels into the last four, unchecked: NHWC storage."""
    n, c, h, w = x.shape
    pixels = n * h * w
    block_m, block_c = _blocks(x)
    pieces, tiles = _pieces(pixels, block_m)
    sums, products = mean.new_empty((2, pieces, c))
    act, slope = conv.activation(slope)
    size = dict(BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4)
    columns = conv.cdiv(c, block_c)
    with _triton.on_device_of(x):
        gradient_sums_kernel[(pieces, columns)](
            grad, x, mean, noise, mask, sums, products, pixels, c, h * w, tiles, slope,
            NOISE=noise is not None, ACT=act, **size,
        )  # fmt: skip
        merge_sums_kernel[(columns,)](sums, products, var, grad_weight, grad_bias, pieces, c, eps, **size)
        gradient_kernel[(conv.cdiv(pixels, block_m), columns)](
            grad, x, weight, mean, var, noise, mask, grad_weight, grad_bias, grad_x, grad_residual,
            pixels, c, h * w, eps, slope,
            AFFINE=weight is not None, RESIDUAL=grad_residual is not None, NOISE=noise is not None, ACT=act,
            **size,
        )  # fmt: skip


def empty_mask(x: Tensor, slope: float | None) -> Tensor:
    """Memory for one bit per element, padded to whole bytes per pixel; empty without an activation."""
    n, c, h, w = x.shape
    shape = (n, h, w, (c + 7) // 8) if conv.activation(slope)[0] != "none" else (0,)
    return x.new_empty(shape, dtype=torch.uint8)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    noise: Tensor | None,
    eps: float,
    slope: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result in NHWC storage, mean, biased variance, and mask bits (empty where slope is None)."""
    return forward_into(
        common.keep_channels_last(x, tuple(x.shape)), x, weight, bias, residual, noise, eps, slope, backend
    )


def forward_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    noise: Tensor | None,
    eps: float,
    slope: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Like `forward`, with the result in `out`."""
    mask = empty_mask(x, slope)
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    kernel = bn_act_dropout_triton if backend == "triton" else bn_act_dropout_native
    kernel(
        common.channels_last(x),
        _contiguous(weight), _contiguous(bias),
        None if residual is None else common.channels_last(residual),
        _contiguous(noise),
        eps, slope, out, mean, var,
        mask if mask.numel() else None,
    )  # fmt: skip
    return out, mean, var, mask


def repeat(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float | None,
    backend: str,
) -> Tensor:
    """Recomputes the result of `forward` without a residual, from the statistics it found."""
    out = common.borrow_channels_last(x, tuple(x.shape))
    kernel = bn_act_dropout_triton if backend == "triton" else bn_act_dropout_native
    kernel(
        common.channels_last(x),
        _contiguous(weight), _contiguous(bias),
        None,
        _contiguous(noise),
        eps, slope, out, mean, var, None,
        given=True,
    )  # fmt: skip
    return out


_op = backends.custom_op(OP)(forward)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    noise: Tensor | None,
    eps: float,
    slope: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return common.empty_channels_last(x, tuple(x.shape)), mean, var, empty_mask(x, slope)


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    noise: Tensor | None,
    mask: Tensor,
    eps: float,
    slope: float | None,
    with_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (empty without one), weight and bias, from the gradient of the result."""
    grad_x, grad_residual = _empty_gradients(x, with_residual)
    residual = grad_residual if with_residual else None
    grad = common.channels_last(grad)
    of_norm = gradients_into(grad_x, residual, grad, x, weight, mean, var, noise, mask, eps, slope, backend)
    return grad_x, grad_residual, *of_norm


def gradients_into(
    grad_x: Tensor,
    grad_residual: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    noise: Tensor | None,
    mask: Tensor,
    eps: float,
    slope: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of weight and bias, and writes those of x and residual; grad_x may be grad.

    grad_x, grad_residual, grad: in NHWC storage.
    """
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    kernel = bn_act_dropout_backward_triton if backend == "triton" else bn_act_dropout_backward_native
    kernel(
        grad,
        common.channels_last(x),
        _contiguous(weight),
        mean, var,
        _contiguous(noise),
        mask if mask.numel() else None,
        eps, slope, grad_x, grad_residual, grad_weight, grad_bias,
    )  # fmt: skip
    return grad_weight, grad_bias


_backward_op = backends.custom_op(OP + "_backward")(gradients)


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    noise: Tensor | None,
    mask: Tensor,
    eps: float,
    slope: float | None,
    with_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_residual = _empty_gradients(x, with_residual)
    return grad_x, grad_residual, torch.empty_like(mean), torch.empty_like(mean)


def _empty_gradients(x: Tensor, with_residual: bool) -> tuple[Tensor, Tensor]:
    shape = tuple(x.shape)
    grad_residual = common.empty_channels_last(x, shape) if with_residual else x.new_empty(0)
    return common.empty_channels_last(x, shape), grad_residual


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, noise, *ctx.options = inputs
    _, mean, var, mask = output
    ctx.with_residual = residual is not None
    ctx.affine = weight is not None
    ctx.save_for_backward(x, weight, mean, var, noise, mask)
    ctx.mark_non_differentiable(mean, var, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return _unpacked(ctx, _backward_op(*_saved(ctx, grad)))


def _saved(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Arguments of `gradients`."""
    x, weight, mean, var, noise, mask = ctx.saved_tensors
    eps, slope, backend = ctx.options
    return grad, x, weight, mean, var, noise, mask, eps, slope, ctx.with_residual, backend


def _unpacked(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Results of `gradients` as gradients of the inputs of `forward`."""
    grad_x, grad_residual, grad_weight, grad_bias = found
    parameters = (grad_weight, grad_bias) if ctx.affine else (None, None)
    return grad_x, *parameters, grad_residual if ctx.with_residual else None, None, None, None, None


_op.register_autograd(_backward, setup_context=_save)


class _Function(torch.autograd.Function):
    """The op without the dispatcher, which takes 0.15 ms for forward and backward; this takes 0.05."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * 8 if grad is None else _unpacked(ctx, gradients(*_saved(ctx, grad)))


def bn_act_dropout(
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None = None,
    *,
    slope: float | None = 0.0,
    p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """dropout2d(act(bn(x) + residual)) in training, with its gradient.

    Updates the running statistics of bn as its own forward does, and draws the dropout from torch's
    generator as torch.nn.functional.dropout2d does: one seed drops the same channels.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        bn: an nn.BatchNorm2d(C) in train mode with float32 parameters. Any other norm, or one in eval mode,
            is called itself, followed by torch's own calls.
        residual: shape and device of x, or None. Under autocast it is rounded to x's dtype.
        slope: slope of the activation for negative values: 0 is relu, up to 1 leaky relu, None no activation.
        p: probability with which a channel of an image is dropped.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, H, W), dtype of x; channels_last from the kernels.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    check_module(OP, "bn", bn)
    if residual is not None:
        common.check_shape(OP, "residual", residual, tuple(x.shape), f"x of {tuple(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            residual = residual.to(x.dtype)
        common.check_same(OP, "residual", residual, x)
    common.check_slope(OP, slope)
    check_dropout(OP, p)
    chosen = backends.choose(OP, backend, can_run(x, bn))
    if chosen == "reference":
        return bn_act_dropout_reference(x, bn, residual, slope=slope, p=p)
    assert isinstance(bn, nn.BatchNorm2d)  # checked by can_run
    check_norm(OP, x, bn)
    noise = draw_noise(x, p)
    # Tracers need the registered op.
    call = _Function.apply if type(x) is Tensor and not torch.compiler.is_compiling() else _op
    out, mean, var, _ = call(x, bn.weight, bn.bias, residual, noise, bn.eps, slope, chosen)
    track_statistics(bn, mean, var, x.numel() // x.shape[1])
    return out


def check_module(op: str, name: str, module: object) -> None:
    """Raises unless it is a module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{op}: {name} is {type(module).__name__}, it must be a torch.nn.Module")


def check_dropout(op: str, p: float) -> None:
    """Raises unless p is a probability."""
    if not isinstance(p, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: p is {p!r}, it must be a number from 0 to 1")
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: p is {p}, it may be from 0 to 1")


def check_norm(op: str, x: Tensor, bn: nn.BatchNorm2d, name: str = "bn") -> None:
    """Raises unless x has the norm's channels and more than one value in each, as torch's norm does.

    A norm with only one of the two running statistics is refused too.
    """
    c = x.shape[1]
    if bn.num_features != c:
        raise ValueError(f"{op}: {name} has {bn.num_features} channels, x of {tuple(x.shape)} needs {c}")
    if bn.weight is not None:
        common.check_device(op, name, bn.weight, x)
    if (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError(
            f"{op}: {name} has one of running_mean and running_var, it must have both or neither"
        )
    if x.numel() == c:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def draw_noise(x: Tensor, p: float) -> Tensor | None:
    """Dropout2d's factor for each channel of each image, (N, C) float32; None where p is 0."""
    if p == 0:
        return None
    if p == 1:
        return x.new_zeros(x.shape[:2], dtype=torch.float32)
    # Drawn and rounded in x's dtype, as in torch.
    noise = x.new_empty((*x.shape[:2], 1, 1)).bernoulli_(1 - p).div_(1 - p)
    return noise.flatten(1).float()


@torch.no_grad()
def track_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Updates the running statistics with a batch's mean and biased variance over `count` values."""
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        return
    momentum: float | Tensor | None = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = bn.num_batches_tracked.reciprocal()
    momentum = 0.0 if momentum is None else momentum
    bn.running_mean.lerp_(mean, momentum)
    bn.running_var.lerp_(var * (count / (count - 1)), momentum)
