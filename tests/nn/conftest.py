"""Narrow models: the published architectures with a few channels, for tests that need no real width."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shelfkern.nn

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # for `equations`, `two_processes` and `golden.fill`

NARROW = {
    "shelfnet18_lw": dict(backbone_width=8, widths=(8, 16, 24), head_width=8),
    "shelfnet34_lw": dict(backbone_width=4, widths=(8, 16, 32), head_width=8),
    "shelfnet50": dict(backbone_width=4, widths=(4, 8, 12, 16)),
    "shelfnet101": dict(backbone_width=4, widths=(4, 8, 12, 16)),
}


@pytest.fixture(params=list(NARROW))
def model_name(request: pytest.FixtureRequest) -> str:
    """Each of the four published models."""
    return request.param


@pytest.fixture
def narrow() -> Callable[..., shelfkern.nn.ShelfNet]:
    """narrow(name, num_classes=5, **changes) -> a narrow model with random norms, in eval mode."""
    return _narrow


def _narrow(name: str, num_classes: int = 5, **changes) -> shelfkern.nn.ShelfNet:
    model = getattr(shelfkern.nn, name)(num_classes, **(NARROW[name] | changes))
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()
