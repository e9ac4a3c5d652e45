"""Cases of `selftest` for uint8 activations, those of the CPU engine in int8.

A correct kernel matches the reference exactly: all numbers are integers, even where a slope of a half
applies, so that no result is near the midpoint between two values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _common as common
from ._conv_codes import (
    conv_codes_native,
    deconv_codes_native,
    fold,
    pack_conv_codes,
    pack_deconv_codes,
    pack_winograd_codes,
)
from ._stem_winograd import PackedStemWinograd, pack_stem_winograd
from .attention_gate import attention_gate_native, attention_gate_reference
from .conv_bn_act import PackedConv, conv_bn_act_reference, whole_panels
from .deconv_add import deconv_add_reference
from .quantize import Quantum, quantize_native
from .stem import StemCodes, fold_raw, normalised_values, pack_stem_rows, stem_native, stem_reference
from .upsample_add import upsample_add_native, upsample_add_reference

# For convolutions: quantization of x, residual, skip and result.
X, RESIDUAL, SKIP, OUT = Quantum(1.0, 1), Quantum(2.0, 7), Quantum(1.0, 3), Quantum(1.0, 128)
SLOPE = 0.5
# For stems: normalised pixels are integers too, and the padding is an exact pixel value.
MEAN, STD = (torch.full((3,), value / 255, dtype=torch.float64) for value in (115, 64))
SIZE = (32, 64)
# For a merge, whose gates are quarters: quantization of the upsampled tensor, the skip and the result.
DEEP, FINE, MERGED = Quantum(4.0, 9), Quantum(1.0, 40), Quantum(1.0, 100)
GATED = Quantum(1 / 64, 120)


def cases() -> dict[str, tuple[Any, ...]]:
    """Kernel runner, reference, tensors and other arguments of each op that takes or returns uint8 values."""
    x, every = _codes(4, 2, 33, 7, 9), _codes(255, 2, 19, 7, 9)
    maps, larger = (2, 21, 7, 9), (2, 6, 14, 18)
    norm = _scales(21), _shifts(21)
    images = 115 + 64 * _integers(-1, 2, 2, 30, 33, 3)
    up = _weights(6, 33, 3, 3).transpose(0, 1), _shifts(6), _codes(9, *larger)
    gates = _integers(-3, 3, 2, 19).double() / 4
    return {
        "attention_gate": (_gate, _gate_reference, (every, _weights(5, 19), _scales(5), _shifts(5)), {}),
        "conv_bn_act": (
            _convs,
            _convs_reference,
            (x, _weights(21, 33, 3, 3), *norm, _codes(20, *maps), _codes(9, *maps)),
            {},
        ),
        "deconv_add": (_deconv, _deconv_reference, (x, *up), {}),
        "quantize": (_quantize, _quantize_reference, (OUT.values(every, torch.float64) + 0.25,), {}),
        "stem": (
            _stems,
            _stems_reference,
            (images.to(torch.uint8), _weights(20, 3, 7, 7), _scales(20), _shifts(20)),
            {},
        ),
        "upsample_add": (
            _upsample_add,
            _upsample_add_reference,
            (_codes(18, 2, 19, 7, 9), _codes(90, 2, 19, 14, 18), gates),
            {},
        ),
    }


def _integers(lowest: int, highest: int, *shape: int) -> Tensor:
    return torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _codes(highest: int, *shape: int) -> Tensor:
    return common.channels_last(_integers(0, highest, *shape).to(torch.uint8))


def _weights(*shape: int) -> Tensor:
    """Weights of three values: 0 and both extremes."""
    return _integers(-1, 1, *shape).double()


def _scales(channels: int) -> Tensor:
    return 2 - 4 * torch.arange(channels, dtype=torch.float64).remainder(2)


def _shifts(channels: int) -> Tensor:
    return 2 * torch.arange(channels, dtype=torch.float64).remainder(5)


def _empty(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> Tensor:
    return common.channels_last(torch.empty(shape, dtype=dtype))


def _values(quantum: Quantum, codes: Tensor) -> Tensor:
    return quantum.values(codes, torch.float64)


def _convs(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, skip: Tensor, backend: str
) -> list[Tensor]:
    """A direct convolution to uint8 and to float, and one by Winograd's filtering to uint8."""
    direct, filtered, found = pack_conv_codes(w, padding=1), pack_winograd_codes(w), []
    for filters, out in ((direct, OUT), (direct, None), (filtered, OUT)):
        folded = fold(filters, scale, shift, X, out, RESIDUAL, SKIP)
        found.append(_empty(skip.shape, torch.float32 if out is None else torch.uint8))
        conv_codes_native(x, filters.packed, folded, residual, skip, found[-1], SLOPE)
    return found


def _convs_reference(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, skip: Tensor
) -> list[Tensor]:
    others = _values(RESIDUAL, residual), _values(SKIP, skip)
    truth = conv_bn_act_reference(_values(X, x), w, scale, shift, *others, padding=1, slope=SLOPE)
    return [OUT.codes(truth), truth, OUT.codes(truth)]


def _deconv(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor, backend: str) -> list[Tensor]:
    """Directly, and by Winograd's filtering."""
    taps, filters = pack_deconv_codes(w), pack_winograd_codes(w, 2, transposed=True)
    direct, filtered = _empty(skip.shape), _empty(skip.shape)
    folded = tuple(fold(one, None, bias, X, OUT, skip=SKIP) for one in taps)
    deconv_codes_native(x, taps, folded, skip, direct)
    after = fold(filters, None, bias, X, OUT, skip=SKIP)
    conv_codes_native(x, filters.packed, after, None, skip, filtered, None)
    return [direct, filtered]


def _deconv_reference(x: Tensor, w: Tensor, bias: Tensor, skip: Tensor) -> list[Tensor]:
    return 2 * [OUT.codes(deconv_add_reference(_values(X, x), w, bias, _values(SKIP, skip)))]


def _stems(image: Tensor, w: Tensor, scale: Tensor, shift: Tensor, backend: str) -> list[Tensor]:
    """Products of raw pixels, and of normalised ones, directly and by Winograd's filtering."""
    floating = torch.bfloat16 if native.has_product(torch.bfloat16) else torch.float32
    norm = whole_panels(scale), whole_panels(shift)
    ways: list[tuple[PackedConv | PackedStemWinograd, Tensor, Tensor, StemCodes]] = [
        fold_raw(w, scale, shift, MEAN, STD, OUT),
        (pack_stem_rows(w, floating), *norm, StemCodes(bias=OUT.zero)),
        (pack_stem_winograd(w), *norm, StemCodes(bias=OUT.zero)),
    ]
    found = []
    for filters, factors, shifts, codes in ways:
        found.append(_empty((len(image), len(w), SIZE[0] // 4, SIZE[1] // 4)))
        values = normalised_values(MEAN, STD)
        stem_native(image, filters, factors, shifts, values, found[-1], SLOPE, codes)
    return found


def _stems_reference(image: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    return 3 * [OUT.codes(stem_reference(image, w, scale, shift, MEAN, STD, SIZE, SLOPE))]


def _gate(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, backend: str) -> list[Tensor]:
    found = torch.empty(len(x), len(w))
    attention_gate_native(x, w, scale, shift, found, GATED)
    return [found]


def _gate_reference(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    return [attention_gate_reference(_values(GATED, x), w, scale, shift)]


def _upsample_add(x: Tensor, skip: Tensor, gates: Tensor, backend: str) -> list[Tensor]:
    found = _empty(skip.shape)
    upsample_add_native(x, skip, gates, found, (DEEP, FINE, MERGED))
    return [found]


def _upsample_add_reference(x: Tensor, skip: Tensor, gates: Tensor) -> list[Tensor]:
    return [MERGED.codes(upsample_add_reference(_values(DEEP, x), _values(FINE, skip), gates))]


def _quantize(x: Tensor, backend: str) -> list[Tensor]:
    x = common.channels_last(x)
    found = _empty(x.shape)
    quantize_native(x, OUT.step, found, OUT.zero)
    return [found]


def _quantize_reference(x: Tensor) -> list[Tensor]:
    return [OUT.codes(x)]
