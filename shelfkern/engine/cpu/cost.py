"""A cost model: what a step should take on one core, in microseconds, to order the ways to run it.

Rates were measured on a Zen 4 with AVX-512 at 3.7 GHz, layer by layer in ShelfNet18-lw and ShelfNet50. Only
their ratios matter, and they do not depend on the number of threads: without tuning the choice is the same
for any number, and so are the bits of the results.
"""

from __future__ import annotations

import math

import torch

from ...native import has_product
from ...ops._conv_winograd import pays
from .. import plan as p
from ..problem import Size

# Of a call through Python and one parallel loop; torch's dispatcher takes longer.
CALL, LIBRARY_CALL = 3.0, 10.0
# Of direct convolutions, ours and oneDNN's in float32: nine tenths of the peak.
MACS_A_US = 50e3
# Of oneDNN's with products of bfloat16, and of ours with instructions for the products; of int16 on a Zen 3,
# to the rate of float32 there.
BFLOAT16_MACS_A_US = 90e3
DOT_MACS_A_US = {torch.bfloat16: 100e3, torch.int8: 170e3, torch.int16: 75e3}
# Of a stem by Winograd's filtering, of those that a direct one would do.
STEM_WINOGRAD_MACS_A_US = 110e3
# Of kernels that only move data; memory that the library takes anew costs page faults.
BYTES_A_US, FRESH_BYTES_A_US = 10e3, 4e3
# Outputs, of a transposed convolution inputs, convolved directly in the time of one Winograd tile, by the
# stride, the tile and what is multiplied.
TILE_PIXELS = {
    (1, 2, torch.float32): 2.6,
    (1, 4, torch.float32): 5.5,
    (2, 4, torch.float32): 11.5,
    (1, 4, torch.int16): 3.5,
    (2, 4, torch.int16): 7,
}
# The same of what is done once a call, whatever the tiles: reading and transforming the weights.
WEIGHT_PIXELS = 27


def direct(step: p.Step, size: Size, products: torch.dtype = torch.float32) -> float:
    """One of our direct kernels, by what it multiplies."""
    rate = DOT_MACS_A_US[products] if products in DOT_MACS_A_US and has_product(products) else MACS_A_US
    return CALL + p.step_macs(step, *size) / rate


def winograd(
    step: p.Conv | p.SharedBlockStep | p.DeconvAdd,
    size: Size,
    tile: int,
    product: torch.dtype = torch.float32,
) -> float:
    """Our Winograd kernels: below a direct one in float32 exactly where `pays` says that the digits pay.

    Direct products of bfloat16 are faster, and may be below both.
    """
    transposed = isinstance(step, p.DeconvAdd)
    stride = 2 if transposed else step.stride if isinstance(step, p.Conv) else 1
    shape = (step.inputs[0] if transposed else step.output).shape(*size)
    n, _, h, w = shape
    tiles = n * -(-h // tile) * -(-w // tile)
    pixels = TILE_PIXELS[stride, tile, product] * tiles + WEIGHT_PIXELS
    time = CALL + pixels / max(1, n * h * w) * p.step_macs(step, *size) / MACS_A_US
    limit = direct(step, size)
    return min(time, 0.99 * limit) if pays(shape, stride, transposed) else max(time, 1.01 * limit)


def stem_winograd(step: p.Stem, size: Size) -> float:
    """Our stem by Winograd's filtering, in float32 whatever it reads and writes."""
    return CALL + p.step_macs(step, *size) / STEM_WINOGRAD_MACS_A_US


def moving(step: p.Step, size: Size, activation_bytes: int) -> float:
    """One of our kernels that only move data."""
    return CALL + _moved(step, size, activation_bytes) / BYTES_A_US


def onednn(step: p.Step, size: Size, activation_bytes: int, calls: int = 1, passes: int = 0) -> float:
    """The library's convolutions, and passes over the result."""
    rate = BFLOAT16_MACS_A_US if activation_bytes == 2 else MACS_A_US
    written = math.prod(step.output.shape(*size)) * activation_bytes
    moved = calls * written / FRESH_BYTES_A_US + passes * 2 * written / BYTES_A_US
    return (calls + passes) * LIBRARY_CALL + p.step_macs(step, *size) / rate + moved


def library_passes(step: p.Step, size: Size, passes: int) -> float:
    """Calls of torch's that each read and write all of it, in float32."""
    return passes * (LIBRARY_CALL + _moved(step, size, 4) / FRESH_BYTES_A_US)


def _moved(step: p.Step, size: Size, activation_bytes: int) -> int:
    return sum(math.prod(v.shape(*size)) for v in (*step.inputs, *step.outputs)) * activation_bytes
