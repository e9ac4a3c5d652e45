"""The weights and inputs that the golden files were computed on.

A tensor's values depend on its name and shape alone: the CRC-32 of the name seeds torch's CPU
generator. Batch norm scales are negative for about a quarter of the channels, so that a model which
mistakes |weight| for weight is found out.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SAMPLES = 4096


def published_shapes(model: str) -> dict[str, list[int]]:
    """Names and shapes of the authors' checkpoint, for "shelfnet18_lw", "shelfnet34_lw" and so on."""
    return json.loads((FOLDER / f"keys_{model}.json").read_text())


def published_state(model: str) -> dict[str, Tensor]:
    """A filled state dict with the names and shapes of the authors' checkpoint."""
    return {name: filled(name, shape) for name, shape in published_shapes(model).items()}


def filled(name: str, shape: list[int]) -> Tensor:
    """The float32 tensor of this name; the count of batches is an int64 zero."""
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if kind == "running_var":
        return _around_one(shape, source)
    if kind == "weight" and len(shape) == 1:
        scale = _around_one(shape, source)
        flip = torch.rand(shape, generator=source) < 0.25
        return torch.where(flip, -scale, scale)
    if len(shape) == 1:  # biases and running means
        return torch.randn(shape, generator=source) * 0.1
    return torch.randn(shape, generator=source) * math.sqrt(0.9 / math.prod(shape[1:]))


def golden_input(seed: int, n: int, height: int, width: int) -> Tensor:
    """The (n, 3, height, width) float32 images of a golden case."""
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def sampled(output: Tensor) -> Tensor:
    """The 4096 values of an output that the golden files keep, drawn with repetition."""
    positions = torch.randint(output.numel(), (SAMPLES,), generator=torch.Generator().manual_seed(7))
    return output.flatten()[positions]


def _around_one(shape: list[int], source: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=source) * 0.5 + 0.75
