"""This library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from arithmetic import plan_flop
from cases import range_images
from torch import Tensor

import shelfkern
from shelfkern.engine.accelerate import FastShelfNet
from shelfkern.engine.image import image_size
from shelfkern.nn import ShelfNet

from . import Peer, Run
from .quantised import RangeImages

# Per network on a CPU, which has few layers and algorithms: a minute each would be most of a run.
CPU_TUNING_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the accelerated module on images that may be overwritten between calls."""

    fast: FastShelfNet
    images: Tensor
    labels: bool

    def __call__(self) -> Tensor:
        return self.fast.predict(self.images) if self.labels else self.fast(self.images)

    def flop(self) -> int:
        """FLOP of the algorithms chosen for these images."""
        batch, height, width = image_size(self.images)
        plan = self.fast.plan
        return plan_flop(plan, batch, plan.extents.seen(height, width))


@dataclasses.dataclass(frozen=True)
class Shelfkern:
    """The accelerated module.

    Attributes:
        graphs: whether it records CUDA graphs.
        bound: whether it reads its images in place and returns the same tensor each time.
        tune: whether it may time its algorithms while it is prepared, or for how many seconds.
        range_images: returns images for calibrating 8-bit networks.
    """

    key: str
    name: str
    graphs: bool = True
    bound: bool = False
    tune: bool | float = False
    ours: bool = True
    seconds: float = 240
    range_images: RangeImages = range_images

    def why_not(self) -> None:
        """None: what is missing shows when it is created."""

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        fast = self.accelerated(model, images, dtype)
        if self.bound:
            return fast.bind(images, "labels" if labels else "scores")
        return Call(fast, images, labels)

    def loaded(self, path: Path, images: Tensor, labels: bool) -> Run:
        """A call of the module saved from `accelerated`."""
        fast = shelfkern.load(path, images.device, tune=self.tune, graphs=self.graphs)
        return Call(fast, images, labels)

    def accelerated(self, model: ShelfNet, images: Tensor, dtype: torch.dtype) -> FastShelfNet:
        """The module, for images of a size."""
        options: dict[str, Any] = {"tune": self.tune, "graphs": self.graphs}
        if dtype is torch.int8:
            height, width = image_size(images)[1:]
            options["calibration"] = self.range_images((height, width))
        return shelfkern.accelerate(model, dtype, images.device, **options)


def on_cpu(tune: bool) -> list[Peer]:
    """Peers on a CPU."""
    return [Shelfkern("shelfkern", "shelfkern", tune=tune and CPU_TUNING_SECONDS)]


def on_gpu(tune: bool) -> list[Peer]:
    """Peers on a GPU."""
    return [
        Shelfkern("shelfkern", "shelfkern", tune=tune),
        Shelfkern("bound", "shelfkern bound", bound=True, tune=tune),
        Shelfkern("no-graphs", "shelfkern without graphs", graphs=False, tune=tune),
    ]
