"""Heights and widths: of images, padded, and as the backbone sees them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from shelfkern.nn.extents import Extents

SCALES = sorted({Fraction(a, b) for b in range(1, 9) for a in range(b, 4 * b + 1)})


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_every_scale_meets_the_stride_with_the_least_padding(scale: Fraction) -> None:
    extents = Extents(scale)
    fits = [extent for extent in range(1, 257) if (extent * scale) % 32 == 0]
    assert extents.multiple == fits[0]
    assert extents.enlarges == (scale != 1)
    for size in range(1, 400, 7):
        padded, _ = extents.padded(size, 32)
        assert size <= padded < size + extents.multiple
        assert padded % extents.multiple == 0
        assert extents.seen(size, 32)[0] == padded * scale


def test_rows_and_columns_are_not_confused() -> None:
    extents = Extents(Fraction(8, 5))
    assert extents.padded(360, 481) == (360, 500)
    assert extents.seen(360, 481) == (576, 800)
