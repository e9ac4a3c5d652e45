"""The native backend: a plan's steps as shelfkern's C++ kernels, writing into the arena."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native, ops
from ..normalisation import Normalisation
from ..ops._conv_winograd import can_pay, conv_winograd_native, pack_winograd, pays
from ..ops.stem import normalised_values
from . import plan as p
from .kernel import Kernel

Run = Callable[[Sequence[Tensor], Tensor], Tensor]
Optional = Tensor | None
# x, scale, shift, residual, skip, out, slope.
Convolve = Callable[[Tensor, Optional, Optional, Optional, Optional, Tensor, float | None], None]


def reason(op: str) -> str | None:
    """Why the native kernel of an op cannot run here, None if it can."""
    return native.reason(op)


def can_prepare(step: p.Step) -> str | None:
    """Why a step has no native kernel here, None if it has."""
    if type(step) not in _PREPARE:
        return f"{step.op} has no native kernel"
    if isinstance(step, p.Conv) and not step.inputs:
        return "a convolution of the image without pooling has no native kernel"
    return reason(step.op)


def prepare(step: p.Step, dtype: torch.dtype, normalisation: Normalisation) -> Kernel:
    """The kernel of a step for which `can_prepare` gives None."""
    return Kernel(_PREPARE[type(step)](step, normalisation), in_arena=True)


def algorithm(step: p.Step, n: int, h: int, w: int) -> str:
    """What runs a step for n images padded to h x w."""
    if isinstance(step, (p.Conv, p.SharedBlockStep)):
        stride, padding = (step.stride, step.padding) if isinstance(step, p.Conv) else (1, 1)
        fewer = can_pay(step.weight, stride, padding) and pays(step.inputs[0].shape(n, h, w))
        return "native winograd 4x4" if fewer else "native direct"
    return "native"


def _stem(step: p.Stem, normalisation: Normalisation) -> Run:
    packed = ops.pack_conv(step.weight, stride=2, padding=3)
    mean, std = torch.tensor([normalisation.mean, normalisation.std], dtype=torch.float64)
    values = normalised_values(mean, std)

    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        image = inputs[0] if inputs[0].dtype is torch.uint8 else inputs[0].float()
        ops.stem_native(image.contiguous(), packed, step.scale, step.shift, values, out, step.act.slope)
        return out

    return run


def _convolution(weight: Tensor, stride: int, padding: int) -> Convolve:
    """`conv_bn_act_native` of these weights, or where an input's size pays for it `conv_winograd_native`."""
    transformed = pack_winograd(weight) if can_pay(weight, stride, padding) else None
    # Beside transformed weights, which are four times as many, these are packed only if a size needs them.
    direct = functools.cache(lambda: ops.pack_conv(weight, stride, padding))
    if transformed is None:
        direct()

    def run(
        x: Tensor,
        scale: Optional,
        shift: Optional,
        residual: Optional,
        skip: Optional,
        out: Tensor,
        slope: float | None,
    ) -> None:
        if transformed is not None and pays(x.shape):
            conv_winograd_native(x, transformed, scale, shift, residual, skip, out, slope)
        else:
            ops.conv_bn_act_native(x, direct(), scale, shift, residual, skip, out, slope)

    return run


def _conv(step: p.Conv, normalisation: Normalisation) -> Run:
    convolve = _convolution(step.weight, step.stride, step.padding)

    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        residual = inputs[1] if step.residual else None
        skip = inputs[-1] if step.skip else None
        convolve(inputs[0], step.scale, step.shift, residual, skip, out, step.act.slope)
        return out

    return run


def _shared_block(step: p.SharedBlockStep, normalisation: Normalisation) -> Run:
    convolve = _convolution(step.weight, 1, 1)

    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        x, hidden = inputs
        convolve(x, step.scale1, step.shift1, None, None, hidden, step.act.slope)
        convolve(hidden, step.scale2, step.shift2, x, x if step.skip else None, out, 0.0)
        return out

    return run


def _attention_gate(step: p.AttentionGate, normalisation: Normalisation) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        ops.attention_gate_native(inputs[0], step.weight, step.scale, step.shift, out)
        return out

    return run


def _upsample_add(step: p.UpsampleAdd, normalisation: Normalisation) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        x, skip, gate = inputs
        ops.upsample_add_native(x, skip, gate, out)
        return out

    return run


def _deconv_add(step: p.DeconvAdd, normalisation: Normalisation) -> Run:
    packed = ops.pack_deconv(step.weight)

    def run(inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        ops.deconv_add_native(inputs[0], packed, step.bias, inputs[1], out)
        return out

    return run


_PREPARE: dict[type[p.Step], Callable[..., Run]] = {
    p.Stem: _stem,
    p.Conv: _conv,
    p.SharedBlockStep: _shared_block,
    p.AttentionGate: _attention_gate,
    p.UpsampleAdd: _upsample_add,
    p.DeconvAdd: _deconv_add,
}
