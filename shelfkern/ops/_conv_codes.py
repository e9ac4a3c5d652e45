"""uint8 convolutions on a CPU: packing of int8 weights, and folding of norms and quantization."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import native
from ._conv_winograd import (
    PackedWinograd,
    as_winograd,
    conv_winograd_native,
    keeps_transformed,
    pack_winograd,
)
from .conv_bn_act import ConvCodes, PackedConv, conv_bn_act_native, pack_conv, whole_panels
from .deconv_add import parities, parity_kernels
from .quantize import Quantum, quantize_weight


@dataclasses.dataclass(frozen=True)
class CodedFilters:
    """A convolution's quantized weights.

    Attributes:
        packed: int8 weights, as int8 or int16, or weights transformed from them.
        step: (K,) float32, quantization step of each output channel's weights.
    """

    packed: PackedConv | PackedWinograd
    step: Tensor


@dataclasses.dataclass(frozen=True)
class Folded:
    """Epilogue of a quantized convolution, in quantization steps of its result.

    Attributes:
        scale, shift: whole panels, float32.
        codes: the remaining parameters of the native kernels.
    """

    scale: Tensor
    shift: Tensor
    codes: ConvCodes


def direct_product() -> torch.dtype:
    """dtype that direct convolutions multiply: int8, or int16 on CPUs with instructions for that alone."""
    wide = native.has_product(torch.int16) and not native.has_product(torch.int8)
    return torch.int16 if wide else torch.int8


def pack_conv_codes(
    w: Tensor, stride: int = 1, padding: int = 0, product: torch.dtype | None = None
) -> CodedFilters:
    """Quantizes weights (K, C, kernel_h, kernel_w): each output channel's largest magnitude is 127 steps.

    product: int8 or int16; by default `direct_product()`. The sums are the same.

    Raises:
        ValueError: a weight is not finite, or sums could overflow 32 bits.
    """
    codes, step = _codes(w)
    return CodedFilters(pack_conv(codes, stride, padding, dtype=product or direct_product()), step)


def pack_winograd_codes(w: Tensor, stride: int = 1, transposed: bool = False) -> CodedFilters:
    """`pack_conv_codes` for 3x3 kernels of padding 1, for Winograd's minimal filtering.

    w: (K, C, 3, 3), if transposed (C, K, 3, 3).
    """
    codes, step = _codes(w.transpose(0, 1) if transposed else w)
    ordered = codes.transpose(0, 1) if transposed else codes
    if keeps_transformed(w, product=torch.int16):
        return CodedFilters(pack_winograd(ordered, 4, stride, transposed, torch.int16), step)
    # bfloat16 represents int8 values exactly.
    taps = pack_conv(codes.bfloat16(), stride, 1, dtype=torch.bfloat16)
    return CodedFilters(as_winograd(taps, 4, stride, transposed, ordered), step)


def pack_deconv_codes(w: Tensor, product: torch.dtype | None = None) -> tuple[CodedFilters, ...]:
    """`pack_conv_codes` for weights (C, K, 3, 3) of a transposed convolution, as `pack_deconv`."""
    codes, step = _codes(w.transpose(0, 1))
    dtype = product or direct_product()
    return tuple(CodedFilters(pack_conv(kernel, dtype=dtype), step) for kernel in parity_kernels(codes))


def _codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized weights in their original shape, and their steps."""
    codes, step = quantize_weight(w, torch.int8)
    return codes.unflatten(1, w.shape[2:]).permute(0, 3, 1, 2), step


def fold(
    filters: CodedFilters,
    scale: Tensor | None,
    shift: Tensor | None,
    x: Quantum,
    out: Quantum | None,
    residual: Quantum | None = None,
    skip: Quantum | None = None,
) -> Folded:
    """Folds a norm and the quantization of x, residual, skip and out; out is None for a floating result."""
    sums = filters.packed.sums if isinstance(filters.packed, PackedConv) else None
    unit, zero = (1.0, 0) if out is None else (out.step, out.zero)
    scales = filters.step.double() * (x.step / unit)
    shifts = torch.zeros_like(scales) if shift is None else shift.double() / unit
    if scale is not None:
        scales = scales * scale.double()
    residual, skip = residual or Quantum(0.0), skip or Quantum(0.0)
    shifts = shifts - residual.zero * residual.step / unit
    codes = ConvCodes(
        start=-x.zero * sums if x.zero and sums is not None else None,
        x_zero=x.zero,
        residual_scale=residual.step / unit,
        skip_scale=skip.step / unit,
        bias=zero - skip.zero * skip.step / unit,
    )
    return Folded(whole_panels(scales), whole_panels(shifts), codes)


def conv_codes_native(
    x: Tensor,
    packed: PackedConv | PackedWinograd,
    folded: Folded,
    residual: Tensor | None,
    skip: Tensor | None,
    out: Tensor,
    slope: float | None,
) -> None:
    """Runs the native kernel into `out`, unchecked: like `conv_bn_act_native`, with x, residual and skip
    uint8.

    out: uint8: rounded to nearest, ties to even, clamped to [0, 255], NaN becomes 0; or float32 from a direct
        convolution, whose sums are exact. Winograd's sums are rounded at 14 bits below the largest, in the
        networks at most a fifth of a uint8 step.
    """
    others = folded.scale, folded.shift, residual, skip, out, slope, folded.codes
    if isinstance(packed, PackedWinograd):
        conv_winograd_native(x, packed, *others)
    else:
        conv_bn_act_native(x, packed, *others)


def deconv_codes_native(
    x: Tensor, packed: tuple[CodedFilters, ...], folded: tuple[Folded, ...], skip: Tensor, out: Tensor
) -> None:
    """`deconv_add_native` for uint8 tensors."""
    for taps, after, added, part in zip(packed, folded, parities(skip), parities(out), strict=True):
        conv_codes_native(x, taps.packed, after, None, added, part, None)
