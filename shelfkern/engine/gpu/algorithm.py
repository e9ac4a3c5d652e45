"""What one way to run a step is, and what those of all kinds of steps share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...normalisation import Normalisation
from ...ops import _backends as backends
from ...ops import _conv_triton as conv
from .. import plan as p
from ..problem import Size
from .device import Gpu

# inputs (the images, where a step has none), outputs in the arena, scratch memory, and whether it may
# start before the step ahead of it has ended; gives a result of its own, or None.
Run = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, bool], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way to run a step at one size.

    Attributes:
        name: its family, and what tells it from others of that: "triton 64x64x128 w4 s4 split 2". cuDNN's
            fused calls are a family beside its plain ones, for they can be many times slower.
        microseconds: what it should take on an H200.
        launches: of kernels.
        prepare: packs the weights, once for all algorithms that read them alike; gives what runs.
        in_arena: whether it writes into the arena; otherwise the result is a tensor of the library's.
        scratch: bytes of memory it works in.
    """

    name: str
    microseconds: float
    launches: int
    prepare: Callable[[], Run]
    in_arena: bool = True
    scratch: int = 0

    @property
    def family(self) -> str:
        """Whose kernel it is."""
        return self.name.partition(" ")[0]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a program's steps have in common.

    Attributes:
        gpu: for which algorithms are chosen.
        device: where tensors live: the CPU where kernels are emulated.
        dtype: of activations.
        precision: of float32 products, "tf32" or "ieee".
        normalisation: of raw images.
        ours, theirs: whether our kernels and the library's calls may run.
    """

    gpu: Gpu
    device: torch.device
    dtype: torch.dtype
    precision: str
    normalisation: Normalisation
    ours: bool = True
    theirs: bool = True

    @property
    def cuda(self) -> str:
        """The backend of CUDA C++ kernels."""
        return "cuda" if self.device.type == "cuda" else "emulated"

    @property
    def library(self) -> str:
        """Whose calls the library's are."""
        return "cudnn" if self.device.type == "cuda" else "torch"

    def vector(self, t: Tensor) -> Tensor:
        """A parameter as kernels read it."""
        return t.to(self.device, torch.float32).contiguous()

    def vectors(self, *tensors: Tensor) -> list[Tensor]:
        """Parameters as kernels read them."""
        return [self.vector(t) for t in tensors]

    def unavailable(self, op: str, backend: str) -> str | None:
        """Why a kernel of ours cannot run, None if it can."""
        if not self.ours:
            return "backend is 'library'"
        return backends.unavailable(op, backend)


# Algorithms of a step, and why others are not among them.
Found = tuple[list[Algorithm], list[str]]


def problem_of(step: p.Conv | p.SharedBlockStep | p.DeconvAdd, size: Size, context: Context) -> conv.Problem:
    """A step's convolution as a matrix product; of a transposed one each parity's."""
    x = step.inputs[0]
    n, _, h, w = x.shape(*size) if isinstance(step, p.DeconvAdd) else step.output.shape(*size)
    taps = math.prod(step.weight.shape[2:])
    aligned = x.channels % 16 == 0 and step.output.channels % 16 == 0
    return conv.Problem(n * h * w, step.output.channels, taps, x.channels, x.dtype(context.dtype), aligned)


def configurations(problem: conv.Problem, context: Context) -> list[conv.Config]:
    """Configurations of a convolution that make sense on the GPU."""
    gpu = context.gpu
    return conv.configurations(problem, context.precision, gpu.multiprocessors, gpu.shared_bytes)


def name_of(config: conv.Config) -> str:
    """A configuration's name: tile, bytes of a step, warps, stages."""
    name = f"triton {config.block_m}x{config.block_n}x{config.block_bytes} w{config.warps} s{config.stages}"
    return name + f" split {config.split}" * (config.split > 1) + " swap" * config.swap


def arena_bytes(value: p.Value, size: Size, context: Context) -> int:
    """Bytes of an activation, up to where the next may begin."""
    return -(-value.bytes(*size, context.dtype) // 256) * 256


def norms(step: p.SharedBlockStep) -> tuple[Tensor, ...]:
    """Scale and shift of both convolutions."""
    return step.scale1, step.shift1, step.scale2, step.shift2
