"""Learning rate over a run."""

from __future__ import annotations


def poly_with_warmup(step: int, total: int, base: float, warmup: int, power: float = 0.9) -> float:
    """base * (1 - step / total)^power, rising linearly from 0 over the first `warmup` steps.

    Poly decay as published for ShelfNet; `step` counts from 0.
    """
    return base * min(1.0, (step + 1) / max(warmup, 1)) * (1 - step / total) ** power
