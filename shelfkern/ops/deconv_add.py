"""deconv_add: a 3x3 transposed convolution of stride 2, plus bias, plus skip: the merge of ShelfNet50/101.

Each output pixel is reached by 1, 2, 2 or 4 of the nine taps, depending on the parity of its row and column.
Four small convolutions of the input, one per parity, each write every second pixel: no multiplications by
inserted zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _triton
from ._triton import gdc_launch_dependents, gdc_wait, jit, rounded, tl
from .conv_bn_act import PackedConv, conv_bn_act_native, pack_conv

OP = "deconv_add"
# Taps of the transposed kernel that reach even and odd outputs, for the input at that position and the next.
TAPS = ([1], [2, 0])

# Eager sums each tap separately, so its running sums have fewer products than a convolution's.
MAX_TERMS = 128

PackedDeconv = tuple[PackedConv, PackedConv, PackedConv, PackedConv]


def pack_deconv(w: Tensor, dtype: torch.dtype = torch.float32) -> PackedDeconv:
    """Packs weights (C, K, 3, 3) as four convolutions, one per combination of even/odd row and column.

    dtype: dtype of the multiplied values, float32 or bfloat16.
    """
    kernels = parity_kernels(w.transpose(0, 1))
    a, b, c, d = (pack_conv(kernel, terms=MAX_TERMS, dtype=dtype) for kernel in kernels)
    return a, b, c, d


def parity_kernels(w: Tensor) -> list[Tensor]:
    """The taps of weights (K, C, 3, 3) that reach each output parity: even and odd rows and columns."""
    return [w[:, :, rows][:, :, :, columns] for rows in TAPS for columns in TAPS]


def parities(x: Tensor) -> list[Tensor]:
    """x subsampled by 2, once per parity, in the order of `parity_kernels`."""
    return [x[:, :, row::2, column::2] for row in range(2) for column in range(2)]


def deconv_add_reference(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """deconv_add in torch calls, for any device and dtype; differentiable."""
    return F.conv_transpose2d(x, w.to(x.dtype), bias.to(x.dtype), 2, 1, 1) + skip


def can_run(x: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def deconv_add_native(x: Tensor, packed: PackedDeconv, bias: Tensor, skip: Tensor, out: Tensor) -> None:
    """Runs the native kernel into `out`, unchecked: NHWC storage, bias float32."""
    for taps, residual, part in zip(packed, parities(skip), parities(out), strict=True):
        conv_bn_act_native(x, taps, None, bias, residual, None, part, None)


@jit
def deconv_kernel(
    x, weight, bias, skip, out, pixels, channels, h, w,
    x_n, x_h, x_w, skip_n, skip_h, skip_w, out_stride_n, out_stride_h, out_stride_w,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of output pixels of one parity: from BLOCK_M input pixels and the pixels after them."""
    if OVERLAP:
        gdc_launch_dependents()
        conv.prefetch(weight, channels * (9 * C))
        gdc_wait()
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    # Parities with four taps come before those with two and one: the longest programs start first.
    parity = 3 - tl.program_id(0) // (tiles_m * tiles_n)
    odd_y, odd_x = parity // 2, parity % 2
    tile_m, tile_n = conv.tile_of(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, y, column = conv.pixel_of(rows, h, w)
    pixel = x + conv.offsets(image, y, column, x_n, x_h, x_w)
    weight_rows = weight + columns.to(tl.int64) * (9 * C)

    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, (1 + odd_y) * (1 + odd_x) * blocks):
        # Inputs here and at the next position; even rows or columns use the middle tap, odd ones last and
        # first.
        down, right = step // blocks // (1 + odd_x), step // blocks % (1 + odd_x)
        tap = 3 * (1 + odd_y - 2 * down) + 1 + odd_x - 2 * right
        k = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (rows < pixels) & (y + down < h) & (column + right < w)
        pixel_mask, weight_mask = inside[:, None], (columns < channels)[None, :]
        if C % BLOCK_K != 0:
            pixel_mask, weight_mask = pixel_mask & (k < C)[None, :], weight_mask & (k < C)[:, None]
        to_tap = tl.cast(down, tl.int64) * x_h + tl.cast(right, tl.int64) * x_w
        a = tl.load(pixel[:, None] + to_tap + k[None, :], mask=pixel_mask, other=0.0)
        b = tl.load(weight_rows[None, :] + (tap * C + k)[:, None], mask=weight_mask, other=0.0)
        acc = conv.multiply(a, b, acc, SWAP, PRECISION)
    if SWAP:
        acc = tl.trans(acc)

    out_y, out_x = 2 * y + odd_y, 2 * column + odd_x
    skip_rows = conv.offsets(image, out_y, out_x, skip_n, skip_h, skip_w)
    out_rows = conv.offsets(image, out_y, out_x, out_stride_n, out_stride_h, out_stride_w)
    if BLOCK_M * BLOCK_N > conv.FINISHED_AT_ONCE:
        left, right = conv.halves(acc, BLOCK_M, BLOCK_N)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _finish(left, bias, skip, out, rows, columns, skip_rows, out_rows, pixels, channels)
        columns += BLOCK_N // 2
        _finish(right, bias, skip, out, rows, columns, skip_rows, out_rows, pixels, channels)
    else:
        _finish(acc, bias, skip, out, rows, columns, skip_rows, out_rows, pixels, channels)


@jit
def _finish(acc, bias, skip, out, rows, columns, skip_rows, out_rows, pixels, channels):
    """Adds bias and skip, and stores."""
    mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
    acc += tl.load(bias + columns, mask=columns < channels, other=0.0)[None, :]
    acc += conv.load_rows(skip, skip_rows, columns, mask)
    tl.store(out + out_rows[:, None] + columns[None, :], rounded(acc, out), mask=mask)


def pack_deconv_triton(w: Tensor, dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    """Packs weights (C, K, 3, 3) as (K, 9, C) in the kernel's dtype, like `pack_weight`."""
    return conv.pack_weight(w.transpose(0, 1), dtype, precision)


def deconv_add_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    out: Tensor,
    config: conv.Config | None = None,
    precision: str | None = None,
    overlap: bool = False,
) -> None:
    """Runs the Triton kernel into `out`, unchecked: channel stride 1, any other strides.

    Args:
        weight: result of `pack_deconv_triton`, x's dtype.
        bias: float32.
        config: one of `configurations` without a split sum, by default the first.
        precision, overlap: see `conv_bn_act_triton`.
    """
    n, c, h, w = x.shape
    pixels, k = n * h * w, out.shape[1]
    if pixels * k == 0:
        return
    problem = conv.Problem(pixels, k, 9, c, x.dtype, conv.is_aligned(x, skip, out))
    precision = precision or conv.default_precision(x.dtype)
    # The four parities fill a GPU without split sums.
    config = config or conv.best(problem, precision, x, split=False)
    overlap = overlap and _triton.overlaps_launches(x)
    tiles = conv.cdiv(pixels, config.block_m) * conv.cdiv(k, config.block_n)
    with _triton.on_device_of(x):
        deconv_kernel[(4 * tiles,)](
            x, weight, bias, skip, out, pixels, k, h, w,
            *common.strides(x), *common.strides(skip), *common.strides(out),
            c, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=conv.block_k(config, problem),
            SWAP=config.swap, PRECISION=precision, OVERLAP=overlap,
            num_warps=config.warps, num_stages=config.stages, **(dict(launch_pdl=True) if overlap else {}),
        )  # fmt: skip


@backends.custom_op(OP)
def _op(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor, backend: str) -> Tensor:
    out = common.empty_channels_last(x, tuple(skip.shape))
    bias = common.float32(bias)
    if backend == "triton":
        x, skip = common.channels_innermost(x), common.channels_innermost(skip)
        weight = pack_deconv_triton(w, x.dtype, conv.default_precision(x.dtype))
        deconv_add_triton(x, weight, bias, skip, out)
    else:
        deconv_add_native(common.channels_last(x), pack_deconv(w), bias, common.channels_last(skip), out)
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
    x, skip = common.autocast(x), common.autocast(skip)
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
