"""The description of one way to run a step, and helpers shared by the algorithms of all steps."""

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

# inputs (the images, for a step without any), outputs in the arena, scratch memory, and whether the kernel
# may start before the previous step has ended; returns a result outside the arena, or None.
Run = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, bool], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way to run a step at one size.

    Attributes:
        name: its family, then its parameters: "triton 64x64x128 w4 s4 split 2". cuDNN's fused calls are a
            family separate from its plain ones, because they can be many times slower.
        microseconds: predicted time on an H200.
        launches: number of kernel launches.
        prepare: packs the weights, once for all algorithms with the same layout; returns a `Run`.
        in_arena: whether it writes into the arena; otherwise the library allocates the result.
        scratch: bytes of scratch memory.
    """

    name: str
    microseconds: float
    launches: int
    prepare: Callable[[], Run]
    in_arena: bool = True
    scratch: int = 0

    @property
    def family(self) -> str:
        """The library or language of the kernel."""
        return self.name.partition(" ")[0]


@dataclasses.dataclass(frozen=True)
class Context:
    """Settings shared by a program's steps.

    Attributes:
        gpu: GPU for which algorithms are chosen.
        device: device of the tensors: the CPU where kernels are emulated.
        dtype: dtype of activations.
        precision: precision of float32 products, "tf32" or "ieee".
        normalisation: normalisation of raw images.
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
        """Backend of the CUDA C++ kernels."""
        return "cuda" if self.device.type == "cuda" else "emulated"

    @property
    def library(self) -> str:
        """Name of the library."""
        return "cudnn" if self.device.type == "cuda" else "torch"

    def vector(self, t: Tensor) -> Tensor:
        """A parameter as a tensor that kernels can read."""
        return t.to(self.device, torch.float32).contiguous()

    def vectors(self, *tensors: Tensor) -> list[Tensor]:
        """Parameters as tensors that kernels can read."""
        return [self.vector(t) for t in tensors]

    def unavailable(self, op: str, backend: str) -> str | None:
        """Reason why one of our kernels cannot run, None if it can."""
        if not self.ours:
            return "backend is 'library'"
        return backends.unavailable(op, backend)


# Algorithms of a step, and the reasons why others cannot run.
Found = tuple[list[Algorithm], list[str]]


def problem_of(step: p.Conv | p.SharedBlockStep | p.DeconvAdd, size: Size, context: Context) -> conv.Problem:
    """A step's convolution as a matrix product; for a transposed one, that of each parity."""
    x = step.inputs[0]
    n, _, h, w = x.shape(*size) if isinstance(step, p.DeconvAdd) else step.output.shape(*size)
    taps = math.prod(step.weight.shape[2:])
    aligned = x.channels % 16 == 0 and step.output.channels % 16 == 0
    return conv.Problem(n * h * w, step.output.channels, taps, x.channels, x.dtype(context.dtype), aligned)


def configurations(problem: conv.Problem, context: Context) -> list[conv.Config]:
    """The configurations of a convolution that make sense on the GPU."""
    gpu = context.gpu
    return conv.configurations(problem, context.precision, gpu.multiprocessors, gpu.shared_bytes)


def name_of(config: conv.Config) -> str:
    """A configuration's name: tile, bytes per step, warps, stages."""
    name = f"triton {config.block_m}x{config.block_n}x{config.block_bytes} w{config.warps} s{config.stages}"
    return name + f" split {config.split}" * (config.split > 1) + " swap" * config.swap


def arena_bytes(value: p.Value, size: Size, context: Context) -> int:
    """Size of an activation in bytes, including the padding before the next one."""
    return -(-value.bytes(*size, context.dtype) // 256) * 256


def norms(step: p.SharedBlockStep) -> tuple[Tensor, ...]:
    """Scale and shift of both convolutions."""
    return step.scale1, step.shift1, step.scale2, step.shift2
