"""The optimiser of a recipe, and its groups of parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..nn import ShelfNet
from .recipe import Optimizer


def build(model: ShelfNet, recipe: Optimizer) -> torch.optim.Optimizer:
    """An optimiser whose groups carry `factor`, the share of the backbone's rate that is theirs."""
    groups = parameter_groups(model, recipe)
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def parameter_groups(model: ShelfNet, recipe: Optimizer) -> list[dict[str, Any]]:
    """The backbone's parameters and all others, each apart into those that decay and those that do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0 if name.startswith("backbone.") else recipe.head_factor
        decays = parameter.ndim > 1 or recipe.decay_norms
        groups.setdefault((factor, recipe.weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the backbone's rate, and that of the other groups in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
