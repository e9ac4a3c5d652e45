"""The peers in a comparison of whole networks, one file per family.

Each prepares one network for one input and one kind of output, with its best settings, and is then called
repeatedly. `why_not` says what is missing on this machine; later failures raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from shelfkern.nn import ShelfNet

# Computes the result once, in memory that the next call may overwrite.
Run = Callable[[], Tensor]


class Peer(Protocol):
    """One way to run a network.

    Attributes:
        key: name on the command line.
        name: name in results.
        ours: whether it is this library's.
        seconds: time allowed for preparing it.
    """

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def ours(self) -> bool: ...
    @property
    def seconds(self) -> float: ...

    def why_not(self) -> str | None:
        """Reason why it cannot run on this machine at all, None if it can."""

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """The network ready to be called.

        Args:
            model: on the CPU, in float32, in eval mode; left as it is.
            images: on the device: uint8 (N, H, W, 3), or normalised (N, 3, H, W) in `dtype`, or float32 for
                8-bit dtypes.
            dtype: dtype of activations.
            labels: whether it returns labels (N, H, W) uint8, otherwise scores (N, classes, H, W).
        """


def of_device(device: str, tune: bool = True) -> list[Peer]:
    """All peers of a device: ours, then the others, in order of preparation time.

    tune: whether ours may time its algorithms while it is prepared.
    """
    from . import compiled, cpu_runtimes, cudnn, eager, ours, tensorrt

    if device == "cpu":
        return [*ours.on_cpu(tune), *eager.on_cpu(), *compiled.on_cpu(), *cpu_runtimes.on_cpu()]
    return [*ours.on_gpu(tune), *cudnn.on_gpu(), *eager.on_gpu(), *compiled.on_gpu(), *tensorrt.on_gpu()]


def chosen(peers: Iterable[Peer], keys: Iterable[str]) -> list[Peer]:
    """Ours and those with the given keys; all if no keys are given."""
    wanted = set(keys)
    return [peer for peer in peers if not wanted or peer.ours or peer.key in wanted]
