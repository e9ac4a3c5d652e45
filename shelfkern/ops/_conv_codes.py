"""Convolutions of unsigned codes on a CPU: what the native kernel multiplies by and adds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

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
    """A convolution's weights in codes.

    Attributes:
        packed: of int8, or transformed from them.
        step: (K,) float32, what one step of each output channel's weights is.
    """

    packed: PackedConv | PackedWinograd
    step: Tensor


@dataclasses.dataclass(frozen=True)
class Folded:
    """What a convolution of codes does with its sums, in the steps of its result.

    Attributes:
        scale, shift: of whole panels, float32.
        codes: what the native kernels need beside them.
    """

    scale: Tensor
    shift: Tensor
    codes: ConvCodes


def pack_conv_codes(w: Tensor, stride: int = 1, padding: int = 0) -> CodedFilters:
    """Makes codes of weights (K, C, kernel_h, kernel_w), each output channel's largest 127 steps.

    Raises:
        ValueError: a weight is not finite, or sums could overflow 32 bits.
    """
    codes, step = _codes(w)
    return CodedFilters(pack_conv(codes, stride, padding, dtype=torch.int8), step)


def pack_winograd_codes(w: Tensor) -> CodedFilters:
    """The same of 3x3 kernels of stride 1 and padding 1, for Winograd's minimal filtering."""
    codes, step = _codes(w)
    if keeps_transformed(w, product=torch.int16):
        return CodedFilters(pack_winograd(codes, product=torch.int16), step)
    # Which has digits enough for codes.
    taps = codes.bfloat16()
    return CodedFilters(as_winograd(pack_conv(taps, 1, 1, dtype=torch.bfloat16), w=taps), step)


def pack_deconv_codes(w: Tensor) -> tuple[CodedFilters, ...]:
    """The same of weights (C, K, 3, 3) of a transposed convolution, as `pack_deconv`."""
    codes, step = _codes(w.transpose(0, 1))
    kernels = parity_kernels(codes)
    return tuple(CodedFilters(pack_conv(kernel, dtype=torch.int8), step) for kernel in kernels)


def _codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in the shape of the weights, and their steps."""
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
    """Folds a norm, and what the codes of x, residual, skip and the result are, out None for floats."""
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
    """The native kernel into `out`, unchecked: as `conv_bn_act_native`, x, residual and skip uint8.

    out: uint8: the nearest codes, ties to even, within [0, 255], what is no number 0; or, of a direct
        convolution, whose sums are exact, float32. Winograd's sums are rounded at 14 bits of the largest, a
        fifth of a code at most in the networks.
    """
    others = folded.scale, folded.shift, residual, skip, out, slope, folded.codes
    if isinstance(packed, PackedWinograd):
        conv_winograd_native(x, packed, *others)
    else:
        conv_bn_act_native(x, packed, *others)


def deconv_codes_native(
    x: Tensor, packed: tuple[CodedFilters, ...], folded: tuple[Folded, ...], skip: Tensor, out: Tensor
) -> None:
    """`deconv_add_native` of codes, uint8."""
    for taps, after, added, part in zip(packed, folded, parities(skip), parities(out), strict=True):
        conv_codes_native(x, taps.packed, after, None, added, part, None)
