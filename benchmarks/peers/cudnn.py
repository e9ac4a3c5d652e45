"""The network as cuDNN calls in a CUDA graph: batch norms folded, epilogues fused where that is faster."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import library
import torch
from measure import record
from torch import Tensor
from torch.nn import functional as F

from shelfkern.engine import plan as p
from shelfkern.engine.lower import lower
from shelfkern.nn import ShelfNet

from . import Peer, Run
from .network import Network, channels_last

Call = Callable[..., Tensor]
# Takes several implementations and returns the index of the fastest.
Choose = Callable[[Sequence[Callable[[], object]]], int]
# Calls in the graph that is timed, and its replays.
CALLS, REPLAYS = 10, 3


@dataclasses.dataclass(frozen=True)
class CudnnGraph:
    """A whole forward pass in one graph, which reads its images in place."""

    key: str = "cudnn"
    name: str = "cuDNN graph"
    ours: bool = False
    seconds: float = 60

    def why_not(self) -> str | None:
        """It needs torch's bindings of cuDNN's fused convolutions."""
        if not hasattr(torch, "cudnn_convolution_add_relu"):
            return "this torch has no torch.cudnn_convolution_add_relu"
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        forward = Forward(model, dtype, images.device, labels, fastest)
        images = channels_last(images)
        found: list[Tensor] = []

        def run() -> None:
            found[:] = [forward(images)]

        graph = record(run)
        (out,) = found

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Forward:
    """A model's plan in torch calls, from images to scores or labels.

    Args:
        choose: chooses between cuDNN's fused and plain calls, at each layer's first input.
    """

    def __init__(
        self, model: ShelfNet, dtype: torch.dtype, device: torch.device, labels: bool, choose: Choose
    ) -> None:
        self._plan = lower(model)
        self._normalise = Network(model, dtype, labels).to(device).normalise
        self._align, self._labels = model.align_corners, labels
        make = functools.partial(_call, dtype=dtype, device=device, choose=choose)
        self._calls = [make(step) for step in self._plan.steps]
        uses = self._plan.last_uses()
        self._dead = [
            [value for value in set(step.inputs) if uses[value] == index]
            for index, step in enumerate(self._plan.steps)
        ]

    def __call__(self, images: Tensor) -> Tensor:
        x = self._normalise(images)
        height, width = x.shape[2:]
        extents = self._plan.extents
        full = extents.padded(height, width)
        x = F.pad(x, (0, full[1] - width, 0, full[0] - height))
        if extents.enlarges:
            x = F.interpolate(x, extents.seen(height, width), mode="bilinear")
        values: dict[p.Value, Tensor] = {}
        for step, call, dead in zip(self._plan.steps, self._calls, self._dead, strict=True):
            values[step.output] = call(*([values[value] for value in step.inputs] or [x]))
            for value in dead:
                del values[value]
        scores = F.interpolate(values[self._plan.scores], full, mode="bilinear", align_corners=self._align)[
            :, :, :height, :width
        ]
        return scores.argmax(1).to(torch.uint8) if self._labels else scores


def _call(step: p.Step, dtype: torch.dtype, device: torch.device, choose: Choose) -> Call:
    def conv(
        weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, slope: float | None
    ) -> Conv:
        if scale is not None:
            weight = weight * scale[:, None, None, None]
        weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        return Conv(weight, None if shift is None else shift.to(device, dtype), stride, slope, choose)

    if isinstance(step, p.Stem):
        first = conv(step.weight, step.scale, step.shift, 2, step.act.slope)
        return lambda x: F.max_pool2d(first(x), 3, 2, 1)
    if isinstance(step, p.Conv):
        return _with_skip(conv(step.weight, step.scale, step.shift, step.stride, step.act.slope), step)
    if isinstance(step, p.SharedBlockStep):
        one = conv(step.weight, step.scale1, step.shift1, 1, step.act.slope)
        two = conv(step.weight, step.scale2, step.shift2, 1, 0.0)
        return lambda x: two(one(x), x) + x if step.skip else two(one(x), x)
    if isinstance(step, p.AttentionGate):
        weight = (step.weight * step.scale[:, None]).to(device, dtype)
        shift = step.shift.to(device, dtype)
        return lambda x: torch.sigmoid(F.linear(x.mean((2, 3)), weight, shift))
    if isinstance(step, p.UpsampleAdd):
        return lambda x, skip, gate: torch.addcmul(
            skip, F.interpolate(x, scale_factor=2.0, mode="nearest"), gate[:, :, None, None]
        )
    if isinstance(step, p.DeconvAdd):
        weight = step.weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        bias = step.bias.to(device, dtype)
        return lambda x, skip: F.conv_transpose2d(x, weight, bias, 2, 1, 1).add_(skip)
    if isinstance(step, p.MaxPool):
        return lambda x: F.max_pool2d(x, 3, 2, 1)
    raise TypeError(f"step is a {type(step).__name__}, which has no call of cuDNN")


def _with_skip(conv: Conv, step: p.Conv) -> Call:
    def call(x: Tensor, *others: Tensor) -> Tensor:
        out = conv(x, others[0] if step.residual else None)
        return out.add_(others[-1]) if step.skip else out

    return call


class Conv:
    """act(conv(x) + bias + residual), padded by half the kernel, by the faster of cuDNN's two ways.

    slope: slope of the activation: 0 relu, None no activation.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, slope: float | None, choose: Choose
    ) -> None:
        self._plain = library.cudnn(weight, bias, stride, slope)
        self._fused = library.cudnn_fused(weight, bias, stride, slope)
        # cuDNN fuses relu only.
        self._fuses = slope == 0 and bias is not None
        self._choose = choose
        self._chosen: Call | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self._chosen is None:
            ways = [self._plain, self._fused] if self._fuses and x.is_cuda else [self._plain]
            bound = [functools.partial(way, x, residual) for way in ways]
            self._chosen = ways[self._choose(bound)] if len(ways) > 1 else ways[0]
        return self._chosen(x, residual)


def fastest(ways: Sequence[Callable[[], object]]) -> int:
    """The index of the fastest way, each timed in a graph of several calls; ways that fail are left out."""

    def seconds(number: int) -> float:
        try:
            return _seconds(ways[number])
        except RuntimeError:
            return math.inf

    return min(range(len(ways)), key=seconds)


def _seconds(way: Callable[[], object]) -> float:
    def calls() -> None:
        for _ in range(CALLS):
            way()

    graph = record(calls)
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return min(found)


def on_gpu() -> list[Peer]:
    """The peer on a GPU."""
    return [CudnnGraph()]
