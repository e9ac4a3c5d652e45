"""A network with its pre- and postprocessing in torch calls, as run by peers."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from shelfkern.nn import ShelfNet


class Network(nn.Module):
    """A copy of a model, from raw or normalised images to scores, or to labels uint8.

    Args:
        model: in float32.
        dtype: dtype to which raw images are converted.
        labels: whether it returns labels.
        weights: dtype of the weights, by default `dtype`.

    Raises:
        ValueError: dtype is an integer or 8-bit dtype, which torch's convolutions do not support.
    """

    def __init__(
        self, model: ShelfNet, dtype: torch.dtype, labels: bool, weights: torch.dtype | None = None
    ) -> None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, torch's own convolutions take floating ones")
        super().__init__()
        self.model = copy.deepcopy(model).to(weights or dtype)
        self.dtype, self.labels = dtype, labels
        mean, std = (torch.tensor(v)[:, None, None] for v in dataclasses.astuple(model.normalisation))
        # In float32 whatever the dtype: pixels are rounded once.
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.model(self.normalise(images))
        return scores.argmax(1).to(torch.uint8) if self.labels else scores

    def normalise(self, images: Tensor) -> Tensor:
        """Raw uint8 images (N, H, W, 3) to normalised (N, 3, H, W) in NHWC storage; others unchanged."""
        if images.dtype is not torch.uint8:
            return images
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale).to(self.dtype)


def channels_last(images: Tensor) -> Tensor:
    """Normalised images in NHWC storage; raw ones already are."""
    return images if images.dtype is torch.uint8 else images.contiguous(memory_format=torch.channels_last)
