"""The running statistics of batch norms, taken anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.dataset import Dataset
from ..nn import ShelfNet
from .run import normalised


@torch.no_grad()
def estimate_norms(
    model: ShelfNet, source: Dataset, batch: int = 8, progress: Callable[[int, int], None] | None = None
) -> None:
    """Takes the running statistics of a model's batch norms anew, from whole images as they are, in place.

    Weights that were averaged have no statistics of their own, and those of training are of augmented crops.
    As `torch.optim.swa_utils.update_bn` does, each batch is normalised by its own statistics, and the norms
    keep the mean of the batches' means and of their unbiased variances. Unlike there a batch counts by its
    images, and dropout is off, as it is where the statistics are used. An error leaves them as they were.

    Args:
        source: images of one size. They come in a random order that is always the same: neighbours of a
            video are too much alike to make a batch of.
        batch: least images of a batch, from 2, for norms whose channels have one value an image.
        progress: called after every batch with the images done and those to do.

    Raises:
        OSError: an image cannot be read.
        ValueError: batch or the images are fewer than 2, or images are of several sizes.
    """
    if batch < 2:
        raise ValueError(f"batch is {batch}, it may be any integer from 2")
    if len(source) < 2:
        raise ValueError(f"source has {len(source)} images, norms need 2 or more")
    device, done = next(model.parameters()).device, 0
    with _norms_alone_in_train_mode(model) as norms:
        for images in _batches(source, batch):
            done += len(images)
            for norm in norms:
                norm.momentum = len(images) / done
            model.forward_scores(normalised(images.to(device), model))
            if progress is not None:
                progress(done, len(source))


@contextlib.contextmanager
def _norms_alone_in_train_mode(model: ShelfNet) -> Iterator[list[_BatchNorm]]:
    """Gives the norms, without statistics; afterwards they and the model are in the modes they were in.

    An error gives them back their statistics.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    try:
        yield norms
    except BaseException:
        for buffer, before in statistics:
            buffer.copy_(before)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def _batches(source: Dataset, batch: int) -> Iterator[Tensor]:
    """All images once, uint8 (N, H, W, 3), N from `batch` to less than twice that."""
    order = np.random.default_rng(0).permutation(len(source))
    for part in np.array_split(order, max(1, len(source) // batch)):
        images = [np.asarray(source[int(index)].image) for index in part]
        sizes = sorted({image.shape[:2] for image in images})
        if len(sizes) > 1:
            found = " and ".join(f"{height} x {width}" for height, width in sizes[:2])
            raise ValueError(f"source has images of {found}, they must be of one size")
        yield torch.from_numpy(np.stack(images))
