"""FLOP that the chosen algorithms actually perform, which may be fewer than a direct convolution's."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from cases import Size

from shelfkern.engine.plan import DeconvAdd, Plan, Stem, Step, step_macs

WINOGRAD = re.compile(r"\bwinograd (\d+)x\1\b")


def step_flop(step: Step, algorithm: str, batch: int, size: Size) -> int:
    """FLOP of one step for images padded to a size, by an algorithm of this name.

    For minimal filtering, named "winograd mxm", only the products. Its transforms are left out: they are
    proportional to the channels, not to the product of input and output channels.
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
    """Outputs per tile side, products per tile, and products per output of a direct convolution.

    For stride 2, and transposed, one side takes m products for the middle tap and m + 1 for the two others;
    if transposed, m counts inputs, half as many as outputs. A stem has 4 taps per side and 12 colours, of 2 x
    2 pixels, and each pooled output needs 2 x 2 new convolution outputs.
    """
    if isinstance(step, Stem):
        return tile // 2, 12 * (tile + 3) ** 2, Fraction(4 * 3 * 7 * 7)
    if isinstance(step, DeconvAdd):
        return 2 * tile, (2 * tile + 1) ** 2, Fraction(9, 4)
    if getattr(step, "stride", 1) == 2:
        return tile, (2 * tile + 1) ** 2, Fraction(9)
    return tile, (tile + 2) ** 2, Fraction(9)


def plan_flop(plan: Plan, batch: int, size: Size) -> int:
    """FLOP of all steps with the algorithms chosen for this size; direct convolutions if none is bound."""
    names = plan.algorithms(batch, *size) if plan.algorithms else [""] * len(plan.steps)
    return sum(step_flop(step, name, batch, size) for step, name in zip(plan.steps, names, strict=True))
