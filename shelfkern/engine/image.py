"""Input images: raw uint8 NHWC or normalised float NCHW; checks, padding and resizing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.extents import Extents
from ..nn.images import image_size
from ..normalisation import Normalisation

Extent = tuple[int, int]


def statistics(normalisation: Normalisation, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the colour channels, (3,) float32."""
    rows = [normalisation.mean, normalisation.std]
    mean, std = torch.tensor(rows, dtype=torch.float32, device=device or "cpu")
    return mean, std


def prepare_image(
    image: Tensor, padded: Extent, mean: Tensor, std: Tensor, seen: Extent | None = None
) -> Tensor:
    """Normalised float32 channels_last images (N, 3, *seen).

    Args:
        image: uint8 (N, H, W, 3), or normalised floating (N, 3, H, W).
        padded: height and width to which zeros are added at the bottom and right.
        mean, std: from `statistics`, on the image's device.
        seen: height and width to which the images are then resized, bilinearly; by default they are not.
    """
    if image.dtype is torch.uint8:
        image = ((image.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    image = F.pad(image.float(), (0, padded[1] - image.shape[3], 0, padded[0] - image.shape[2]))
    image = image.contiguous(memory_format=torch.channels_last)
    if seen is None or seen == padded:
        return image
    return F.interpolate(image, seen, mode="bilinear", align_corners=False)


def seen_image(image: Tensor, extents: Extents, mean: Tensor, std: Tensor) -> Tensor:
    """`prepare_image` with sizes from `extents`: images as the network's first convolution sees them."""
    _, h, w = image_size(image)
    return prepare_image(image, extents.padded(h, w), mean, std, extents.seen(h, w))
