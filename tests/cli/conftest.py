from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from segmenting import CLASSES, CONFIG, PALETTE, picture
from torch import nn

from shelfkern import accelerate
from shelfkern.cli import commands
from shelfkern.nn import ShelfNet, from_weights, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model = ShelfNet(CONFIG).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(model, path, classes=CLASSES, palette=PALETTE)
    return path


@pytest.fixture(scope="module")
def model(weights) -> ShelfNet:
    return from_weights(weights)


@pytest.fixture
def run(weights, tmp_path):
    """Runs `segment` into tmp_path/out with the tiny weights; anything but an exit is a failure."""

    def run(*args: object, out: Path = tmp_path / "out") -> Result:
        words = ["segment", "--weights", weights, "-o", out, *args]
        result = CliRunner().invoke(commands, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A file of the tiny model, accelerated in 8 bits."""
    images = torch.from_numpy(np.stack([np.array(picture(seed=seed)) for seed in range(4)]))
    path = tmp_path / "saved.safetensors"
    accelerate(model, torch.int8, calibration=images).save(path)
    return path
