"""Losses of the real-time models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn import ShelfNetOutput


def class_weights(frequencies: np.ndarray) -> Tensor:
    """1 / log(1.1 + frequency) per class, scaled so that an average pixel weighs 1; (classes,) float32.

    The form of ENet (arXiv 1606.02147), whose 1.02 gives rare classes four times as much and costs precision.
    """
    weights = 1 / np.log(1.1 + frequencies)
    return torch.tensor(weights / (weights * frequencies).sum(), dtype=torch.float32)


def total_loss(output: ShelfNetOutput, target: Tensor, weights: Tensor, ignore: int) -> Tensor:
    """Sum of the weighted cross-entropies of the main and the auxiliary scores, as published.

    Args:
        output: of a model in train mode.
        target: (N, H, W) int64 class indices.
        weights: (classes,).
        ignore: index that counts for nothing.
    """
    scores = (output.scores, *output.aux)
    return torch.stack([F.cross_entropy(s, target, weights, ignore_index=ignore) for s in scores]).sum()
