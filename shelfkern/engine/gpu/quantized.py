"""The ways to run quantized steps: our Triton kernels, and torch's calls on dequantized values.

`OURS` and `THEIRS` have the form of those in `algorithms.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ops import _conv_triton as conv
from ...ops.conv_bn_act import conv_bn_act_triton
from ...ops.quantize import quantize_reference, quantize_triton, quantize_weight
from ...ops.shared_block import shared_block_triton
from .. import plan as p
from ..arena import like
from ..problem import Packed, Size
from . import algorithm as base
from . import cost, library


@dataclasses.dataclass(frozen=True)
class Weights:
    """Filters as the kernels multiply them.

    Attributes:
        data: (K, taps, C): 8-bit values, or where x is floating the activations' dtype.
        step: (K,) float32, quantization step of each output channel; 1 for floating filters.
    """

    data: Tensor
    step: Tensor

    def scale(self, norm: Tensor | None, x_step: float) -> Tensor:
        """The norm's scale times the steps of weights and x, (K,) float32."""
        steps = self.step * x_step
        return steps if norm is None else norm * steps

    def filters(self, kernel: Sequence[int]) -> Tensor:
        """(K, C, kernel_h, kernel_w) float32 in channels_last storage; quantized values are not scaled."""
        return self.data.float().unflatten(1, tuple(kernel)).permute(0, 3, 1, 2)


def _weights(weight: Tensor, context: base.Context, codes: torch.dtype | None) -> Weights:
    weight = weight.to(context.device)
    if codes is None:
        ones = torch.ones(weight.shape[0], device=context.device)
        return Weights(conv.pack_weight(weight, context.dtype), ones)
    return Weights(*quantize_weight(weight, codes))


def unfit(kind: torch.dtype | None, context: base.Context) -> str | None:
    """Reason why the GPU cannot multiply an 8-bit dtype, None if it can."""
    needed = conv.CODE_CAPABILITIES.get(kind, (0, 0)) if kind is not None else (0, 0)
    if context.gpu.capability >= needed:
        return None
    has = "{}.{}".format(*context.gpu.capability)
    return f"{context.gpu.name} has compute capability {has}, codes of {kind} need {needed[0]}.{needed[1]}"


def _ours_conv(step: p.QuantizedConv, size: Size, context: base.Context, packed: Packed) -> base.Found:
    x = step.inputs[0]
    why = context.unavailable("conv_bn_act", "triton") or unfit(x.codes, context)
    if why is not None:
        return [], [why]
    problem = base.problem_of(step, size, context)
    kernel = (step.weight.shape[2], step.weight.shape[3])

    def algorithm(config: conv.Config) -> base.Algorithm:
        def prepare() -> base.Run:
            weights = packed.get("weights", lambda: _weights(step.weight, context, x.codes))
            scale, shift = packed.get("norm", lambda: _norm(step, weights, context))

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                residual, skip = library.others(step, inputs)
                out, codes = step.written(outputs)
                conv_bn_act_triton(
                    inputs[0], weights.data, scale, shift, residual, skip, out, kernel, step.stride,
                    step.padding, step.act.slope, config, context.precision, overlap,
                    parts=scratch, codes=codes, codes_step=step.codes_step,
                )  # fmt: skip

            return run

        time = cost.triton_conv(problem, config, context.gpu)
        scratch = conv.scratch_bytes(config, problem.pixels, problem.channels)
        return base.Algorithm(base.name_of(config), time, 1 + (config.split > 1), prepare, scratch=scratch)

    return [algorithm(config) for config in base.configurations(problem, context)], []


def _norm(step: p.QuantizedConv, weights: Weights, context: base.Context) -> tuple[Tensor, Tensor | None]:
    """Scale, including the quantization steps, and shift."""
    scale, shift = (None if t is None else context.vector(t) for t in (step.scale, step.shift))
    return weights.scale(scale, step.x_step if step.inputs[0].codes else 1.0), shift


def _ours_block(step: p.QuantizedBlock, size: Size, context: base.Context, packed: Packed) -> base.Found:
    kind = step.inputs[0].codes
    why = context.unavailable("shared_block", "triton") or unfit(kind, context)
    if why is not None:
        return [], [why]
    problem = base.problem_of(step, size, context)
    hidden_bytes = base.arena_bytes(step.hidden, size, context)

    def algorithm(config: conv.Config) -> base.Algorithm:
        def prepare() -> base.Run:
            weights = packed.get("weights", lambda: _weights(step.weight, context, kind))
            scale1, shift1, scale2, shift2 = packed.get("norms", lambda: _norms(step, weights, context))

            def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
                x, floating = inputs
                out, codes = step.written(outputs)
                hidden = like(x, scratch)
                shared_block_triton(
                    x, weights.data, scale1, shift1, scale2, shift2, hidden, out, step.act.slope, step.skip,
                    config, context.precision, overlap, scratch[hidden_bytes:], floating, codes,
                    step.codes_step, step.hidden_step,
                )  # fmt: skip

            return run

        time = 2 * cost.triton_conv(problem, config, context.gpu)
        scratch = hidden_bytes + conv.scratch_bytes(config, problem.pixels, problem.channels)
        return base.Algorithm(
            base.name_of(config), time, 2 + 2 * (config.split > 1), prepare, scratch=scratch
        )

    return [algorithm(config) for config in base.configurations(problem, context)], []


def _norms(step: p.QuantizedBlock, weights: Weights, context: base.Context) -> list[Tensor]:
    """Scale and shift of both convolutions, with the quantization steps included in the scales."""
    scale1, shift1, scale2, shift2 = context.vectors(*base.norms(step))
    return [weights.scale(scale1, step.x_step), shift1, weights.scale(scale2, step.hidden_step), shift2]


def _ours_quantize(step: p.Quantize, size: Size, context: base.Context, packed: Packed) -> base.Found:
    why = context.unavailable("quantize", "triton") or unfit(step.output.codes, context)
    if why is not None:
        return [], [why]

    def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
        quantize_triton(inputs[0], step.codes_step, outputs[0], overlap)

    time = cost.passes(p.step_bytes(step, context.dtype, *size), context.gpu)
    return [base.Algorithm("triton", time, 1, lambda: run)], []


def _their_conv(
    step: p.QuantizedConv, size: Size, context: base.Context, packed: Packed
) -> list[base.Algorithm]:
    def prepare() -> base.Run:
        kernel = step.weight.shape[2:]
        weights = packed.get("weights", lambda: _weights(step.weight, context, step.inputs[0].codes))
        filters = packed.get("filters", lambda: weights.filters(kernel))
        norm = packed.get("norm", lambda: _norm(step, weights, context))

        def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
            residual, skip = library.others(step, inputs)
            found = _affine(F.conv2d(inputs[0].float(), filters, None, step.stride, step.padding), *norm)
            _write(step, library.finish_(found, step.act.slope, residual, skip), outputs)

        return run

    return [base.Algorithm("torch", _their_time(step, size, context), 8, prepare)]


def _their_block(
    step: p.QuantizedBlock, size: Size, context: base.Context, packed: Packed
) -> list[base.Algorithm]:
    def prepare() -> base.Run:
        kind = step.inputs[0].codes
        assert kind is not None
        weights = packed.get("weights", lambda: _weights(step.weight, context, kind))
        filters = packed.get("filters", lambda: weights.filters((3, 3)))
        scale1, shift1, scale2, shift2 = packed.get("norms", lambda: _norms(step, weights, context))

        def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
            x, floating = inputs
            h = _affine(F.conv2d(x.float(), filters, padding=1), scale1, shift1)
            hidden = quantize_reference(library.finish_(h, step.act.slope), step.hidden_step, kind)
            found = _affine(F.conv2d(hidden.float(), filters, padding=1), scale2, shift2)
            found = library.finish_(found, 0.0, floating, floating if step.skip else None)
            _write(step, found, outputs)

        return run

    return [base.Algorithm("torch", 2 * _their_time(step, size, context), 18, prepare)]


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """scale * x + shift, in place."""
    x *= scale[:, None, None]
    if shift is not None:
        x += shift[:, None, None]
    return x


def _write(step: p.QuantizedConv | p.QuantizedBlock, result: Tensor, outputs: Sequence[Tensor]) -> None:
    out, codes = step.written(outputs)
    if out is not None:
        out.copy_(result)
    if codes is not None:
        codes.copy_(quantize_reference(result, step.codes_step, codes.dtype))


def _their_time(step: p.QuantizedConv | p.QuantizedBlock, size: Size, context: base.Context) -> float:
    """Time of a convolution in float32, and of passes over memory before and after it."""
    problem = dataclasses.replace(base.problem_of(step, size, context), dtype=torch.float32)
    wide = 2 * step.output.bytes(*size, torch.float32)
    return cost.library_conv(problem, "tf32", context.gpu) + cost.passes(7 * wide, context.gpu, 7)


def _their_quantize(
    step: p.Quantize, size: Size, context: base.Context, packed: Packed
) -> list[base.Algorithm]:
    kind = step.output.codes
    assert kind is not None

    def run(inputs: Any, outputs: Any, scratch: Any, overlap: bool) -> None:
        outputs[0].copy_(quantize_reference(inputs[0], step.codes_step, kind))

    time = cost.passes(4 * p.step_bytes(step, context.dtype, *size), context.gpu, 6)
    return [base.Algorithm("torch", time, 6, lambda: run)]


OURS: dict[type[p.Step], Callable[..., Any]] = {
    p.QuantizedConv: _ours_conv,
    p.QuantizedBlock: _ours_block,
    p.Quantize: _ours_quantize,
}
THEIRS: dict[type[p.Step], Callable[..., Any]] = {
    p.QuantizedConv: _their_conv,
    p.QuantizedBlock: _their_block,
    p.Quantize: _their_quantize,
}
