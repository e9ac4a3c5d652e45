"""upsample_bilinear: class scores resized to the image's size."""

from __future__ import annotations

from torch import Tensor

from . import _common as common
from . import _resize as resize

OP = "upsample_bilinear"


def upsample_bilinear_reference(
    scores: Tensor, size: tuple[int, int], crop: tuple[int, int], align_corners: bool = True
) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    return resize.reference(scores, size, crop, align_corners)


def can_run(scores: Tensor) -> str | None:
    """Why the native kernel cannot take scores, None if it can."""
    return resize.reason(OP, scores)


def upsample_bilinear_out(scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """The native kernel into the contiguous `out` (N, C, crop), unchecked: scores in NHWC storage."""
    resize.run_native(OP, scores, size, out, align_corners)


@common.custom_op(OP)
def _op(scores: Tensor, size: list[int], crop: list[int], align_corners: bool) -> Tensor:
    out = scores.new_empty((*scores.shape[:2], *crop))
    upsample_bilinear_out(common.channels_last(scores), (size[0], size[1]), out, align_corners)
    return out


@_op.register_fake
def _(scores: Tensor, size: list[int], crop: list[int], align_corners: bool) -> Tensor:
    return scores.new_empty((*scores.shape[:2], *crop))


def upsample_bilinear(
    scores: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] | None = None,
    align_corners: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """The bilinear resize of scores, as torch.nn.functional.interpolate.

    Args:
        scores: (N, C, h, w), floating, any strides.
        size: (H, W) of the whole result.
        crop: rows and columns of it to make, from the top left; all by default.
        align_corners: whether corner pixels' centres are kept in place.
        backend: "native", "reference", or "auto": native where it can.

    Returns:
        (N, C, *crop), contiguous from the native kernel, dtype of scores.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: backend="native" and the native kernel cannot run.
    """
    crop = resize.check(OP, scores, size, crop)
    if common.choose(OP, backend, can_run(scores), (scores,)):
        return _op(scores, list(size), list(crop), align_corners)
    return upsample_bilinear_reference(scores, size, crop, align_corners)
