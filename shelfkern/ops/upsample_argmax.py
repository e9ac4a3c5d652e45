"""upsample_argmax: the best class of every pixel, without full-size scores."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends as backends
from . import _common as common
from . import _resize as resize

OP = "upsample_argmax"
MAX_CLASSES = 256


def upsample_argmax_reference(
    scores: Tensor, size: tuple[int, int], crop: tuple[int, int], align_corners: bool = True
) -> Tensor:
    """upsample_argmax in torch calls, for any device and dtype. Half dtypes are resized in float32."""
    return resize.reference(common.wide(scores), size, crop, align_corners).argmax(1).to(torch.uint8)


def can_run(scores: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


def upsample_argmax_native(scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """Runs the native kernel into the contiguous uint8 `out` (N, crop), unchecked: scores in NHWC storage."""
    resize.run_native(OP, scores, size, out, align_corners)


def upsample_argmax_cuda(
    scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool, backend: str = "cuda"
) -> None:
    """Runs the CUDA kernel into contiguous uint8 `out` (N, crop), unchecked: channel stride 1 in scores."""
    resize.run_cuda(backend, OP, scores, size, out, align_corners)


@backends.custom_op(OP)
def _op(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
    out = scores.new_empty((scores.shape[0], *crop), dtype=torch.uint8)
    whole = (size[0], size[1])
    if backend == "native":
        upsample_argmax_native(common.channels_last(scores), whole, out, align_corners)
    else:
        upsample_argmax_cuda(common.channels_innermost(scores), whole, out, align_corners, backend)
    return out


@_op.register_fake
def _(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
    return scores.new_empty((scores.shape[0], *crop), dtype=torch.uint8)


def upsample_argmax(
    scores: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] | None = None,
    align_corners: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """Argmax over classes of the bilinear resize of scores; ties go to the first class.

    Args:
        scores: (N, C, h, w), floating, any strides, C from 1 to 256.
        size: (H, W) of the whole resize.
        crop: number of rows and columns to compute, from the top left; all by default.
        align_corners: as in torch.nn.functional.interpolate.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, *crop) uint8. The resize is in float32, so scores that are equal within rounding error may go
        either way.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    crop = resize.check(OP, scores, size, crop)
    if not 1 <= scores.shape[1] <= MAX_CLASSES:
        raise ValueError(f"{OP}: scores has {scores.shape[1]} classes, it may have 1 to {MAX_CLASSES}")
    # Labels have no gradient, so nothing is lost where autograd is on.
    chosen = backends.choose(OP, backend, can_run(scores), ())
    if chosen == "reference":
        return upsample_argmax_reference(scores, size, crop, align_corners)
    return _op(scores, list(size), list(crop), align_corners, chosen)
