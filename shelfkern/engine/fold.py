"""Batch norms folded into a scale and a shift per channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_batch_norm(bn: nn.Module, conv_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and shift of an eval-mode batch norm after a convolution: bn(z + bias) = scale * z + shift.

    scale = gamma / sqrt(var + eps), shift = beta + scale * (bias - mean), computed in float64.

    Args:
        bn: a batch norm with running statistics (SyncBatchNorm included).
        conv_bias: (C,) bias of the convolution before it, or None.

    Returns:
        scale and shift, (C,) float32.

    Raises:
        TypeError: bn is not a batch norm with running statistics.
    """
    if (
        not isinstance(bn, nn.modules.batchnorm._BatchNorm)
        or bn.running_mean is None
        or bn.running_var is None
    ):
        raise TypeError(f"bn is {bn}, it must be a batch norm that tracks running statistics")
    scale = torch.rsqrt(bn.running_var.detach().double() + bn.eps)
    shift = -bn.running_mean.detach().double()
    if conv_bias is not None:
        shift = shift + conv_bias.detach().double()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = shift * scale
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double()
    return scale.float(), shift.float()
