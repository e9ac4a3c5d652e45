"""The arithmetic that chosen algorithms really do, which may be less than a direct convolution's."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from cases import Size

from shelfkern.engine.plan import DeconvAdd, Plan, Stem, Step, step_macs

WINOGRAD = re.compile(r"\bwinograd (\d+)x\1\b")


def step_flop(step: Step, algorithm: str, batch: int, size: Size) -> int:
    """FLOP of one step for images padded to a size, by an algorithm of this name.

    Of minimal filtering, named "winograd mxm", the products. Its transforms are left out: they grow with
    channels, not with their product.
    """
    direct = 2 * step_macs(step, batch, *size)
    found = WINOGRAD.search(algorithm)
    if found is None:
        return direct
    extent, products, taps = _tile(step, int(found[1]))
    n, _, height, width = step.output.shape(batch, *size)
    tiles = n * math.ceil(height / extent) * math.ceil(width / extent)
    return int(direct * tiles * products / (taps * n * height * width)) if direct else 0


def _tile(step: Step, tile: int) -> tuple[int, int, Fraction]:
    """Outputs of a tile along each side, products for it, and for each output of a direct convolution.

    Of stride 2, and transposed, one side takes m products of the middle tap and m + 1 of the two others; of
    transposed ones m counts inputs, of which there are half as many as outputs. Of a stem it is 4 taps of 12
    colours, of 2 x 2 pixels, on each side, and an output is pooled of 2 x 2 new ones.
    """
    if isinstance(step, Stem):
        return tile // 2, 12 * (tile + 3) ** 2, Fraction(4 * 3 * 7 * 7)
    if isinstance(step, DeconvAdd):
        return 2 * tile, (2 * tile + 1) ** 2, Fraction(9, 4)
    if getattr(step, "stride", 1) == 2:
        return tile, (2 * tile + 1) ** 2, Fraction(9)
    return tile, (tile + 2) ** 2, Fraction(9)


def plan_flop(plan: Plan, batch: int, size: Size) -> int:
    """FLOP of all steps by the algorithms chosen for this size; direct ones where none is bound."""
    names = plan.algorithms(batch, *size) if plan.algorithms else [""] * len(plan.steps)
    return sum(step_flop(step, name, batch, size) for step, name in zip(plan.steps, names, strict=True))
