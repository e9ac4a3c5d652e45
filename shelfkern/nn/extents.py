"""From the height and width of images to those that the backbone sees."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

# Of the backbone's coarsest features: it sees multiples of it.
STRIDE = 32


@dataclasses.dataclass(frozen=True)
class Extents:
    """Images are padded with zeros at the bottom and right, then enlarged.

    Attributes:
        scale: how many times they are enlarged.
    """

    scale: Fraction = Fraction(1)

    @property
    def enlarges(self) -> bool:
        """Whether the backbone sees more than what images are padded to."""
        return self.scale != 1

    @property
    def multiple(self) -> int:
        """What images are padded to multiples of: the least of which `scale` makes multiples of 32."""
        parts = STRIDE * self.scale.denominator
        return parts // math.gcd(parts, self.scale.numerator)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """What images are padded to; scores are resized to it and cropped."""
        rows, columns = self._counts(height, width)
        return self.multiple * rows, self.multiple * columns

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """What the backbone sees."""
        rows, columns = self._counts(height, width)
        enlarged = int(self.multiple * self.scale)
        return enlarged * rows, enlarged * columns

    def given(self, height: int, width: int) -> tuple[int, int]:
        """The padded images that the backbone sees so."""
        return int(height / self.scale), int(width / self.scale)

    def _counts(self, height: int, width: int) -> tuple[int, int]:
        unit = self.multiple
        # Never skipped, so that torch.export sees one program with simple sizes.
        return (height + unit - 1) // unit, (width + unit - 1) // unit
