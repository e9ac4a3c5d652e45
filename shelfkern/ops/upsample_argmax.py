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
    """The same in torch calls, for any device and dtype. Half dtypes are resized in float32."""
    return resize.reference(common.wide(scores), size, crop, align_corners).argmax(1).to(torch.uint8)


def can_run(scores: Tensor) -> backends.Reasons:
    """Why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


def upsample_argmax_native(scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """The native kernel into the contiguous uint8 `out` (N, crop), unchecked: scores in NHWC storage."""
    resize.run_native(OP, scores, size, out, align_corners)


def upsample_argmax_cuda(
    scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool, backend: str = "cuda"
) -> None:
    """The CUDA kernel into the contiguous uint8 `out` (N, crop), unchecked: channels of scores contiguous."""
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
    """Argmax over classes of the bilinear resize of scores; of equal ones, the first.

    Args:
        scores: (N, C, h, w), floating, any strides, C from 1 to 256.
        size: (H, W) of the whole result.
        crop: rows and columns of it to make, from the top left; all by default.
        align_corners: as of torch.nn.functional.interpolate.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, *crop) uint8. Resized in float32, so that scores within rounding of each other may go
        either way.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    crop = resize.check(OP, scores, size, crop)
    if not 1 <= scores.shape[1] <= MAX_CLASSES:
        raise ValueError(f"{OP}: scores has {scores.shape[1]} classes, it may have 1 to {MAX_CLASSES}")
    # Labels carry no gradient: nothing is lost where autograd is on.
    chosen = backends.choose(OP, backend, can_run(scores), ())
    if chosen == "reference":
        return upsample_argmax_reference(scores, size, crop, align_corners)
    return _op(scores, list(size), list(crop), align_corners, chosen)
