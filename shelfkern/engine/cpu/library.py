"""The library's ways to run a step: PyTorch's calls, batch norms folded into weights.

Convolutions go to oneDNN with their epilogues where this torch has those (private) calls, and to
the public ones otherwise. Results live in tensors of torch's own, outside the arena.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from ...nn.extents import Extents
from ...normalisation import Normalisation
from .. import plan as p
from ..image import seen_image, statistics

# Rows of full-size scores that the argmax makes at a time.
STRIP_ROWS = 16

Shape = tuple[int, ...]
# inputs (the images, where a step has none); gives the result.
LibraryRun = Callable[[Sequence[Tensor]], Tensor]


@functools.cache
def onednn_reason() -> str | None:
    """Why convolutions with fused epilogues cannot go to oneDNN, None if they can."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    for name in ("_convolution_pointwise", "_reorder_convolution_weight"):
        if not hasattr(torch.ops.mkldnn, name):
            return f"this torch has no mkldnn::{name}"
    try:
        x, weight, bias = (torch.ones(shape, device="cpu") for shape in ((1, 8, 4, 4), (8, 8, 1, 1), (8,)))
        x = x.contiguous(memory_format=torch.channels_last)
        result = _FusedConv(weight, bias, 1, p.Activation(0.0), tuple(x.shape))(x, x)
    except (RuntimeError, TypeError) as error:
        return f"mkldnn::_convolution_pointwise failed: {str(error).splitlines()[0]}"
    return None if bool((result == 10).all()) else "mkldnn::_convolution_pointwise gave a wrong result"


class _FusedConv:
    """act(conv(x) + bias + residual) in one oneDNN primitive; relu after it, for oneDNN's makes 0 of NaN.

    In float32 the pass of relu takes 0 to 3 % of the time of 3x3 convolutions, 1 to 10 % of 1x1.

    Weights are laid out for x of `shape`. For another oneDNN may want another layout, and makes it anew at
    each call, which takes up to forty times as long as the convolution.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, act: p.Activation, shape: Shape
    ) -> None:
        self.geometry = ([weight.shape[2] // 2] * 2, [stride] * 2, [1, 1], 1)
        # Without images there is nothing to lay out for.
        layout = [max(1, shape[0]), *shape[1:]]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = reorder(weight.contiguous(), *self.geometry, layout)
        self.bias = bias
        self.slope = act.slope

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            attr, scalars = ("leaky_relu", [self.slope]) if self.slope else ("none", [])
            out = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, attr, scalars, ""
            )
            return out if self.slope else _activate_(out, self.slope)
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, self.weight, self.bias, *self.geometry, "add", 1.0, None, [], None
        )
        return _activate_(out, self.slope)


class _PlainConv:
    """act(conv(x) + bias + residual) with public calls."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, act: p.Activation, shape: Shape
    ) -> None:
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


def bfloat16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 with instructions for it."""
    found = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(found()) and onednn_reason() is None


Convolve = _FusedConv | _PlainConv


def make_conv(
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    act: p.Activation,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
) -> Convolve:
    """act(scale * conv(x) + shift + residual), the scale folded in, for x of `shape` and `dtype`."""
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    kind = _PlainConv if onednn_reason() else _FusedConv
    return kind(weight.to(dtype), None if shift is None else shift.to(dtype), stride, act, shape)


def conv(
    step: p.Conv, convolve: Convolve, extents: Extents, dtype: torch.dtype, normalisation: Normalisation
) -> LibraryRun:
    """A convolution with its epilogue; of images as `extents` has them, where it reads them."""
    colours = statistics(normalisation)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        x, *others = inputs
        if not step.inputs:
            x = seen_image(x, extents, *colours).to(dtype)
        out = convolve(x, others[0] if step.residual else None)
        return out.add_(others[-1]) if step.skip else out

    return run


def stem(
    convolve: Convolve, extents: Extents, dtype: torch.dtype, normalisation: Normalisation
) -> LibraryRun:
    """Normalisation, convolution with its activation, and pooling."""
    colours = statistics(normalisation)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        return F.max_pool2d(convolve(seen_image(inputs[0], extents, *colours).to(dtype)), 3, 2, 1)

    return run


def shared_block(step: p.SharedBlockStep, first: Convolve, second: Convolve) -> LibraryRun:
    """Two convolutions of `folded_block`: two copies of the weights, but no pass over what they write."""

    def run(inputs: Sequence[Tensor]) -> Tensor:
        (x,) = inputs
        out = second(first(x), x)
        return out.add_(x) if step.skip else out

    return run


def deconv_add(weight: Tensor, bias: Tensor) -> LibraryRun:
    """A transposed convolution, and the skip in place."""
    return lambda inputs: F.conv_transpose2d(inputs[0], weight, bias, 2, 1, 1).add_(inputs[1])


def attention_gate(step: p.AttentionGate) -> LibraryRun:
    """The reference's calls."""
    parameters = step.weight, step.scale, step.shift
    return lambda inputs: ops.attention_gate(inputs[0], *parameters, backend="reference")


def upsample_add(inputs: Sequence[Tensor]) -> Tensor:
    """The reference's calls."""
    return ops.upsample_add(*inputs, backend="reference")


def max_pool(inputs: Sequence[Tensor]) -> Tensor:
    """3x3 maximum, stride 2."""
    return F.max_pool2d(inputs[0], 3, 2, 1)


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
