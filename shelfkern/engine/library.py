"""The library backend: a plan's steps as PyTorch calls.

Convolutions go to oneDNN with their epilogues where this torch has those (private) calls, and to
the public ones otherwise. Results live in tensors of torch's own, outside the arena.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..normalisation import Normalisation
from . import plan as p
from .image import prepare_image, statistics
from .kernel import Kernel

# Rows of full-size scores that the argmax makes at a time.
STRIP_ROWS = 16

Run = Callable[[Sequence[Tensor], tuple[int, ...]], Tensor]


@functools.cache
def onednn_reason() -> str | None:
    """Why convolutions with fused epilogues cannot go to oneDNN, None if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for name in ("_convolution_pointwise", "_reorder_convolution_weight"):
        if not hasattr(torch.ops.mkldnn, name):
            return f"this torch has no mkldnn::{name}"
    try:
        x = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        weight = torch.ones(8, 8, 1, 1)
        result = _FusedConv(weight, torch.ones(8), 1, p.Activation(0.0))(x, x)
    except (RuntimeError, TypeError) as error:
        return f"mkldnn::_convolution_pointwise failed: {str(error).splitlines()[0]}"
    return None if bool((result == 10).all()) else "mkldnn::_convolution_pointwise gave a wrong result"


class _FusedConv:
    """act(conv(x) + bias + residual) in one oneDNN primitive."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, act: p.Activation) -> None:
        self.geometry = ([weight.shape[2] // 2] * 2, [stride] * 2, [1, 1], 1)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *self.geometry)
        self.bias = bias
        self.slope = act.slope

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        attr, scalars = self._attribute()
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, attr, scalars, ""
            )
        # Only relu is taken after a sum.
        unary = "relu" if self.slope == 0 else None
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self.weight, self.bias, *self.geometry, "add", 1.0, unary, [], None
        )
        return out if unary or self.slope is None else F.leaky_relu_(out, self.slope)

    def _attribute(self) -> tuple[str, list[float]]:
        if self.slope is None:
            return "none", []
        return ("leaky_relu", [self.slope]) if self.slope else ("relu", [])


class _PlainConv:
    """act(conv(x) + bias + residual) with public calls."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int, act: p.Activation) -> None:
        self.weight, self.bias, self.stride, self.slope = weight, bias, stride, act.slope

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.weight.shape[2] // 2)
        if residual is not None:
            out += residual
        return _activate_(out, self.slope)


def _activate_(x: Tensor, slope: float | None) -> Tensor:
    if slope is None:
        return x
    return F.leaky_relu_(x, slope) if slope else x.relu_()


def make_conv(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, act: p.Activation
) -> _FusedConv | _PlainConv:
    """act(scale * conv(x) + shift + residual), the scale folded into the weights."""
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    kind = _PlainConv if onednn_reason() else _FusedConv
    return kind(weight, shift, stride, act)


def prepare(step: p.Step, dtype: torch.dtype, normalisation: Normalisation) -> Kernel:
    """The kernel of one step, computing in float32 and giving `dtype`."""
    run = _PREPARE[type(step)](step, normalisation)
    if dtype is torch.float32:
        return Kernel(run, in_arena=False)

    def run_in_float32(inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        # Few CPUs have 16-bit products, and torch's 16-bit convolutions without them are very slow.
        widened = [x.float() if x.is_floating_point() else x for x in inputs]
        out = run(widened, shape)
        return out if step.output.stride is None else out.to(dtype)

    return Kernel(run_in_float32, in_arena=False)


def _stem(step: p.Stem, normalisation: Normalisation) -> Run:
    conv = make_conv(step.weight, step.scale, step.shift, 2, step.act)
    colours = statistics(normalisation)

    def run(inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        image = prepare_image(inputs[0], shape[2] * 4, shape[3] * 4, *colours)
        return F.max_pool2d(conv(image), 3, 2, 1)

    return run


def _conv(step: p.Conv, normalisation: Normalisation) -> Run:
    conv = make_conv(step.weight, step.scale, step.shift, step.stride, step.act)
    colours = statistics(normalisation)

    def run(inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        x, *others = inputs
        if not step.inputs:
            x = prepare_image(x, shape[2] * step.stride, shape[3] * step.stride, *colours)
        out = conv(x, others[0] if step.residual else None)
        return out.add_(others[-1]) if step.skip else out

    return run


def _shared_block(step: p.SharedBlockStep, normalisation: Normalisation) -> Run:
    # One copy of the weights for both convolutions: the scales cannot be folded into it.
    conv = make_conv(step.weight, None, None, 1, p.Activation(None))
    scale1, shift1, scale2, shift2 = (
        t[:, None, None] for t in (step.scale1, step.shift1, step.scale2, step.shift2)
    )

    def run(inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        (x,) = inputs
        h = _activate_(conv(x).mul_(scale1).add_(shift1), step.act.slope)
        out = conv(h).mul_(scale2).add_(shift2).add_(x).relu_()
        return out.add_(x) if step.skip else out

    return run


def _attention_gate(step: p.AttentionGate, normalisation: Normalisation) -> Run:
    return lambda inputs, shape: ops.attention_gate(
        inputs[0], step.weight, step.scale, step.shift, backend="reference"
    )


def _upsample_add(step: p.UpsampleAdd, normalisation: Normalisation) -> Run:
    return lambda inputs, shape: ops.upsample_add(*inputs, backend="reference")


def _deconv_add(step: p.DeconvAdd, normalisation: Normalisation) -> Run:
    def run(inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        x, skip = inputs
        return F.conv_transpose2d(x, step.weight, step.bias, 2, 1, 1).add_(skip)

    return run


def _max_pool(step: p.MaxPool, normalisation: Normalisation) -> Run:
    return lambda inputs, shape: F.max_pool2d(inputs[0], 3, 2, 1)


_PREPARE: dict[type[p.Step], Callable[..., Run]] = {
    p.Stem: _stem,
    p.Conv: _conv,
    p.SharedBlockStep: _shared_block,
    p.AttentionGate: _attention_gate,
    p.UpsampleAdd: _upsample_add,
    p.DeconvAdd: _deconv_add,
    p.MaxPool: _max_pool,
}


def upsample_argmax_native(scores: Tensor, full: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """Labels of the bilinear resize of scores (N, C, h, w) to `full`, cropped to out (N, H, W).

    A strip of rows at a time: full-size scores are never made.
    """
    top, bottom, fraction = _taps(scores.shape[2], full[0], align_corners)
    left, right, across = _taps(scores.shape[3], full[1], align_corners)
    columns = slice(0, out.shape[2])
    left, right, across = left[columns], right[columns], across[columns]
    scores = scores.float()
    for start in range(0, out.shape[1], STRIP_ROWS):
        rows = slice(start, min(start + STRIP_ROWS, out.shape[1]))
        strip = torch.lerp(scores[:, :, top[rows]], scores[:, :, bottom[rows]], fraction[rows, None])
        strip = torch.lerp(strip[..., left], strip[..., right], across)
        out[:, rows] = strip.argmax(1)


def _taps(extent: int, full: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For each resized position, the two source positions and the weight of the second."""
    positions = torch.arange(full, dtype=torch.float32)
    if align_corners:
        source = positions * ((extent - 1) / (full - 1) if full > 1 else 0.0)
    else:
        source = ((positions + 0.5) * (extent / full) - 0.5).clamp_(min=0)
    first = source.long().clamp_(max=extent - 1)
    return first, (first + 1).clamp_(max=extent - 1), source - first
