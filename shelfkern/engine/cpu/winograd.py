"""Winograd's ways to convolve on a CPU: which may pay, what they are called, and their filters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import native, ops
from ...ops import _stem_winograd
from ...ops._conv_winograd import PackedWinograd, as_winograd, can_pay, keeps_transformed, pack_winograd
from .. import plan as p
from ..problem import Packed, Size
from . import cost
from .algorithm import Algorithm, Run


def direct_filters(
    weight: Tensor, stride: int, padding: int, packed: Packed, dtype: torch.dtype = torch.float32
) -> ops.PackedConv:
    """Of a direct convolution; Winograd's kernels read them too, where they transform them."""
    form = "direct" if dtype is torch.float32 else f"direct {dtype}"
    return packed.get(form, lambda: ops.pack_conv(weight, stride, padding, dtype=dtype))


class Winograd(NamedTuple):
    """A way to convolve with few products: the outputs of a tile, and what is multiplied."""

    tile: int
    product: torch.dtype

    def __str__(self) -> str:
        """The name of its algorithm."""
        kind = " int16" if self.product is torch.int16 else ""
        return f"native winograd {self.tile}x{self.tile}{kind}"

    def keeps_transformed(self, weight: Tensor) -> bool:
        """Whether weights are transformed once, not at each call."""
        return keeps_transformed(weight, self.tile, self.product)

    def filters(
        self, weight: Tensor, stride: int, packed: Packed, transposed: bool = False
    ) -> PackedWinograd:
        """Those of floats; weight is (K, C, 3, 3), if transposed (C, K, 3, 3)."""
        if self.keeps_transformed(weight):
            parameters = self.tile, stride, transposed, self.product
            return packed.get(str(self), lambda: pack_winograd(weight, *parameters))
        dtype = torch.bfloat16 if self.product is torch.int16 else torch.float32
        if transposed:
            kernels = weight.transpose(0, 1)
            taps = packed.get(f"taps {dtype}", lambda: ops.pack_conv(kernels, padding=1, dtype=dtype))
        else:
            taps = direct_filters(weight, stride, 1, packed, dtype)
        return packed.get(f"{self} of taps", lambda: as_winograd(taps, self.tile, stride, transposed, weight))


def winograds(weight: Tensor, stride: int, padding: int, dtype: torch.dtype) -> list[Winograd]:
    """Those that may pay for such weights and activations of a dtype, of codes uint8.

    stride and padding are of a transposed convolution too.
    """
    if not can_pay(weight, stride, padding):
        return []
    whole = [Winograd(4, torch.int16)] if native.has_product(torch.int16) else []
    if dtype is torch.uint8:
        # Of stride 2, and transposed, fewer products of 16 bits take longer than all of 8 bits.
        return whole if stride == 1 or not native.has_product(torch.int8) else []
    floating = [Winograd(tile, torch.float32) for tile in ((4, 2) if stride == 1 else (4,))]
    return [*floating, *whole] if dtype is torch.bfloat16 else floating


def stems(
    step: p.Stem, size: Size, product: torch.dtype, direct: Callable[[], Run], winograd: Callable[[], Run]
) -> list[Algorithm]:
    """Our ways to run a stem: directly, by products of `product`, and by Winograd's where that can pay."""
    found = [Algorithm("native direct", cost.direct(step, size, product), direct)]
    if _stem_winograd.can_pay(step.weight):
        found.append(Algorithm("native winograd 4x4", cost.stem_winograd(step, size), winograd))
    return found
