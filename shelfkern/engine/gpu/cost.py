"""A cost model: predicted times of steps on an H200, in microseconds, to rank the ways to run them.

Peak rates are those of ops/_conv_triton.py (4.3 TB/s, 790 TFLOP/s, 1.3 us per launch inside a graph). The
predictions decide where nothing was measured, and measurements can be compared with them.
"""

from __future__ import annotations

import torch

from ...ops import _conv_triton as conv
from ...ops.shared_block import CUDA_TILE_ROWS, CUDA_TILE_WIDTH
from .device import Gpu

LAUNCH = conv.LAUNCH_US
# Activations that the previous layer has just written are still in L2, if they fit into half of it.
L2_BYTES_A_US = 8e6
# mma.sync reaches about 0.6 of the rate of wgmma; CUDA cores 67 TFLOP/s in total.
MMA_MACS_A_US = 0.6 * conv.MACS_A_US
FLOAT32_MACS_A_US = 67e6 / 2 / 132
# Start and end of a program, exposed once per wave.
PROGRAM = 1.0
# Fraction of a copy's bandwidth that a kernel with arithmetic reaches.
PASS_FRACTION_OF_COPY = 0.8


def moving(nbytes: float, gpu: Gpu) -> float:
    """Time to read and write `nbytes` bytes in total."""
    rate = L2_BYTES_A_US if nbytes < gpu.l2_bytes / 2 else conv.BYTES_A_US
    return nbytes / (rate * PASS_FRACTION_OF_COPY)


def passes(nbytes: float, gpu: Gpu, launches: int = 1) -> float:
    """Time of kernels that only move data."""
    return launches * LAUNCH + moving(nbytes, gpu)


def triton_conv(problem: conv.Problem, config: conv.Config, gpu: Gpu) -> float:
    """Time of one of our convolutions."""
    return LAUNCH + conv.microseconds(problem, config, gpu.multiprocessors)


def library_conv(problem: conv.Problem, precision: str, gpu: Gpu) -> float:
    """Time of a library's convolution: that of our best tile without a split sum."""
    configs = conv.configurations(problem, precision, gpu.multiprocessors, gpu.shared_bytes)
    return min(triton_conv(problem, config, gpu) for config in configs if config.split == 1)


def cuda_shared_block(shape: tuple[int, ...], rows: int, gpu: Gpu) -> float:
    """Time of the fused block: waves of tiles, whose halos are computed twice."""
    n, c, h, w = shape
    padded = 64 if c <= 64 else 128
    tiles = n * -(-h // rows) * -(-w // CUDA_TILE_WIDTH)
    units = CUDA_TILE_ROWS[padded][rows]
    tile = units * 64 * 9 * padded * padded / MMA_MACS_A_US
    return LAUNCH + -(-tiles // gpu.multiprocessors) * (tile + PROGRAM)


def product(macs: float, gpu: Gpu, dtype: torch.dtype) -> float:
    """Time of arithmetic that fills the GPU, with mma.sync; float32 on CUDA cores."""
    rate = gpu.multiprocessors * (MMA_MACS_A_US if dtype.itemsize == 2 else FLOAT32_MACS_A_US)
    return macs / rate
