"""Steps on unsigned codes on a CPU, by our kernels. `OURS` has the form of that in `algorithms.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import native, ops
from ...ops._conv_codes import (
    CodedFilters,
    Folded,
    conv_codes_native,
    deconv_codes_native,
    direct_product,
    fold,
    pack_conv_codes,
    pack_deconv_codes,
    pack_winograd_codes,
)
from ...ops._stem_winograd import PackedStemWinograd, pack_stem_winograd
from ...ops.conv_bn_act import whole_panels
from ...ops.quantize import Quantum, quantize_native
from ...ops.stem import StemCodes, fold_raw, normalised_values, pack_stem_rows
from .. import plan as p
from ..arena import like, value_bytes
from ..problem import Packed, Size
from . import cost
from .algorithm import Algorithm, Context, Run, no_scratch, stem_image
from .winograd import stems, winograds

# Of a stem: its weights, scale and shift, and what codes need.
Filters = tuple[ops.PackedConv | PackedStemWinograd, Tensor, Tensor, StemCodes]


def on_codes(step: p.Step) -> bool:
    """Whether a step reads or writes codes."""
    return any(value.codes is not None for value in (*step.inputs, *step.outputs))


def _quantum(value: p.Value) -> Quantum:
    assert value.quantum is not None
    return value.quantum


def _convolutions(
    step: p.Conv | p.SharedBlockStep, size: Size, stride: int, padding: int
) -> list[tuple[str, float, Callable[[], CodedFilters]]]:
    """Our ways to convolve codes: a name, what each should take, and what packs the weights."""
    weight = step.weight
    direct = cost.direct(step, size, direct_product())
    found = [("native direct", direct, lambda: pack_conv_codes(weight, stride, padding))]
    # Winograd's kernels make no floats of codes.
    if step.output.quantum is None:
        return found
    for way in winograds(weight, stride, padding, torch.uint8):
        found.append((str(way), cost.winograd(step, size, *way), lambda: pack_winograd_codes(weight, stride)))
    return found


def _conv(step: p.Conv, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def make(pack: Callable[[], CodedFilters]) -> tuple[CodedFilters, Folded]:
        filters = pack()
        x, *others = map(_quantum, step.inputs)
        residual = others[0] if step.residual else None
        skip = others[-1] if step.skip else None
        return filters, fold(filters, step.scale, step.shift, x, step.output.quantum, residual, skip)

    def prepare(name: str, pack: Callable[[], CodedFilters]) -> Run:
        filters, folded = packed.get(name, lambda: make(pack))

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            residual = inputs[1] if step.residual else None
            skip = inputs[-1] if step.skip else None
            conv_codes_native(inputs[0], filters.packed, folded, residual, skip, out, step.act.slope)

        return no_scratch(run)

    return [
        Algorithm(name, time, functools.partial(prepare, name, pack))
        for name, time, pack in _convolutions(step, size, step.stride, step.padding)
    ]


def _block(step: p.SharedBlockStep, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def make(pack: Callable[[], CodedFilters]) -> tuple[CodedFilters, Folded, Folded]:
        filters = pack()
        x, hidden, out = map(_quantum, (step.inputs[0], step.hidden, step.output))
        first = fold(filters, step.scale1, step.shift1, x, hidden)
        skip = x if step.skip else None
        return filters, first, fold(filters, step.scale2, step.shift2, hidden, out, x, skip)

    def prepare(name: str, pack: Callable[[], CodedFilters]) -> Run:
        filters, first, second = packed.get(name, lambda: make(pack))

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scratch: Tensor) -> None:
            (x,), (out,) = inputs, outputs
            hidden, skip = like(out, scratch), x if step.skip else None
            conv_codes_native(x, filters.packed, first, None, None, hidden, step.act.slope)
            conv_codes_native(hidden, filters.packed, second, x, skip, out, 0.0)

        return run

    scratch = value_bytes(step.hidden, *size, context.dtype)
    return [
        Algorithm(name, time, functools.partial(prepare, name, pack), scratch=scratch)
        for name, time, pack in _convolutions(step, size, 1, 1)
    ]


def _deconv(step: p.DeconvAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    x, skip = map(_quantum, step.inputs)
    out = _quantum(step.output)

    def folded(filters: CodedFilters) -> tuple[CodedFilters, Folded]:
        return filters, fold(filters, None, step.bias, x, out, skip=skip)

    def direct() -> Run:
        parts = packed.get("codes", lambda: tuple(map(folded, pack_deconv_codes(step.weight))))
        filters, after = tuple(zip(*parts, strict=True))

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            x, skip = inputs
            deconv_codes_native(x, filters, after, skip, out)

        return no_scratch(run)

    def winograd() -> Run:
        parts = packed.get("winograd", lambda: folded(pack_winograd_codes(step.weight, 2, transposed=True)))

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            (filters, after), (x, skip) = parts, inputs
            conv_codes_native(x, filters.packed, after, None, skip, out, None)

        return no_scratch(run)

    found = [Algorithm("native direct", cost.direct(step, size, direct_product()), direct)]
    for way in winograds(step.weight, 2, 1, torch.uint8):
        found.append(Algorithm(str(way), cost.winograd(step, size, *way), winograd))
    return found


def _stem(step: p.Stem, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    floating = torch.bfloat16 if native.has_product(torch.bfloat16) else torch.float32
    out = _quantum(step.output)
    mean, std = torch.tensor([context.normalisation.mean, context.normalisation.std], dtype=torch.float64)

    def raw() -> Filters:
        return fold_raw(step.weight, step.scale, step.shift, mean, std, out)

    def normalised(filters: ops.PackedConv | PackedStemWinograd) -> Filters:
        scale, shift = (whole_panels(norm / out.step) for norm in (step.scale, step.shift))
        return filters, scale, shift, StemCodes(bias=out.zero)

    def direct() -> Filters:
        return raw() if step.raw else normalised(pack_stem_rows(step.weight, floating))

    def winograd() -> Filters:
        return normalised(pack_stem_winograd(step.weight))

    def prepare(form: str, pack: Callable[[], Filters]) -> Run:
        filters, scale, shift, codes = packed.get(form, pack)
        values = normalised_values(mean, std)

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            image, padded = stem_image(inputs[0], context)
            ops.stem_native(image, filters, scale, shift, values, out, step.act.slope, codes, padded)

        return no_scratch(run)

    product = torch.int8 if step.raw else floating
    return stems(step, size, product, lambda: prepare("codes", direct), lambda: prepare("winograd", winograd))


def _gate(step: p.AttentionGate, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    quantum = _quantum(step.inputs[0])

    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        ops.attention_gate_native(inputs[0], step.weight, step.scale, step.shift, out, quantum)

    return [Algorithm("native", cost.moving(step, size, 1), lambda: no_scratch(run))]


def _upsample_add(step: p.UpsampleAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    quanta = _quantum(step.inputs[0]), _quantum(step.inputs[1]), _quantum(step.output)

    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        x, skip, gate = inputs
        ops.upsample_add_native(x, skip, gate, out, quanta)

    return [Algorithm("native", cost.moving(step, size, 1), lambda: no_scratch(run))]


def _quantize(step: p.Quantize, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    quantum = _quantum(step.output)

    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        quantize_native(inputs[0], quantum.step, out, quantum.zero)

    time = cost.moving(step, size, context.dtype.itemsize)
    return [Algorithm("native", time, lambda: no_scratch(run))]


OURS: dict[type[p.Step], Callable[..., list[Algorithm]]] = {
    p.Stem: _stem,
    p.Conv: _conv,
    p.SharedBlockStep: _block,
    p.AttentionGate: _gate,
    p.UpsampleAdd: _upsample_add,
    p.DeconvAdd: _deconv,
    p.Quantize: _quantize,
}
