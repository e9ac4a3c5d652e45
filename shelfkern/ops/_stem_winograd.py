"""Weights of a 7x7 convolution of stride 2 for the native stem by Winograd's minimal filtering."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from ._conv_winograd import evaluations
from .conv_bn_act import PANEL

# As in csrc/cpu/stem_winograd.cpp: evaluation points of the polynomials, besides infinity, and taps in each
# dimension of the stride-1 convolution over quads of pixels.
POINTS = tuple(Fraction(point) for point in ("0", "1", "-1", "2", "-2", "1/2"))
TAPS = 4
# With fewer channels, transforming the image takes as long as the products: the gain is not worth the
# precision.
LEAST_CHANNELS = 32


@dataclasses.dataclass(frozen=True)
class PackedStemWinograd:
    """Transformed weights of a stem.

    Attributes:
        data: float32 (panels, 7 * 7, 12, 16): panels of 16 output channels, zero-padded beyond the last; rows
            and columns of frequencies; the colours of a quad's first row of two pixels, then of its second.
    """

    data: Tensor


def can_pay(w: Tensor) -> bool:
    """Whether weights (K, 3, 7, 7) have enough channels for this to be faster than the direct kernel."""
    return w.shape[0] >= LEAST_CHANNELS


def weight_transform() -> Tensor:
    """G for tiles of 4 outputs, float64 (7, 4)."""
    return evaluations(POINTS, TAPS)


def quad_kernels(w: Tensor) -> Tensor:
    """Stride-2 kernels (K, 3, 7, 7) as stride-1 kernels over quads, (K, 12, 4, 4).

    Output y reads pixel rows 2 y - 3 to 2 y + 3, in quad rows y - 2 to y + 1: only the second pixel row of
    the first of these.
    """
    taps = F.pad(w, (1, 0, 1, 0)).unflatten(3, (TAPS, 2)).unflatten(2, (TAPS, 2))
    return taps.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def pack_stem_winograd(w: Tensor) -> PackedStemWinograd:
    """Transforms weights (K, 3, 7, 7): G w Gt in float64, rounded once."""
    g = weight_transform()
    kernels = quad_kernels(w.detach().cpu().double())
    panels = -(-len(kernels) // PANEL)
    kernels = F.pad(kernels, (0, 0, 0, 0, 0, 0, 0, panels * PANEL - len(kernels)))
    values = torch.einsum("ir,pkcrs,js->pijck", g, kernels.unflatten(0, (panels, PANEL)), g)
    data = native.empty((panels, g.shape[0] ** 2, kernels.shape[1], PANEL), torch.float32, pooled=False)
    data.copy_(values.flatten(1, 2))
    return PackedStemWinograd(data)
