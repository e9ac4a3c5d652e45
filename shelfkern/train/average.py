"""The moving average of a model's weights over training."""

from __future__ import annotations

import copy

import torch

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
