"""Small ShelfNets with batch norms as trained ones have them, for engine tests."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shelfkern.nn import ShelfNet, ShelfNetConfig

REAL_TIME = dict(
    backbone="resnet18", merge="attention", negative_slope=0.01, head="conv", head_width=16, presence=False
)
CONFIGS = {
    "attention": ShelfNetConfig(num_classes=7, backbone_width=16, widths=(16, 24, 40), **REAL_TIME),
    "no_lateral": ShelfNetConfig(
        num_classes=5, backbone_width=16, widths=(32, 64, 128), lateral=False, **REAL_TIME
    ),
    "enlarged": ShelfNetConfig(
        num_classes=7, backbone_width=16, widths=(16, 24), input_scale=1.6, **REAL_TIME
    ),
    "deconv": ShelfNetConfig(num_classes=21, backbone_width=8, widths=(12, 16, 24, 40)),
    "one_pair": ShelfNetConfig(
        num_classes=3, backbone="resnet18", backbone_width=8, widths=(8, 16, 24), pairs=1
    ),
    "three_pairs": ShelfNetConfig(
        num_classes=4, backbone_width=16, widths=(16, 24), **{**REAL_TIME, "backbone": "resnet34"}, pairs=3
    ),
    "five_levels": ShelfNetConfig(
        num_classes=6, backbone="resnet18", backbone_width=8, widths=(8, 8, 16, 16, 24)
    ),
}


def build(config: ShelfNetConfig, seed: int = 0) -> ShelfNet:
    """A model whose batch norms have statistics, and scales of both signs."""
    torch.manual_seed(seed)
    model = ShelfNet(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data[::5] *= -1
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def assert_as_exact_as_eager(
    fast: Callable[[Tensor], Tensor], model: ShelfNet, inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """The error against float64 is at most twice that of eager torch in the same dtype.

    Root mean squares, pooled over the inputs: the largest error of one small input is a lottery. In bfloat16
    so is that of some inputs, where one rounding changes the sign of an activation that much depends on:
    there the geometric mean over the inputs of the ratios.
    """
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    errors, allowed = [], []
    for x in inputs:
        result, truth = fast(x), exact(x.double())
        assert result.shape == truth.shape and result.dtype is dtype
        assert result.isfinite().all()
        errors.append(((result.double() - truth) / truth.std()).flatten())
        allowed.append(((eager(x.to(dtype)).double() - truth) / truth.std()).flatten())
    if dtype is torch.bfloat16:
        ratios = [a.square().mean() / b.square().mean() for a, b in zip(errors, allowed, strict=True)]
        assert torch.stack(ratios).log().mean() <= math.log(4)
    else:
        assert torch.cat(errors).square().mean() <= 4 * torch.cat(allowed).square().mean()
