"""One of two processes that train together; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn

from shelfkern.process_group import process_group


def loss(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A loss that every head has a part in."""
    out = model(images)
    presence = 0.0 if out.presence is None else out.presence.sigmoid().mean()
    return sum(scores.sigmoid().mean() for scores in (out.scores, *out.aux)) + presence


def train_half(rank: int, folder: str) -> None:
    """Writes the gradients of the models in case.pt, each process seeing half of the images there."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    with process_group("gloo", store=store, rank=rank, world_size=2):
        models, images = torch.load(Path(folder, "case.pt"), weights_only=False)
        for model in models:
            parallel = nn.parallel.DistributedDataParallel(model)
            loss(parallel, images.chunk(2)[rank]).backward()  # averaged only while `parallel` lives
        if rank == 0:
            gradients = [[p.grad for p in model.parameters()] for model in models]
            torch.save(gradients, Path(folder, "gradients.pt"))
