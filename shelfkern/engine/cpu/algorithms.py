"""The ways to run each step on a CPU: our kernels, and the library's calls.

To add one, add it to what its kind of step has in `_OURS` or `_THEIRS`: a name, what it should take, and a
function that packs the weights and gives what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ... import native, ops
from ...ops._conv_winograd import conv_winograd_native, shared_block_winograd_native
from ...ops._stem_winograd import PackedStemWinograd, pack_stem_winograd
from ...ops.conv_bn_act import PackedConv
from ...ops.stem import normalised_values, pack_stem_rows
from .. import plan as p
from ..arena import like, value_bytes
from ..problem import Packed, Size
from . import cost, library, quantized
from .algorithm import Algorithm, Context, Found, Run, no_scratch, stem_image
from .winograd import Winograd, direct_filters, stems, winograds

Optional = Tensor | None
Make = Callable[..., list[Algorithm]]
# x, scale, shift, residual, skip, out, slope.
Convolve = Callable[[Tensor, Optional, Optional, Optional, Optional, Tensor, float | None], None]
# Packs a convolution's weights, and gives it.
Prepare = Callable[[], Convolve]

# The time of a shared block in strips, to that of one convolution after the other, as the cost model has it:
# only measuring chooses strips, for their bands of two tile rows and more are too few for many threads.
# Measured in float32, of 64 channels at 64 x 64, 64 x 128, 128 x 128 and 128 x 256 and of 128 at 64 x 64, it
# is 1.00, 0.99, 0.99, 0.98 and 0.98 on two threads, 1.00, 1.00, 0.97, 0.97 and 0.98 on one.
STRIPS = 1.01


def algorithms(step: p.Step, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    """The ways to run a step for n images seen as h x w, the one that should be fastest first.

    Raises:
        RuntimeError: none can run; the message gives the reasons.
    """
    ours, reasons = _ours(step, size, context, packed)
    make = _THEIRS.get(type(step)) if context.theirs and not quantized.on_codes(step) else None
    theirs = make(step, size, context, packed) if make is not None else []
    if not ours and not theirs:
        raise RuntimeError(f"backend is 'native', which cannot run {step.op}: {'; '.join(reasons)}")
    return sorted([*ours, *theirs], key=lambda algorithm: algorithm.microseconds)


def why_not_ours(step: p.Step, context: Context) -> str | None:
    """Why a step has no kernel of ours here, None if it has."""
    if type(step) not in _kernels(step):
        return f"{step.op} has no native kernel"
    if isinstance(step, p.Conv) and not step.inputs:
        return "a convolution of the image without pooling has no native kernel"
    return context.unavailable(step.op)


def _ours(step: p.Step, size: Size, context: Context, packed: Packed) -> Found:
    why = why_not_ours(step, context)
    return ([], [why]) if why is not None else (_kernels(step)[type(step)](step, size, context, packed), [])


def _kernels(step: p.Step) -> Mapping[type[p.Step], Make]:
    return quantized.OURS if quantized.on_codes(step) else _OURS


def _products(context: Context) -> torch.dtype:
    """What direct convolutions of floating activations multiply."""
    return context.dtype if native.has_product(context.dtype) else torch.float32


def _convolutions(
    step: p.Conv | p.SharedBlockStep, size: Size, stride: int, padding: int, context: Context, packed: Packed
) -> list[tuple[str, float, Prepare]]:
    """Our ways to convolve: a name, what each should take, and what prepares it."""
    weight, products = step.weight, _products(context)

    def direct() -> Convolve:
        filters = direct_filters(weight, stride, padding, packed, products)
        return lambda x, *others: ops.conv_bn_act_native(x, filters, *others)

    def winograd(way: Winograd) -> Convolve:
        filters = way.filters(weight, stride, packed)
        return lambda x, *others: conv_winograd_native(x, filters, *others)

    found: list[tuple[str, float, Prepare]] = [("native direct", cost.direct(step, size, products), direct)]
    for way in winograds(weight, stride, padding, context.dtype):
        found.append((str(way), cost.winograd(step, size, *way), functools.partial(winograd, way)))
    return found


def _our_conv(step: p.Conv, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def bound(prepare: Prepare) -> Run:
        convolve = prepare()

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            residual = inputs[1] if step.residual else None
            skip = inputs[-1] if step.skip else None
            convolve(inputs[0], step.scale, step.shift, residual, skip, out, step.act.slope)

        return no_scratch(run)

    return [
        Algorithm(name, time, functools.partial(bound, prepare))
        for name, time, prepare in _convolutions(step, size, step.stride, step.padding, context, packed)
    ]


def _our_shared_block(
    step: p.SharedBlockStep, size: Size, context: Context, packed: Packed
) -> list[Algorithm]:
    def bound(prepare: Prepare) -> Run:
        convolve = prepare()

        # All of one convolution, then all of the other.
        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scratch: Tensor) -> None:
            (x,), (out,) = inputs, outputs
            hidden = like(out, scratch)
            convolve(x, step.scale1, step.shift1, None, None, hidden, step.act.slope)
            convolve(hidden, step.scale2, step.shift2, x, x if step.skip else None, out, 0.0)

        return run

    def strips(way: Winograd) -> Run:
        filters = way.filters(step.weight, 1, packed)
        norms = step.scale1, step.shift1, step.scale2, step.shift2

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scratch: Tensor) -> None:
            (x,), (out,) = inputs, outputs
            hidden = like(out, scratch)
            shared_block_winograd_native(x, filters, *norms, hidden, out, step.act.slope, step.skip)

        return run

    scratch = value_bytes(step.hidden, *size, context.dtype)
    found = [
        Algorithm(name, time, functools.partial(bound, prepare), scratch=scratch)
        for name, time, prepare in _convolutions(step, size, 1, 1, context, packed)
    ]
    for way in winograds(step.weight, 1, 1, context.dtype):
        if way.tile == 4 and way.keeps_transformed(step.weight):
            time = STRIPS * cost.winograd(step, size, *way)
            found.append(Algorithm(f"{way} strips", time, functools.partial(strips, way), scratch=scratch))
    return found


def _our_stem(step: p.Stem, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    dtype, normalisation = _products(context), context.normalisation

    def direct() -> PackedConv:
        return pack_stem_rows(step.weight, dtype)

    def winograd() -> PackedStemWinograd:
        return pack_stem_winograd(step.weight)

    def prepare(form: str, pack: Callable[[], PackedConv | PackedStemWinograd]) -> Run:
        filters = packed.get(form, pack)
        mean, std = torch.tensor([normalisation.mean, normalisation.std], dtype=torch.float64)
        values = normalised_values(mean, std)

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            image, padded = stem_image(inputs[0], context)
            norm = step.scale, step.shift
            ops.stem_native(image, filters, *norm, values, out, step.act.slope, padded=padded)

        return no_scratch(run)

    return stems(step, size, dtype, lambda: prepare("direct", direct), lambda: prepare("winograd", winograd))


def _our_gate(step: p.AttentionGate, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        ops.attention_gate_native(inputs[0], step.weight, step.scale, step.shift, out)

    time = cost.moving(step, size, context.dtype.itemsize)
    return [Algorithm("native", time, lambda: no_scratch(run))]


def _our_upsample_add(step: p.UpsampleAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        x, skip, gate = inputs
        ops.upsample_add_native(x, skip, gate, out)

    time = cost.moving(step, size, context.dtype.itemsize)
    return [Algorithm("native", time, lambda: no_scratch(run))]


def _our_deconv(step: p.DeconvAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    dtype = _products(context)

    def direct() -> Run:
        filters = packed.get("direct", lambda: ops.pack_deconv(step.weight, dtype))

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            ops.deconv_add_native(inputs[0], filters, step.bias, inputs[1], out)

        return no_scratch(run)

    def winograd(way: Winograd) -> Run:
        filters = way.filters(step.weight, 2, packed, transposed=True)

        def run(inputs: Sequence[Tensor], out: Tensor) -> None:
            x, skip = inputs
            conv_winograd_native(x, filters, None, step.bias, None, skip, out, None)

        return no_scratch(run)

    found = [Algorithm("native direct", cost.direct(step, size, dtype), direct)]
    for way in winograds(step.weight, 2, 1, context.dtype):
        time = cost.winograd(step, size, *way)
        found.append(Algorithm(str(way), time, functools.partial(winograd, way)))
    return found


def _library(
    name: str,
    microseconds: float,
    prepare: Callable[[], library.LibraryRun],
    dtype: torch.dtype,
    computing: torch.dtype = torch.float32,
) -> Algorithm:
    """A library's way, on tensors of dtype `computing`, giving channels_last ones of `dtype`."""

    def adapted() -> Run:
        run = prepare()

        def converted(inputs: Sequence[Tensor], outputs: object, scratch: object) -> Tensor:
            # Raw images stay so, and gates are float32.
            out = run([x.to(computing) if x.dtype is dtype else x for x in inputs])
            if out.ndim < 4:
                return out
            # A tensor of one pixel may become a contiguous one of more.
            return out.to(dtype).contiguous(memory_format=torch.channels_last)

        return converted

    return Algorithm(name, microseconds, adapted, in_arena=False)


def _computing(context: Context) -> torch.dtype:
    """Without instructions for bfloat16 torch's convolutions of it are slower than float32's by far."""
    return context.dtype if library.bfloat16_products() else torch.float32


def _image_shape(size: Size) -> library.Shape:
    n, h, w = size
    return n, 3, h, w


def _folded(
    weight: Tensor,
    scale: Optional,
    shift: Optional,
    stride: int,
    act: p.Activation,
    shape: library.Shape,
    context: Context,
    packed: Packed,
) -> library.Convolve:
    """The library's convolution, its filters laid out for x of `shape` and `scale` folded into them."""
    # A block's two differ by their scales. oneDNN's layouts may depend on the number of threads too.
    form = (shape, torch.get_num_threads(), native.address(scale))
    parameters = weight, scale, shift, stride, act, shape, _computing(context)
    return packed.while_held(form, lambda: library.make_conv(*parameters))


def _onednn(
    step: p.Step,
    size: Size,
    context: Context,
    prepare: Callable[[], library.LibraryRun],
    calls: int = 1,
    passes: int = 0,
) -> Algorithm:
    computing = _computing(context)
    time = cost.onednn(step, size, computing.itemsize, calls, passes)
    name = "torch" if library.onednn_reason() else "onednn"
    return _library(name, time, prepare, context.dtype, computing)


def _their_conv(step: p.Conv, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        shape = step.inputs[0].shape(*size) if step.inputs else _image_shape(size)
        parameters = step.weight, step.scale, step.shift, step.stride, step.act, shape
        convolve = _folded(*parameters, context, packed)
        return library.conv(step, convolve, context.extents, _computing(context), context.normalisation)

    return [_onednn(step, size, context, prepare, passes=int(step.skip))]


def _their_stem(step: p.Stem, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        parameters = step.weight, step.scale, step.shift, 2, step.act, _image_shape(size)
        convolve = _folded(*parameters, context, packed)
        return library.stem(convolve, context.extents, _computing(context), context.normalisation)

    # The image is normalised and padded, and what is pooled has four times the pixels.
    return [_onednn(step, size, context, prepare, calls=4, passes=8)]


def _their_shared_block(
    step: p.SharedBlockStep, size: Size, context: Context, packed: Packed
) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        shape = step.inputs[0].shape(*size)
        norm1, norm2 = (step.scale1, step.shift1), (step.scale2, step.shift2)
        first = _folded(step.weight, *norm1, 1, step.act, shape, context, packed)
        second = _folded(step.weight, *norm2, 1, p.Activation(0.0), shape, context, packed)
        return library.shared_block(step, first, second)

    return [_onednn(step, size, context, prepare, calls=2, passes=int(step.skip))]


def _their_deconv(step: p.DeconvAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    computing = _computing(context)

    def prepare() -> library.LibraryRun:
        weight, bias = packed.get("plain", lambda: (step.weight.to(computing), step.bias.to(computing)))
        return library.deconv_add(weight, bias)

    time = cost.onednn(step, size, computing.itemsize, passes=1)
    return [_library("torch", time, prepare, context.dtype, computing)]


def _their_gate(step: p.AttentionGate, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    time = cost.library_passes(step, size, 4)
    return [_library("torch", time, lambda: library.attention_gate(step), context.dtype)]


def _their_upsample_add(step: p.UpsampleAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    return [
        _library("torch", cost.library_passes(step, size, 3), lambda: library.upsample_add, context.dtype)
    ]


def _their_max_pool(step: p.MaxPool, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    return [_library("torch", cost.library_passes(step, size, 1), lambda: library.max_pool, context.dtype)]


_OURS: dict[type[p.Step], Make] = {
    p.Stem: _our_stem,
    p.Conv: _our_conv,
    p.SharedBlockStep: _our_shared_block,
    p.AttentionGate: _our_gate,
    p.UpsampleAdd: _our_upsample_add,
    p.DeconvAdd: _our_deconv,
}
_THEIRS: dict[type[p.Step], Make] = {
    p.Stem: _their_stem,
    p.Conv: _their_conv,
    p.SharedBlockStep: _their_shared_block,
    p.AttentionGate: _their_gate,
    p.UpsampleAdd: _their_upsample_add,
    p.DeconvAdd: _their_deconv,
    p.MaxPool: _their_max_pool,
}
