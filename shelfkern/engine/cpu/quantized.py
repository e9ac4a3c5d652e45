"""Steps on codes of 8 bits on a CPU, by our kernels. `OURS` has the form of that in `algorithms.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import ops
from ...ops.conv_bn_act import PackedConv
from ...ops.quantize import quantize_native, quantize_weight
from .. import plan as p
from ..arena import like, value_bytes
from ..problem import Packed, Size
from . import cost
from .algorithm import Algorithm, Context, Run, no_scratch


@dataclasses.dataclass(frozen=True)
class Weights:
    """Filters as they are multiplied.

    Attributes:
        filters: of codes where x is, otherwise of float32.
        step: (K,) float32, what one step of each channel's codes is times what one of x's is; 1 of floats.
    """

    filters: PackedConv
    step: Tensor

    def scale(self, norm: Tensor | None) -> Tensor:
        """The norm's scale times the steps, (K,) float32."""
        return self.step if norm is None else norm * self.step


def _weights(weight: Tensor, stride: int, padding: int, x_step: float | None) -> Weights:
    """x_step: what one step of x's codes is; None where x is floating."""
    if x_step is None:
        return Weights(ops.pack_conv(weight, stride, padding), torch.ones(weight.shape[0]))
    codes, steps = quantize_weight(weight, torch.int8)
    filters = codes.unflatten(1, weight.shape[2:]).permute(0, 3, 1, 2)
    return Weights(ops.pack_conv(filters, stride, padding, dtype=torch.int8), steps * x_step)


def _conv(step: p.QuantizedConv, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    coded = step.inputs[0].codes is not None

    def prepare() -> Run:
        x_step = step.x_step if coded else None
        weights = packed.get("direct", lambda: _weights(step.weight, step.stride, step.padding, x_step))
        scale = weights.scale(step.scale)

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scratch: Tensor) -> None:
            residual = inputs[1] if step.residual else None
            skip = inputs[-1] if step.skip else None
            out, codes = step.written(outputs)
            ops.conv_bn_act_native(
                inputs[0], weights.filters, scale, step.shift, residual, skip, out, step.act.slope,
                codes, step.codes_step,
            )  # fmt: skip

        return run

    return [Algorithm("native direct", cost.direct(step, size, _products(coded)), prepare)]


def _block(step: p.QuantizedBlock, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def prepare() -> Run:
        weights = packed.get("direct", lambda: _weights(step.weight, 1, 1, 1.0))
        scale1 = weights.scale(step.scale1 * step.x_step)
        scale2 = weights.scale(step.scale2 * step.hidden_step)

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scratch: Tensor) -> None:
            x, floating = inputs
            hidden, skip = like(x, scratch), floating if step.skip else None
            out, codes = step.written(outputs)
            convolve, filters = ops.conv_bn_act_native, weights.filters
            # Between the convolutions there are only codes.
            convolve(
                x, filters, scale1, step.shift1, None, None, None, step.act.slope, hidden, step.hidden_step
            )
            convolve(
                hidden, filters, scale2, step.shift2, floating, skip, out, 0.0, codes, step.codes_step
            )  # fmt: skip

        return run

    time = cost.direct(step, size, torch.int8)
    scratch = value_bytes(step.hidden, *size, context.dtype)
    return [Algorithm("native direct", time, prepare, scratch=scratch)]


def _quantize(step: p.Quantize, size: Size, context: Context, packed: Packed) -> list[Algorithm]:
    def run(inputs: Sequence[Tensor], out: Tensor) -> None:
        quantize_native(inputs[0], step.codes_step, out)

    time = cost.moving(step, size, context.dtype.itemsize)
    return [Algorithm("native", time, lambda: no_scratch(run))]


def _products(coded: bool) -> torch.dtype:
    return torch.int8 if coded else torch.float32


OURS: dict[type[p.Step], Callable[..., list[Algorithm]]] = {
    p.QuantizedConv: _conv,
    p.QuantizedBlock: _block,
    p.Quantize: _quantize,
}
