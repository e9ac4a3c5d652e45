"""conv_bn_act: act(scale * conv(x, w) + shift + residual) + skip in one pass."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _triton
from ._triton import gdc_launch_dependents, gdc_wait, jit, rounded, tl
from .quantize import quantize_reference

OP = "conv_bn_act"
PANEL = 16
# Products summed from zero before the partial sum joins the total. Relative to float64, one running sum of
# 576 products has up to 1.7 times the error of eager's blocked sums, one of 1152 2.5 times; 288 is on par.
MAX_TERMS = 288
# The most products of uint8 activations (at most 255) and int8 weights (at least -128) that fit in int32.
MAX_CODE_TERMS = 2**31 // (255 * 128)

# Tile of the second kernel of a split sum: small, since it only reads and adds.
SUM_BLOCK_M, SUM_BLOCK_N = 16, 64


@dataclasses.dataclass(frozen=True)
class PackedConv:
    """A convolution's weights in the layout that the native kernels read, in 32-bit words.

    Attributes:
        data: per panel of 16 output channels and chunk of input channels: kernel_h x kernel_w x chunk x 16
            words, zero-padded beyond the last output channel. A word is one float32, two bfloat16 or four
            int8 or two int16 of adjacent input channels, zero-padded beyond the last.
        out_channels, in_channels, kernel: sizes of the convolution.
        stride: stride in both dimensions.
        padding: zero padding at the top and left; positions beyond the input always read as zero.
        chunk: words in a chunk; the last may have fewer.
        sums: int32, for whole numbers: each output channel's sum of weights, zero-padded to whole panels.
    """

    data: Tensor
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    stride: int
    padding: int
    chunk: int
    sums: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ConvCodes:
    """Quantization parameters of the native kernels.

    They compute act(scale * (sum + start) + shift + residual_scale * residual) + skip_scale * skip + bias,
    with the uint8 values of residual and skip: positive factors commute with a leaky relu.

    Attributes:
        start: int32, in whole panels: minus the contribution of x's zero point to each sum; None where that
            is 0, or where the kernel subtracts the zero point from x.
        x_zero: zero point of x, also used as its padding.
    """

    start: Tensor | None = None
    x_zero: int = 0
    residual_scale: float = 1.0
    skip_scale: float = 1.0
    bias: float = 0.0


# For floating-point tensors.
FLOATS = ConvCodes()


def pack_conv(
    w: Tensor, stride: int = 1, padding: int = 0, terms: int = MAX_TERMS, dtype: torch.dtype = torch.float32
) -> PackedConv:
    """Packs weights (K, C, kernel_h, kernel_w) for the native kernels, which sum `terms` words at once.

    dtype: dtype of the multiplied values: float32, bfloat16 for bfloat16 activations, or int8 or int16 for
        quantized activations, in which case w is an int8 tensor.

    Raises:
        ValueError: products of whole numbers could overflow an int32 sum.
    """
    k, c, kernel_h, kernel_w = w.shape
    whole = not dtype.is_floating_point
    if whole and w[0].numel() > MAX_CODE_TERMS:
        raise ValueError(
            f"{OP}: w is {tuple(w.shape)} int8, an output may be the sum of at most {MAX_CODE_TERMS} products"
        )
    per_word = 4 // dtype.itemsize
    words, panels = -(-c // per_word), -(-k // PANEL)
    chunks = -(-words // max(1, terms // (kernel_h * kernel_w)))
    chunk = -(-words // chunks)
    size = kernel_h * kernel_w * words * PANEL * per_word
    data = native.empty((panels, size), dtype, pooled=False)
    sums = torch.zeros(panels * PANEL, dtype=torch.int32, device=w.device) if whole else None
    # One panel at a time, so that temporaries stay small compared with the result.
    for index, filters in enumerate(w.detach().split(PANEL)):
        _pack_panel(filters, data[index], chunk, per_word)
        if sums is not None:
            start = index * PANEL
            sums[start : start + len(filters)] = filters.sum((1, 2, 3), dtype=torch.int32)
    return PackedConv(data, k, c, (kernel_h, kernel_w), stride, padding, chunk, sums)


def _pack_panel(filters: Tensor, panel: Tensor, chunk: int, per_word: int) -> None:
    """Packs up to 16 filters (K, C, kernel_h, kernel_w) into a panel of `PackedConv.data`."""
    k, c = filters.shape[:2]
    padded = F.pad(filters.to(panel.dtype), (0, 0, 0, 0, 0, -c % per_word, 0, PANEL - k))
    words = padded.unflatten(1, (-1, per_word)).permute(3, 4, 1, 0, 2)
    start = 0
    for part in words.split(chunk, dim=2):
        panel[start : start + part.numel()].view(part.shape).copy_(part)
        start += part.numel()


def whole_panels(values: Tensor) -> Tensor:
    """Per-output-channel values in float32, zero-padded to whole panels."""
    return F.pad(values, (0, -len(values) % PANEL)).float()


def product_dtype(weights: torch.dtype, activations: torch.dtype) -> torch.dtype:
    """dtype that the native kernels multiply: bfloat16 if both are and the CPU supports it, else float32."""
    both = weights is activations is torch.bfloat16
    return torch.bfloat16 if both and native.has_product(torch.bfloat16) else torch.float32


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
    """conv_bn_act in torch calls, for any device and dtype; differentiable."""
    y = F.conv2d(x, w.to(x.dtype), None, stride, padding)
    if scale is not None:
        y = y * scale.to(x.dtype)[:, None, None]
    if shift is not None:
        y = y + shift.to(x.dtype)[:, None, None]
    if residual is not None:
        y = y + residual
    y = common.activate(y, slope)
    return y if skip is None else y + skip


def conv_bn_act_codes_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    kernel: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    slope: float | None = 0.0,
    codes_step: float = 1.0,
    codes_dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor]:
    """The result of `conv_bn_act_triton` for the same arguments, in float64, and its quantized values.

    x and weight, (K, taps, C), may be quantized or floating. Sums of int8 products are exact.
    """
    w = weight.double().unflatten(1, kernel).permute(0, 3, 1, 2)
    a, b, r, s = (None if t is None else t.double() for t in (scale, shift, residual, skip))
    result = conv_bn_act_reference(x.double(), w, a, b, r, s, stride, padding, slope)
    return result, quantize_reference(result, codes_step, codes_dtype)


def can_run(x: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
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
    codes: ConvCodes = FLOATS,
) -> None:
    """Runs the native kernel into `out`, unchecked: x in NHWC storage, one dtype, parameters float32.

    out, residual and skip have channel stride 1 and share their other strides; they need not be dense. With
    int8 or int16 weights, x, residual and skip are uint8, out is uint8 or float32, and scale and shift cover
    whole panels and are in quantization steps of out.
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
        native.PRODUCT_CODES[packed.data.dtype],
        n, h, w, c, out_h, out_w, k,
        *packed.kernel,
        packed.stride,
        packed.padding,
        packed.padding,
        packed.chunk,
        stride_n, stride_h, stride_w,
        common.native_slope(slope),
        torch.get_num_threads(),
        native.address(codes.start),
        codes.x_zero,
        codes.residual_scale,
        codes.skip_scale,
        codes.bias,
        out.dtype is torch.uint8,
    )  # fmt: skip


def out_shape(x: Tensor, w: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    """(N, K, H', W') of a convolution's result."""
    extents = [(x.shape[i] + 2 * padding - w.shape[i]) // stride + 1 for i in (2, 3)]
    return x.shape[0], w.shape[0], extents[0], extents[1]


@jit
def _finish_tile(
    acc, rows, columns, scale, shift, residual, skip, out, codes, pixels, channels, out_h, out_w,
    residual_n, residual_h, residual_w, skip_n, skip_h, skip_w, out_stride_n, out_stride_h, out_stride_w,
    codes_n, codes_h, codes_w, slope, codes_scale,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_CODES: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Applies everything after the sum and stores the result."""
    image, y, x = conv.pixel_of(rows, out_h, out_w)
    mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
    acc = conv.finish(
        acc.to(tl.float32), columns, channels, mask, scale, shift,
        residual, conv.offsets(image, y, x, residual_n, residual_h, residual_w),
        skip, conv.offsets(image, y, x, skip_n, skip_h, skip_w),
        slope, HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, HAS_SKIP, ACT,
    )  # fmt: skip
    if HAS_OUT:
        to = conv.offsets(image, y, x, out_stride_n, out_stride_h, out_stride_w)
        tl.store(out + to[:, None] + columns[None, :], rounded(acc, out), mask=mask)
    if HAS_CODES:
        to = conv.offsets(image, y, x, codes_n, codes_h, codes_w)
        tl.store(codes + to[:, None] + columns[None, :], conv.code(acc * codes_scale, codes), mask=mask)


@jit
def conv_kernel(
    x, weight, scale, shift, residual, skip, out, codes, parts, pixels, channels, h, w, out_h, out_w,
    x_n, x_h, x_w, residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
    out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
    C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_CODES: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of the convolution, or with SPLIT one part of its sum."""
    if OVERLAP:
        gdc_launch_dependents()
        conv.prefetch(weight, channels * (KERNEL_H * KERNEL_W * C))
        gdc_wait()
    tiles_m, tiles_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    tile_m, tile_n = conv.tile_of(tl.program_id(0), tiles_m, tiles_n, 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image, y, column = conv.pixel_of(rows, out_h, out_w)
    top, left = y * STRIDE - PADDING, column * STRIDE - PADDING
    first_pixel = x + conv.offsets(image, top, left, x_n, x_h, x_w)
    weight_rows = weight + columns.to(tl.int64) * (KERNEL_H * KERNEL_W * C)

    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    steps: tl.constexpr = KERNEL_H * KERNEL_W * blocks
    share: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    part = tl.program_id(1)
    acc = conv.sums(x, BLOCK_N if SWAP else BLOCK_M, BLOCK_M if SWAP else BLOCK_N)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        tap, r, s = step // blocks, step // blocks // KERNEL_W, step // blocks % KERNEL_W
        k = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = rows < pixels
        if PADDING > 0:
            inside = inside & (top + r >= 0) & (top + r < h) & (left + s >= 0) & (left + s < w)
        pixel_mask, weight_mask = inside[:, None], (columns < channels)[None, :]
        if C % BLOCK_K != 0:
            pixel_mask, weight_mask = pixel_mask & (k < C)[None, :], weight_mask & (k < C)[:, None]
        to_tap = tl.cast(r, tl.int64) * x_h + tl.cast(s, tl.int64) * x_w
        a = tl.load(first_pixel[:, None] + to_tap + k[None, :], mask=pixel_mask, other=0.0)
        b = tl.load(weight_rows[None, :] + (tap * C + k)[:, None], mask=weight_mask, other=0.0)
        acc = conv.multiply(a, b, acc, SWAP, PRECISION)
    if SWAP:
        acc = tl.trans(acc)

    if SPLIT > 1:
        to = (tl.cast(part, tl.int64) * pixels + rows) * channels
        mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
        tl.store(parts + to[:, None] + columns[None, :], acc, mask=mask)
    elif BLOCK_M * BLOCK_N > conv.FINISHED_AT_ONCE:
        half: tl.constexpr = BLOCK_N // 2
        left, right = conv.halves(acc, BLOCK_M, BLOCK_N)
        columns = tile_n * BLOCK_N + tl.arange(0, half)
        _finish_tile(
            left, rows, columns, scale, shift, residual, skip, out, codes, pixels, channels, out_h, out_w,
            residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
            out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
            HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, HAS_SKIP, HAS_OUT, HAS_CODES, ACT,
        )  # fmt: skip
        _finish_tile(
            right, rows, columns + half, scale, shift, residual, skip, out, codes,
            pixels, channels, out_h, out_w,
            residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
            out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
            HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, HAS_SKIP, HAS_OUT, HAS_CODES, ACT,
        )  # fmt: skip
    else:
        _finish_tile(
            acc, rows, columns, scale, shift, residual, skip, out, codes, pixels, channels, out_h, out_w,
            residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
            out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
            HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, HAS_SKIP, HAS_OUT, HAS_CODES, ACT,
        )  # fmt: skip


@jit
def sum_kernel(
    parts, scale, shift, residual, skip, out, codes, pixels, channels, out_h, out_w,
    residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
    out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_CODES: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds the parts of each sum in a fixed order, so that runs are bit-identical; applies the epilogue."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), parts.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        start = (tl.cast(part, tl.int64) * pixels + rows) * channels
        acc += tl.load(parts + start[:, None] + columns[None, :], mask=mask, other=0)
    _finish_tile(
        acc, rows, columns, scale, shift, residual, skip, out, codes, pixels, channels, out_h, out_w,
        residual_n, residual_h, residual_w, skip_n, skip_h, skip_w,
        out_stride_n, out_stride_h, out_stride_w, codes_n, codes_h, codes_w, slope, codes_scale,
        HAS_SCALE, HAS_SHIFT, HAS_RESIDUAL, HAS_SKIP, HAS_OUT, HAS_CODES, ACT,
    )  # fmt: skip


def conv_bn_act_triton(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    out: Tensor | None,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    slope: float | None,
    config: conv.Config | None = None,
    precision: str | None = None,
    overlap: bool = False,
    parts: Tensor | None = None,
    codes: Tensor | None = None,
    codes_step: float = 1.0,
) -> None:
    """Runs the Triton kernel into `out` and `codes`, unchecked: channel stride 1, any other strides.

    Args:
        x: floating, or quantized: int8 from compute capability 8.0, float8_e4m3fn from 8.9.
        weight: result of `pack_weight`, or of `quantize_weight` where x is quantized; x's dtype.
        scale, shift: float32; where x is quantized, scale includes the steps of x and of the weights.
        residual, skip: floating, also where x is quantized.
        out: the floating result, or None.
        config: one of `configurations`, by default the first.
        precision: "tf32" or "ieee" for float32 products; by default as torch's own convolutions.
        overlap: whether the kernel starts before its predecessor has ended, on GPUs that support it; it
            prefetches the weights into the L2 cache, then waits for the predecessor.
        parts: memory of at least `scratch_bytes` for split sums, float32 or int32; by default allocated.
        codes: the result divided by `codes_step`, as int8 or float8_e4m3fn; or None.
        codes_step: quantization step of `codes`.

    Raises:
        ValueError: neither out nor codes is given, or parts is too small.
    """
    result = codes if out is None else out
    if result is None:
        raise ValueError(f"{OP}: out and codes are None, at least one of them must be a tensor")
    n, c, h, w = x.shape
    _, k, out_h, out_w = result.shape
    pixels = n * out_h * out_w
    if pixels * k == 0:
        return
    aligned = conv.is_aligned(x, residual, skip, out, codes)
    problem = conv.Problem(pixels, k, kernel[0] * kernel[1], c, x.dtype, aligned)
    precision = precision or conv.default_precision(x.dtype)
    config = config or conv.best(problem, precision, x)
    overlap = overlap and _triton.overlaps_launches(x)
    act, slope = conv.activation(slope)
    strides = [n for t in (residual, skip, out, codes) for n in common.strides(t)]
    after = (*strides, slope, 1 / codes_step)
    flags = dict(conv.flags(scale, shift, residual, skip), HAS_OUT=out is not None,
                 HAS_CODES=codes is not None, ACT=act)  # fmt: skip
    options = dict(launch_pdl=True) if overlap else {}
    parts = conv.parts_of(parts, config, pixels, k, x)
    grid = (conv.cdiv(pixels, config.block_m) * conv.cdiv(k, config.block_n), config.split)
    with _triton.on_device_of(x):
        conv_kernel[grid](
            x, weight, scale, shift, residual, skip, out, codes, parts, pixels, k, h, w, out_h, out_w,
            *common.strides(x), *after, c, *kernel, stride, padding, **flags,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=conv.block_k(config, problem),
            SPLIT=config.split, SWAP=config.swap, PRECISION=precision, OVERLAP=overlap,
            num_warps=config.warps, num_stages=config.stages, **options,
        )  # fmt: skip
        if config.split > 1:
            sum_kernel[(conv.cdiv(pixels, SUM_BLOCK_M), conv.cdiv(k, SUM_BLOCK_N))](
                parts, scale, shift, residual, skip, out, codes, pixels, k, out_h, out_w, *after, **flags,
                BLOCK_M=SUM_BLOCK_M, BLOCK_N=SUM_BLOCK_N, SPLIT=config.split, OVERLAP=overlap,
                num_warps=4, **options,
            )  # fmt: skip


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
    scale, shift = (None if t is None else common.float32(t) for t in (scale, shift))
    if backend == "triton":
        residual, skip = (None if t is None else common.channels_innermost(t) for t in (residual, skip))
        precision = conv.default_precision(x.dtype)
        weight, kernel = conv.pack_weight(w, x.dtype, precision), (w.shape[2], w.shape[3])
        after = (scale, shift, residual, skip, out)
        conv_bn_act_triton(common.channels_innermost(x), weight, *after, kernel, stride, padding, slope)
    else:
        residual, skip = (None if t is None else common.channels_last(t) for t in (residual, skip))
        packed = pack_conv(w, stride, padding, dtype=product_dtype(w.dtype, x.dtype))
        conv_bn_act_native(common.channels_last(x), packed, scale, shift, residual, skip, out, slope)
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
        skip: tensor like residual, added after the activation, or None.
        stride, padding: stride and padding in both dimensions.
        slope: slope of the activation for negative values: 0 is relu, up to 1 leaky relu, None no activation.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, K, H', W'), dtype of x; sums are in float32 or wider. channels_last from the native kernel.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    x, residual, skip = map(common.autocast, (x, residual, skip))
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
