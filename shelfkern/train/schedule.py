"""Learning rate over a run."""

from __future__ import annotations

from .recipe import Schedule


def factor(step: int, total: int, schedule: Schedule) -> float:
    """What the highest rate is multiplied by at a step, counted from 0, of `total`."""
    if schedule.warmup_shape == "linear":
        return min(1.0, (step + 1) / max(schedule.warmup, 1)) * poly(step, total, schedule.power)
    if step < schedule.warmup:
        return schedule.warmup_from ** (1 - step / schedule.warmup)
    return poly(step - schedule.warmup, max(total - schedule.warmup, 1), schedule.power)


def poly(step: int, total: int, power: float) -> float:
    """(1 - step / total)^power, as published for ShelfNet."""
    return (1 - step / total) ** power
