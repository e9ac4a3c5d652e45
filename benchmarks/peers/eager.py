"""Eager torch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shelfkern.nn import ShelfNet

from . import Peer, Run
from .network import Network, channels_last


@dataclasses.dataclass(frozen=True)
class Eager:
    """The unmodified model.

    Attributes:
        innermost: whether weights and images are channels_last.
        autocast: whether weights stay in float32 and torch chooses dtypes; otherwise everything has one
            dtype.
    """

    key: str
    name: str
    innermost: bool = False
    autocast: bool = False
    ours: bool = False
    seconds: float = 60

    def why_not(self) -> None:
        """It always runs."""

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        mixed = self.autocast and dtype.itemsize == 2
        network = Network(model, dtype, labels, torch.float32 if mixed else dtype).to(images.device)
        if self.innermost:
            network, images = network.to(memory_format=torch.channels_last), channels_last(images)

        def run() -> Tensor:
            with torch.autocast(images.device.type, dtype, enabled=mixed):
                return network(images)

        return run


def on_cpu() -> list[Peer]:
    """Peers on a CPU."""
    return [Eager("eager", "eager"), Eager("channels-last", "eager channels_last", innermost=True)]


def on_gpu() -> list[Peer]:
    """Peers on a GPU."""
    mixed = Eager("autocast", "eager channels_last, autocast", innermost=True, autocast=True)
    return [Eager("eager", "eager"), mixed]
