"""upsample_bilinear: class scores resized to the image's size."""

from __future__ import annotations

from torch import Tensor

from . import _backends as backends
from . import _common as common
from . import _resize as resize

OP = "upsample_bilinear"


def upsample_bilinear_reference(
    scores: Tensor, size: tuple[int, int], crop: tuple[int, int], align_corners: bool = True
) -> Tensor:
    """The same in torch calls, for any device and dtype; differentiable."""
    return resize.reference(scores, size, crop, align_corners)


def can_run(scores: Tensor) -> backends.Reasons:
    """Why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


def upsample_bilinear_native(scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """The native kernel into the contiguous `out` (N, C, crop), unchecked: scores in NHWC storage."""
    resize.run_native(OP, scores, size, out, align_corners)


@backends.custom_op(OP)
def _op(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
    out = scores.new_empty((*scores.shape[:2], *crop))
    upsample_bilinear_native(common.channels_last(scores), (size[0], size[1]), out, align_corners)
    return out


@_op.register_fake
def _(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
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
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, *crop), contiguous from the native kernel, dtype of scores.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    crop = resize.check(OP, scores, size, crop)
    chosen = backends.choose(OP, backend, can_run(scores), (scores,))
    if chosen == "reference":
        return upsample_bilinear_reference(scores, size, crop, align_corners)
    return _op(scores, list(size), list(crop), align_corners, chosen)
