"""Sizes and checks shared by the ops that resize scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common

Size = tuple[int, int]


def reference(scores: Tensor, size: Size, crop: Size, align_corners: bool) -> Tensor:
    """The bilinear resize to `size`, cropped to its first `crop` rows and columns."""
    full = F.interpolate(scores, size, mode="bilinear", align_corners=align_corners)
    return full[:, :, : crop[0], : crop[1]]


def reasons(op: str, scores: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take scores; None for those that can."""
    if scores.shape[2] * scores.shape[3] == 0:
        return dict.fromkeys(backends.KERNELS[op], "scores has no pixels")
    return backends.reasons(op, scores, "scores")


def check(op: str, scores: Tensor, size: Size, crop: Size | None) -> Size:
    """Checks the arguments; returns the crop, by default the whole size."""
    common.check_4d(op, "scores", scores)
    for name, pair in (("size", size), ("crop", crop)):
        if pair is not None and not _are_integers(pair):
            raise TypeError(f"{op}: {name} is {pair!r}, it must be a tuple of integers, (height, width)")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: size is {size}, it must be (height, width) of at least 1")
    crop = size if crop is None else crop
    if len(crop) != 2 or min(crop) < 1 or crop[0] > size[0] or crop[1] > size[1]:
        raise ValueError(f"{op}: crop is {crop}, it may be from (1, 1) to size {size}")
    return crop


def _are_integers(pair: object) -> bool:
    kinds = (int, np.integer, torch.SymInt)
    return isinstance(pair, (tuple, list)) and all(isinstance(extent, kinds) for extent in pair)


def step(extent: int, full: int, align_corners: bool) -> float:
    """Distance in source pixels between adjacent result pixels, rounded to float32 as torch does."""
    if align_corners:
        return float(np.float32(extent - 1) / np.float32(full - 1)) if full > 1 else 0.0
    return float(np.float32(extent) / np.float32(full))


def run_native(op: str, scores: Tensor, size: Size, out: Tensor, align_corners: bool, *others: Any) -> None:
    """Runs the native kernel into `out` (..., crop), unchecked; others: further arguments of the kernel."""
    n, c, h, w = scores.shape
    getattr(native.module, op)(
        scores.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[scores.dtype],
        n, h, w, c,
        *size,
        *out.shape[-2:],
        align_corners,
        torch.get_num_threads(),
        *others,
    )  # fmt: skip


def run_cuda(
    backend: str, op: str, scores: Tensor, size: Size, out: Tensor, align_corners: bool, *others: Any
) -> None:
    """`run_native` for the CUDA kernel: scores need channel stride 1, any other strides."""
    n, c, h, w = scores.shape
    backends.call_cuda(
        backend,
        True,
        op,
        scores,
        scores.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[scores.dtype],
        n, h, w, c,
        common.strides(scores),
        *size,
        *out.shape[-2:],
        align_corners,
        *others,
    )  # fmt: skip
