"""Images on their way into a network: raw uint8 NHWC or normalised floating NCHW, checked."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from ..normalisation import Normalisation
from ..ops.upsample_argmax import MAX_CLASSES
from .extents import STRIDE


def check_image_size(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless shape is (N, 3, H, W) with H, W >= 32."""
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"x is {tuple(shape)}, it must be (N, 3, H, W)")
    if shape[2] < STRIDE or shape[3] < STRIDE:
        raise ValueError(f"x is {shape[2]} x {shape[3]} pixels, height and width must be at least {STRIDE}")


def image_size(images: Tensor) -> tuple[int, int, int]:
    """(N, H, W) of uint8 NHWC or floating NCHW images.

    Raises:
        TypeError: neither uint8 nor floating.
        ValueError: not NHWC or NCHW with three channels and at least 32 x 32 pixels.
    """
    if images.dtype is torch.uint8:
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images is uint8 {tuple(images.shape)}, raw images must be (N, H, W, 3)")
        n, h, w, c = images.shape
        check_image_size((n, c, h, w))
        return n, h, w
    if not images.is_floating_point():
        raise TypeError(f"images is {images.dtype}, it may be uint8 (N, H, W, 3) or floating (N, 3, H, W)")
    check_image_size(tuple(images.shape))
    return images.shape[0], images.shape[2], images.shape[3]


def as_batch(images: Tensor | np.ndarray, device: torch.device) -> tuple[Tensor, bool]:
    """Images as a tensor with a batch dimension, and whether that was added to a single raw image.

    Args:
        images: a tensor, returned as it is but for the dimension; or an array, copied to the device.
        device: of the network.

    Raises:
        TypeError: images is neither, or torch has no such dtype.
    """
    if isinstance(images, np.ndarray):
        # A copy where memory is read-only, as Pillow's is, or rows run backwards: torch takes neither.
        images = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(device)
    if not isinstance(images, Tensor):
        raise TypeError(f"images is {type(images).__name__}, it must be a tensor or a numpy array")
    single = images.dtype is torch.uint8 and images.ndim == 3 and images.shape[2] == 3
    return (images[None] if single else images), single


def normalised(images: Tensor, normalisation: Normalisation, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) of `dtype` in channels_last memory, of raw images (N, H, W, 3) uint8.

    Computed in float32, or in float64 for that.
    """
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (images.new_tensor(value, dtype=wide) for value in dataclasses.astuple(normalisation))
    return ((images.to(wide) / 255 - mean) / std).to(dtype).permute(0, 3, 1, 2)


def check_label_classes(num_classes: int) -> None:
    """Raises ValueError where uint8 labels cannot name every class."""
    if num_classes > MAX_CLASSES:
        raise ValueError(
            f"num_classes is {num_classes}, labels are uint8 and take at most {MAX_CLASSES}: "
            "use the argmax of the scores"
        )
