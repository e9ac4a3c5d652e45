"""The ways to run each step: our kernels in several configurations, and the library's calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import _conv_triton as conv
from ...ops.attention_gate import attention_gate_cuda
from ...ops.conv_bn_act import conv_bn_act_triton
from ...ops.deconv_add import deconv_add_triton, pack_deconv_triton
from ...ops.shared_block import (
    CUDA_TILE_ROWS,
    MAX_CUDA_CHANNELS,
    PackedBlock,
    cuda_shared_bytes,
    pack_block,
    shared_block_cuda,
    shared_block_triton,
)
from ...ops.stem import PackedStem, normalised_values, pack_stem, stem_cuda
from ...ops.upsample_add import upsample_add_cuda, upsample_add_triton
from .. import plan as p
from ..arena import like
from ..problem import Packed, Size
from . import cost, library, quantized
from .algorithm import (
    Algorithm,
    Context,
    Found,
    Run,
    arena_bytes,
    configurations,
    name_of,
    norms,
    problem_of,
)


def algorithms(step: p.Step, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    """The ways to run a step for n images seen as h x w, the one that should be fastest first.

    Raises:
        RuntimeError: none can run; the message gives the reasons.
    """
    kind = type(step)
    ours, reasons = _OURS[kind](step, size, context, packed) if kind in _OURS else ([], [])
    theirs = _THEIRS[kind](step, size, context, packed) if context.theirs else []
    if not ours and not theirs:
        because = "; ".join(reasons) or f"{step.op} has no such kernel"
        raise RuntimeError(f"backend is 'native', which cannot run {step.op} of {step.name}: {because}")
    return sorted([*ours, *theirs], key=lambda algorithm: algorithm.microseconds)


def _ours_stem(step: p.Stem, size: Size, context: Context, packed: Packed) -> Found:
    why = context.unavailable("stem", context.cuda)
    if why is not None:
        return [], [why]

    def prepare() -> Run:
        packing = packed.get("stem", lambda: _pack_stem(step, context))
        values = packed.get("values", lambda: _values(context))

        def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
            slope = step.act.slope
            stem_cuda(inputs[0], packing, values, outputs[0], slope, context.cuda, overlap=overlap)

        return run

    moved = p.step_bytes(step, context.dtype, *size)
    macs = p.step_macs(step, *size)
    time = cost.LAUNCH + cost.product(macs, context.gpu, context.dtype) + cost.moving(moved, context.gpu)
    return [Algorithm("cuda", time, 1, prepare)], []


def _pack_stem(step: p.Stem, context: Context) -> PackedStem:
    weight = step.weight.to(context.device, context.dtype)
    return pack_stem(weight, step.scale.to(context.device), step.shift.to(context.device))


def _values(context: Context) -> Tensor:
    statistics = (context.normalisation.mean, context.normalisation.std)
    mean, std = torch.tensor(statistics, dtype=torch.float64, device=context.device)
    return normalised_values(mean, std)


def _ours_conv(step: p.Conv, size: Size, context: Context, packed: Packed) -> Found:
    why = context.unavailable("conv_bn_act", "triton")
    if why is not None or not step.inputs:
        return [], [why or "a convolution of the image without pooling has no kernel"]
    problem = problem_of(step, size, context)

    def algorithm(config: conv.Config) -> Algorithm:
        def prepare() -> Run:
            weight = packed.get("triton", lambda: _pack(step.weight, context))
            norm = packed.get("norm", lambda: _norm(step, context))
            kernel = (step.weight.shape[2], step.weight.shape[3])

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                residual, skip = library.others(step, inputs)
                conv_bn_act_triton(
                    inputs[0], weight, *norm, residual, skip, outputs[0], kernel, step.stride, step.padding,
                    step.act.slope, config, context.precision, overlap, parts=scratch,
                )  # fmt: skip

            return run

        time = cost.triton_conv(problem, config, context.gpu)
        launches, scratch = (
            1 + (config.split > 1),
            conv.scratch_bytes(config, problem.pixels, problem.channels),
        )
        return Algorithm(name_of(config), time, launches, prepare, scratch=scratch)

    return [algorithm(config) for config in configurations(problem, context)], []


def _norm(step: p.Conv, context: Context) -> tuple[Tensor | None, Tensor | None]:
    scale, shift = (None if t is None else context.vector(t) for t in (step.scale, step.shift))
    return scale, shift


def _pack(weight: Tensor, context: Context) -> Tensor:
    return conv.pack_weight(weight.to(context.device), context.dtype, context.precision)


def _ours_shared_block(step: p.SharedBlockStep, size: Size, context: Context, packed: Packed) -> Found:
    cuda, why_cuda = _cuda_blocks(step, size, context, packed)
    why = context.unavailable("shared_block", "triton")
    if why is not None:
        return cuda, [*why_cuda, why]
    problem = problem_of(step, size, context)
    hidden_bytes = arena_bytes(step.hidden, size, context)

    def algorithm(config: conv.Config) -> Algorithm:
        def prepare() -> Run:
            weight = packed.get("triton", lambda: _pack(step.weight, context))
            scale1, shift1, scale2, shift2 = packed.get("norms", lambda: context.vectors(*norms(step)))

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                hidden = like(outputs[0], scratch)
                shared_block_triton(
                    inputs[0], weight, scale1, shift1, scale2, shift2, hidden, outputs[0], step.act.slope,
                    step.skip, config, context.precision, overlap, scratch[hidden_bytes:],
                )  # fmt: skip

            return run

        time = 2 * cost.triton_conv(problem, config, context.gpu)
        scratch = hidden_bytes + conv.scratch_bytes(config, problem.pixels, problem.channels)
        return Algorithm(name_of(config), time, 2 + 2 * (config.split > 1), prepare, scratch=scratch)

    return [*cuda, *map(algorithm, configurations(problem, context))], why_cuda


def _cuda_blocks(step: p.SharedBlockStep, size: Size, context: Context, packed: Packed) -> Found:
    c = step.output.channels
    why = context.unavailable("shared_block", context.cuda)
    if why is None and context.dtype.itemsize != 2:
        why = f"activations are {context.dtype}, the CUDA kernel takes bfloat16 and float16"
    if why is None and c > MAX_CUDA_CHANNELS:
        why = f"it has {c} channels, the CUDA kernel takes up to {MAX_CUDA_CHANNELS}"
    if why is not None:
        return [], [why]

    def algorithm(rows: int) -> Algorithm:
        def prepare() -> Run:
            packing = packed.get("cuda", lambda: _pack_block(step, context))

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                shared_block_cuda(
                    inputs[0], packing, outputs[0], step.act.slope, step.skip, context.cuda, rows,
                    overlap=overlap,
                )  # fmt: skip

            return run

        time = cost.cuda_shared_block(step.output.shape(*size), rows, context.gpu)
        return Algorithm(f"cuda {rows} rows", time, 1, prepare)

    every = CUDA_TILE_ROWS[64 if c <= 64 else 128]
    fitting = [rows for rows in every if cuda_shared_bytes(c, rows) <= context.gpu.shared_bytes]
    return [algorithm(rows) for rows in fitting], []


def _pack_block(step: p.SharedBlockStep, context: Context) -> PackedBlock:
    weight, scale1, shift1, scale2, shift2 = (t.to(context.device) for t in (step.weight, *norms(step)))
    return pack_block(weight, scale1, shift1, scale2, shift2, context.dtype)


def _ours_deconv(step: p.DeconvAdd, size: Size, context: Context, packed: Packed) -> Found:
    why = context.unavailable("deconv_add", "triton")
    if why is not None:
        return [], [why]
    problem = problem_of(step, size, context)

    def algorithm(config: conv.Config) -> Algorithm:
        def prepare() -> Run:
            filters = step.weight.to(context.device)
            weight = packed.get(
                "triton", lambda: pack_deconv_triton(filters, context.dtype, context.precision)
            )
            bias = packed.get("bias", lambda: context.vector(step.bias))

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                x, skip = inputs
                deconv_add_triton(x, weight, bias, skip, outputs[0], config, context.precision, overlap)

            return run

        # The four parities have 9 / 4 taps on average.
        four = dataclasses.replace(problem, pixels=4 * problem.pixels, taps=2)
        time = cost.triton_conv(four, config, context.gpu) * 9 / 8
        return Algorithm(name_of(config), time, 1, prepare)

    whole = [config for config in configurations(problem, context) if config.split == 1]
    return [algorithm(config) for config in whole], []


def _ours_gate(step: p.AttentionGate, size: Size, context: Context, packed: Packed) -> Found:
    why = context.unavailable("attention_gate", context.cuda)
    if why is not None:
        return [], [why]

    def prepare() -> Run:
        tensors = (step.weight, step.scale, step.shift)
        weight, scale, shift = packed.get("gate", lambda: context.vectors(*tensors))

        def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
            attention_gate_cuda(inputs[0], weight, scale, shift, outputs[0], context.cuda, overlap=overlap)

        return run

    time = cost.passes(p.step_bytes(step, context.dtype, *size), context.gpu, launches=2)
    return [Algorithm("cuda", time, 2, prepare)], []


def _ours_upsample_add(step: p.UpsampleAdd, size: Size, context: Context, packed: Packed) -> Found:
    time = cost.passes(p.step_bytes(step, context.dtype, *size), context.gpu)

    def cuda(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
        x, skip, gate = inputs
        upsample_add_cuda(x, skip, gate, outputs[0], context.cuda, overlap)

    def triton(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
        x, skip, gate = inputs
        upsample_add_triton(x, skip, gate, outputs[0], overlap)

    why = {name: context.unavailable("upsample_add", name) for name in (context.cuda, "triton")}
    every = {context.cuda: Algorithm("cuda", time, 1, lambda: cuda)}
    # Ties go to the first: its launch costs the host less.
    every["triton"] = Algorithm("triton", time + 0.1, 1, lambda: triton)
    return [every[name] for name in every if why[name] is None], [w for w in why.values() if w]


def _theirs(
    name: str, time: float, launches: int, prepare: Callable[[], library.LibraryRun], in_arena: bool = False
) -> Algorithm:
    def adapted() -> Run:
        run = prepare()
        return lambda inputs, outputs, scratch, overlap: run(inputs, outputs)

    return Algorithm(name, time, launches, adapted, in_arena)


def _folded(
    packed: Packed,
    context: Context,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    form: str = "folded",
) -> library.Folded:
    """Filters and shift in the form of the library's calls."""
    return packed.get(form, lambda: library.folded(weight, scale, shift, context.dtype, context.device))


def _library_time(step: p.Step, size: Size, context: Context, passes: int, convs: int = 1) -> float:
    """Time of a library's convolutions, and of passes over the result."""
    one = step.output.bytes(*size, context.dtype)
    problem = problem_of(step, size, context)  # type: ignore[arg-type]
    time = convs * cost.library_conv(problem, context.precision, context.gpu)
    return time + passes * cost.passes(2 * one, context.gpu)


def _their_conv(step: p.Conv, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    _, h, w = size
    image = (h // step.output.stride * step.stride, w // step.output.stride * step.stride)  # type: ignore[operator]

    def weights() -> library.Folded:
        return _folded(packed, context, step.weight, step.scale, step.shift)

    def plain() -> library.LibraryRun:
        return library.conv(step, *weights(), context.normalisation, image)

    if not step.inputs:
        moved = p.step_bytes(step, context.dtype, *size)
        return [_theirs(context.library, cost.passes(3 * moved, context.gpu, 4), 4, plain)]
    passes = 1 + step.residual + (step.act.slope is not None) + step.skip
    time = _library_time(step, size, context, passes)
    found = [_theirs(context.library, time, 1 + passes, plain)]
    if context.device.type == "cuda" and library.cudnn_fused_fits(step):
        time = _library_time(step, size, context, 0)
        found.append(_theirs("cudnn-fused", time, 1, lambda: library.cudnn_fused(step, *weights())))
    if context.device.type == "cuda" and library.cublaslt_fits(step):
        time = _library_time(step, size, context, 0)
        found.append(_theirs("cublaslt", time, 1, lambda: library.cublaslt(step, *weights()), in_arena=True))
    return found


def _their_shared_block(
    step: p.SharedBlockStep, size: Size, context: Context, packed: Packed
) -> list[Algorithm]:
    def both() -> tuple[library.Folded, library.Folded]:
        first = _folded(packed, context, step.weight, step.scale1, step.shift1, "folded first")
        second = _folded(packed, context, step.weight, step.scale2, step.shift2, "folded second")
        return first, second

    time = _library_time(step, size, context, 5 + step.skip, convs=2)
    found = [_theirs(context.library, time, 7 + step.skip, lambda: library.shared_block(step, *both()))]
    if context.device.type == "cuda" and step.act.slope == 0:
        time = _library_time(step, size, context, int(step.skip), convs=2)
        fused = _theirs("cudnn-fused", time, 2 + step.skip, lambda: library.cudnn_fused_block(step, *both()))
        found.append(fused)
    return found


def _their_deconv(step: p.DeconvAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        return library.deconv_add(*_folded(packed, context, step.weight, None, step.bias))

    # Uses the gradient of a convolution, whose nine taps each reach a quarter of the output pixels.
    time = _library_time(step, size, context, 3)
    return [_theirs(context.library, time, 4, prepare)]


def _their_stem(step: p.Stem, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        weights = _folded(packed, context, step.weight, step.scale, step.shift)
        return library.stem(step, *weights, context.normalisation, (size[1], size[2]))

    before_pooling = 4 * step.output.bytes(*size, context.dtype)
    return [_theirs(context.library, cost.passes(8 * before_pooling, context.gpu, 6), 6, prepare)]


def _their_gate(step: p.AttentionGate, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> library.LibraryRun:
        tensors = (step.weight, step.scale, step.shift)
        weight, scale, shift = packed.get("gate", lambda: context.vectors(*tensors))
        return library.attention_gate(weight, scale, shift)

    moved = p.step_bytes(step, context.dtype, *size)
    return [_theirs("torch", cost.passes(2 * moved, context.gpu, 5), 5, prepare)]


def _their_upsample_add(step: p.UpsampleAdd, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    moved = p.step_bytes(step, context.dtype, *size)
    return [_theirs("torch", cost.passes(2 * moved, context.gpu, 4), 4, lambda: library.upsample_add)]


def _their_max_pool(step: p.MaxPool, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    moved = p.step_bytes(step, context.dtype, *size)
    return [_theirs("torch", cost.passes(moved, context.gpu), 1, lambda: library.max_pool)]


_OURS: dict[type[p.Step], Callable[..., Found]] = {
    p.Stem: _ours_stem,
    p.Conv: _ours_conv,
    p.SharedBlockStep: _ours_shared_block,
    p.DeconvAdd: _ours_deconv,
    p.AttentionGate: _ours_gate,
    p.UpsampleAdd: _ours_upsample_add,
    **quantized.OURS,
}
_THEIRS: dict[type[p.Step], Callable[..., list[Algorithm]]] = {
    p.Stem: _their_stem,
    p.Conv: _their_conv,
    p.SharedBlockStep: _their_shared_block,
    p.DeconvAdd: _their_deconv,
    p.AttentionGate: _their_gate,
    p.UpsampleAdd: _their_upsample_add,
    p.MaxPool: _their_max_pool,
    **quantized.THEIRS,
}
