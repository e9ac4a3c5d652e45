"""3x3 convolutions of stride 1 and padding 1 by Winograd's minimal filtering, on the CPU.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). F(m x m, 3 x 3) makes
m x m outputs from the m + 2 x m + 2 inputs under them by (m + 2)^2 products for each pair of channels,
where a direct convolution takes 9 m^2: 2.25 times fewer for m = 2, 4 times fewer for m = 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _common as common
from .conv_bn_act import PANEL

# Where polynomials are evaluated, beside infinity; as csrc/cpu/winograd.h. The usual 1 and 2 in place of
# 5/8 and 3/2 make twice the error.
POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}

# With fewer the transforms take a good part of the time, and what is gained is not worth the digits.
LEAST_CHANNELS = 32


@dataclasses.dataclass(frozen=True)
class PackedWinograd:
    """Weights of a 3x3 convolution, transformed for the native kernel.

    Attributes:
        data: float32 (panels, (tile + 2)^2, in_channels, 16): panels of 16 output channels, zeros beyond the
            last; the rows of the transformed kernels, then their columns.
        out_channels, in_channels: of the convolution.
        tile: m of F(m x m, 3 x 3): 2 or 4.
    """

    data: Tensor
    out_channels: int
    in_channels: int
    tile: int


def weight_transform(tile: int) -> Tensor:
    """G, float64 (tile + 2, 3): powers of each point, over the product of its distances to the others.

    Raises:
        ValueError: tile is neither 2 nor 4.
    """
    if tile not in POINTS:
        raise ValueError(f"conv_winograd: tile is {tile}, it may be 2 or 4")
    points = POINTS[tile]
    rows = []
    for point in points:
        distances = Fraction(1)
        for other in points:
            distances *= point - other if other != point else 1
        rows.append([float(point**power / distances) for power in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack_winograd(w: Tensor, tile: int = 4) -> PackedWinograd:
    """Transforms weights (K, C, 3, 3) for the native kernel: G w Gt in float64, rounded once.

    Raises:
        ValueError: w is not (K, C, 3, 3), or tile is neither 2 nor 4.
    """
    if w.ndim != 4 or w.shape[2:] != (3, 3):
        raise ValueError(f"conv_winograd: w is {tuple(w.shape)}, it must be (K, C, 3, 3)")
    k, c = w.shape[:2]
    g = weight_transform(tile)
    transform = torch.kron(g, g)
    panels = -(-k // PANEL)
    data = torch.empty(panels, (tile + 2) ** 2, c, PANEL, dtype=torch.float32, device="cpu")
    # A panel at a time: all of a large layer in float64 would be eight times the result's size.
    for panel, kernels in enumerate(w.detach().cpu().split(PANEL)):
        transformed = transform @ kernels.double().flatten(2).permute(2, 1, 0).flatten(1)
        data[panel] = F.pad(transformed.unflatten(1, (c, -1)), (0, PANEL - len(kernels)))
    return PackedWinograd(data, k, c, tile)


def can_pay(w: Tensor, stride: int, padding: int) -> bool:
    """Whether F(4x4, 3x3) of these weights is faster than a direct convolution on inputs of some size."""
    return tuple(w.shape[2:]) == (3, 3) and stride == padding == 1 and min(w.shape[:2]) >= LEAST_CHANNELS


def pays(shape: Sequence[int]) -> bool:
    """Whether it is faster on inputs of this shape, (N, C, H, W).

    A tile takes the time of 5 to 6 pixels convolved directly, however few of its 16 pixels are within the
    image, and reading the weights of 512 channels that of 27.
    """
    n, _, h, w = shape
    tiles = n * -(-h // 4) * -(-w // 4)
    return n * h * w >= max(8 * tiles, 32)


def conv_winograd_native(
    x: Tensor,
    packed: PackedWinograd,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    out: Tensor,
    slope: float | None,
) -> None:
    """act(scale * conv(x, w) + shift + residual) + skip into `out`, unchecked, as `conv_bn_act_native`.

    Arithmetic is float32. Against float64, as root mean squares, the error of F(4x4) is at most 4.5 times
    that of eager torch's direct convolution in float32, 7 times with one channel; that of F(2x2) 1.7 and
    2.2 times.

    What is not finite in x spoils the outputs of every tile whose window holds it, tiles being tile x tile
    pixels counted from the top left, and windows a pixel larger on all sides; nothing beyond. An infinity
    may become NaN.

    Args:
        x: (N, C, H, W) in NHWC storage, float32 or bfloat16.
        scale, shift: float32 (K,), or None.
        residual, skip, out: (N, K, H, W) of x's dtype, with one stride of channels, 1, and the same other
            strides; they need not be dense.
        slope: of the activation: 0 relu, up to 1 leaky relu, None nothing.
    """
    n, c, h, w = x.shape
    _, k, out_h, out_w = out.shape
    stride_n, _, stride_h, stride_w = out.stride()
    native.module.winograd(
        x.data_ptr(),
        packed.data.data_ptr(),
        native.address(scale),
        native.address(shift),
        native.address(residual),
        native.address(skip),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c, out_h, out_w, k,
        packed.tile,
        stride_n, stride_h, stride_w,
        common.native_slope(slope),
        torch.get_num_threads(),
    )  # fmt: skip
