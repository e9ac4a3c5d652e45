"""Training on several processes: `torchrun` starts them, this gives each its place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..ops._common import wide
from ..process_group import process_group


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Attributes:
        rank: its number, from 0; the first writes the files.
        count: how many there are.
        device: what it computes on.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            value = value.to(self.device)
            distributed.all_reduce(value)
        return value

    def broadcast(self, state: dict[str, Tensor]) -> None:
        """Gives every process the first one's tensors, in place."""
        if self.count > 1:
            for value in state.values():
                distributed.broadcast(value, 0)

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started, or stands alone.

    Args:
        device: "cpu" or "cuda"; by default the GPU if there is one. Each process takes the GPU of its number
            on its machine.

    Raises:
        ValueError: there is no such device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, no GPU is to be found")
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, place)
        return
    with process_group("nccl" if kind == "cuda" else "gloo"):
        yield Processes(distributed.get_rank(), distributed.get_world_size(), place)


def sync_norms(model: nn.Module, device: torch.device) -> None:
    """Lets a model's batch norms take their statistics over all processes."""
    synced = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else SyncedBatchNorm2d.of
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, synced(child))


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm over the batches of all processes, for CPUs, where torch's SyncBatchNorm does not run."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SyncedBatchNorm2d:
        """One with the parameters and statistics of `norm`, which it shares."""
        synced = cls(norm.num_features, norm.eps, norm.momentum)
        synced.weight, synced.bias = norm.weight, norm.bias
        synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
        synced.num_batches_tracked = norm.num_batches_tracked
        return synced.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        values = wide(x)
        count = _Sum.apply(values.new_full((), x.numel() / x.shape[1]))
        mean = _Sum.apply(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)
