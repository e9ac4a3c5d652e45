"""Averages of weights: the moving one over training, and the mean of several files."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from .. import checkpoints
from ..nn import ShelfNet


class Average:
    """Keeps `model`, the moving average of another model's weights and running statistics, in eval mode.

    The decay of the first steps is lower, step / (step + 9), so that the beginning is soon forgotten. With
    a decay of 0 it is a copy of the last weights.
    """

    def __init__(self, source: ShelfNet, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(source).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: ShelfNet, step: int) -> None:
        """Takes up the weights after `step` steps."""
        decay = min(self.decay, step / (step + 9))
        state, means = source.state_dict(), self.model.state_dict()
        floating = [name for name, mean in means.items() if mean.is_floating_point()]
        # One launch, not one for each tensor.
        targets, ends = ([values[name] for name in floating] for values in (means, state))
        torch._foreach_lerp_(targets, ends, 1 - decay)
        for name in means.keys() - floating:
            means[name].copy_(state[name])


def mean_of(weights: Sequence[str]) -> ShelfNet:
    """The model whose weights are the mean of several models', in float32 and eval mode.

    A model soup (Wortsman et al. 2022). The norms' running statistics are averaged too, but those of the
    averaged weights are others: `estimate_norms` takes them from images.

    Args:
        weights: one or more of what `checkpoints.open_model` takes.

    Raises:
        OSError, RuntimeError: as `checkpoints.open_model`.
        ValueError: they are of several networks, or of other classes or images.
    """
    model = checkpoints.open_model(weights[0])
    sums = {name: value.double() for name, value in model.state_dict().items()}
    for name in weights[1:]:
        other = checkpoints.open_model(name)
        _check_alike(weights[0], model, name, other)
        for key, value in other.state_dict().items():
            sums[key] += value
    for key, value in model.state_dict().items():
        value.copy_(sums[key] / len(weights))
    return model


def _check_alike(first: str, model: ShelfNet, second: str, other: ShelfNet) -> None:
    for name, value in _facts(model).items():
        theirs = _facts(other)[name]
        # Not every file knows the names of its classes.
        if theirs != value and None not in (theirs, value):
            raise ValueError(f"{second} has the {name} {theirs}, it must be {first}'s, {value}")


def _facts(model: ShelfNet) -> dict[str, object]:
    return {
        **dataclasses.asdict(model.config),
        "classes": model.classes,
        "normalisation": dataclasses.astuple(model.normalisation),
    }
