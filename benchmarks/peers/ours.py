"""This library."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import shelfkern
from shelfkern.nn import ShelfNet

from . import Peer, Run


@dataclasses.dataclass(frozen=True)
class Shelfkern:
    """The accelerated module.

    Attributes:
        graphs: whether it records CUDA graphs.
        bound: whether it reads its images in place and gives the same tensor each time.
        tune: whether it may time its algorithms while it is prepared.
    """

    key: str
    name: str
    graphs: bool = True
    bound: bool = False
    tune: bool = False
    ours: bool = True
    seconds: float = 240

    def why_not(self) -> None:
        """What it lacks shows when it is made."""

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        if images.is_cuda:
            fast = shelfkern.accelerate(model, dtype, images.device, tune=self.tune, graphs=self.graphs)
        else:
            fast = shelfkern.accelerate(model, dtype)
        if self.bound:
            return fast.bind(images, "labels" if labels else "scores")
        return lambda: fast.predict(images) if labels else fast(images)


def on_cpu() -> list[Peer]:
    """Those that take part on a CPU."""
    return [Shelfkern("shelfkern", "shelfkern")]


def on_gpu(tune: bool) -> list[Peer]:
    """Those that take part on a GPU."""
    return [
        Shelfkern("shelfkern", "shelfkern", tune=tune),
        Shelfkern("bound", "shelfkern bound", bound=True, tune=tune),
        Shelfkern("no-graphs", "shelfkern without graphs", graphs=False, tune=tune),
    ]
