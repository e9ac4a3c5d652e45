"""Padding and enlargement: from the height and width of images to those of the backbone's input."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

# Stride of the backbone's coarsest features: its input's height and width are multiples of it.
STRIDE = 32


@dataclasses.dataclass(frozen=True)
class Extents:
    """Sizes of images, which are padded with zeros at the bottom and right, then enlarged.

    Attributes:
        scale: factor by which padded images are enlarged.
    """

    scale: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        # Now, for torch.compile of torch 2.11 traces integers but no fractions.
        _ = self.multiple, self._enlarged

    @property
    def enlarges(self) -> bool:
        """Whether padded images are enlarged."""
        return self._enlarged != self.multiple

    @functools.cached_property
    def multiple(self) -> int:
        """Images are padded to multiples of this: the smallest that `scale` turns into multiples of 32."""
        parts = STRIDE * self.scale.denominator
        return parts // math.gcd(parts, self.scale.numerator)

    @functools.cached_property
    def _enlarged(self) -> int:
        return int(self.multiple * self.scale)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of padded images; scores are resized to them, then cropped."""
        rows, columns = self._counts(height, width)
        return self.multiple * rows, self.multiple * columns

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the backbone's input, for images of this size."""
        rows, columns = self._counts(height, width)
        return self._enlarged * rows, self._enlarged * columns

    def given(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the padded images for a backbone input of this size."""
        return int(height / self.scale), int(width / self.scale)

    def _counts(self, height: int, width: int) -> tuple[int, int]:
        unit = self.multiple
        # Without a branch for exact multiples, so that torch.export traces one program for all sizes.
        return (height + unit - 1) // unit, (width + unit - 1) // unit
