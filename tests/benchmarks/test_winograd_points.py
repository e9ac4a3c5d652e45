"""The simulation that the choice of Winograd's tiles and points rests on."""

from fractions import Fraction

import numpy as np
import pytest
import winograd_points as wp

USUAL = wp.with_opposites([Fraction(1), Fraction(2)])
OF_6X6 = wp.with_opposites([Fraction(1, 2), Fraction(1), Fraction(2)])


@pytest.mark.parametrize("points", [wp.with_opposites([Fraction(1)]), USUAL, wp.OURS, OF_6X6])
def test_transforms_convolve(points):
    n = len(points) + 1
    rng = np.random.default_rng(1)
    data, weights = rng.standard_normal((5, 3, n, n)), rng.standard_normal((2, 3, 3, 3))
    windows = np.lib.stride_tricks.sliding_window_view(data, (3, 3), (2, 3))
    direct = np.einsum("tcyxij,kcij->tkyx", windows, weights)
    np.testing.assert_allclose(wp.convolved(points, data, weights, np.float64), direct, atol=1e-10)


def test_the_engines_points_halve_the_error_and_larger_tiles_multiply_it():
    ours = wp.error(wp.OURS)
    assert 1.8 < wp.error(USUAL) / ours < 3
    assert wp.error(OF_6X6) / ours > 3.5
