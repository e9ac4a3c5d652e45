"""Errors of Winograd's F(m x m, 3 x 3) in float32, simulated: why the engine's tiles are 4 x 4.

The transforms are those of Cook and Toom for given points and infinity, made with exact fractions, their rows
scaled by powers of two. Inputs are rectified normal numbers, weights normal ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from rich.console import Console
from rich.table import Table

KERNEL = 3
# As csrc/cpu/winograd_filters.h has them.
OURS = (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2))
CANDIDATES = tuple(Fraction(eighths, 8) for eighths in (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16))

Points = Sequence[Fraction]


def with_opposites(points: Iterable[Fraction]) -> tuple[Fraction, ...]:
    """0, and each point with both signs."""
    return (Fraction(0), *itertools.chain.from_iterable((point, -point) for point in points))


def transforms(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T (m, n), G (n, 3) and B^T (n, n) of n - 1 finite points and infinity: y = A^T ((G g) * (B^T d))."""
    n = len(points) + 1
    m = n - KERNEL + 1
    output = [[point**power for point in points] + [int(power == m - 1)] for power in range(m)]
    filters, inputs = [], []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        scale = np.prod([point - other for other in others])
        filters.append([point**power / scale for power in range(KERNEL)])
        inputs.append([*_polynomial(others), 0])
    filters.append([int(power == KERNEL - 1) for power in range(KERNEL)])
    inputs.append(_polynomial(points))
    return _balanced(*(np.array(matrix, float) for matrix in (output, filters, inputs)))


def _polynomial(roots: Points) -> list[Fraction]:
    """Coefficients of the product of (x - root), the lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        found = [low - root * high for low, high in zip([0, *found], [*found, 0], strict=True)]
    return found


def _balanced(
    output: np.ndarray, filters: np.ndarray, inputs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same algorithm with rows of filters and inputs near a norm of 1: powers of two round nothing."""
    of_filters, of_inputs = (
        2.0 ** np.round(np.log2(np.linalg.norm(rows, axis=1))) for rows in (filters, inputs)
    )
    return output * of_filters * of_inputs, filters / of_filters[:, None], inputs / of_inputs[:, None]


def convolved(points: Points, data: np.ndarray, weights: np.ndarray, dtype: type) -> np.ndarray:
    """Tiles (count, K, m, m) of inputs (count, C, n, n) and weights (K, C, 3, 3), computed in a dtype.

    Weights are transformed in float64 and then rounded, as the engine does it.
    """
    output, filters, inputs = transforms(points)
    kernels = (filters @ weights @ filters.T).astype(dtype)
    output, inputs = output.astype(dtype), inputs.astype(dtype)
    tiles = inputs @ data.astype(dtype) @ inputs.T
    sums = np.zeros((len(data), len(weights), *tiles.shape[2:]), dtype)
    for channel in range(tiles.shape[1]):
        sums += tiles[:, None, channel] * kernels[None, :, channel]
    return output @ sums @ output.T


def error(points: Points, count: int = 200, channels: int = 64, kernels: int = 16) -> float:
    """Root mean square of the error in float32, over that of the exact results."""
    rng, n = np.random.default_rng(0), len(points) + 1
    data = np.maximum(rng.standard_normal((count, channels, n, n)), 0).astype(np.float32)
    weights = rng.standard_normal((kernels, channels, KERNEL, KERNEL)).astype(np.float32)
    exact = convolved(points, data.astype(np.float64), weights.astype(np.float64), np.float64)
    found = convolved(points, data, weights.astype(np.float64), np.float32)
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


def best_of_6x6() -> tuple[Fraction, ...]:
    """The points of F(6x6, 3x3) with the least error: 0 and three candidates with both signs."""
    choices = map(with_opposites, itertools.combinations(CANDIDATES, 3))
    return min(choices, key=lambda points: error(points, count=40, channels=32, kernels=8))


def main() -> None:
    """Prints a table of algorithms, their products and errors."""
    table = Table("algorithm", "points, and infinity", "multiplications of the direct one", "error")
    ours = error(OURS)
    for points in (
        with_opposites([Fraction(1)]),
        with_opposites([Fraction(1), Fraction(2)]),
        OURS,
        best_of_6x6(),
    ):
        n = len(points) + 1
        m = n - KERNEL + 1
        share = n * n / (m * m * KERNEL * KERNEL)
        named = ", ".join(str(point) for point in points)
        table.add_row(f"F({m}x{m}, 3x3)", named, f"{share:.2f}", f"{error(points) / ours:.2f}")
    Console(width=110).print(table)
    print("Errors are relative to F(4x4, 3x3) with the engine's points.")


if __name__ == "__main__":
    main()
