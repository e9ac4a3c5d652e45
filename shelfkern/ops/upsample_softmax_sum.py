"""upsample_softmax_sum: adds up class probabilities over an image's scales, without full-size scores."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends as backends
from . import _common as common
from . import _resize as resize

OP = "upsample_softmax_sum"


def upsample_softmax_sum_reference(
    scores: Tensor,
    size: tuple[int, int],
    out: Tensor,
    *,
    mirror: bool = False,
    exp: bool = False,
    align_corners: bool = True,
) -> None:
    """upsample_softmax_sum in torch calls, for any device and dtype; differentiable. Half uses float32."""
    full = resize.reference(scores.to(out.dtype), size, size, align_corners)
    if mirror:
        full = full.flip(3)
    part = full[:, :, : out.shape[2], : out.shape[3]]
    out += part.exp() if exp else part.softmax(1)


def can_run(scores: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


def upsample_softmax_sum_native(
    scores: Tensor, size: tuple[int, int], out: Tensor, mirror: bool, exp: bool, align_corners: bool
) -> None:
    """Runs the native kernel, unchecked: scores in NHWC storage, out float32 with column stride 1."""
    resize.run_native(OP, scores, size, out, align_corners, mirror, exp, *out.stride()[:3])


def upsample_softmax_sum_cuda(
    scores: Tensor,
    size: tuple[int, int],
    out: Tensor,
    mirror: bool,
    exp: bool,
    align_corners: bool,
    backend: str = "cuda",
) -> None:
    """Runs the CUDA kernel, unchecked: channel stride 1 in scores, out as for the native kernel."""
    resize.run_cuda(backend, OP, scores, size, out, align_corners, mirror, exp, out.stride()[:3])


@backends.custom_op(OP, mutates_args=("out",))
def _op(
    scores: Tensor,
    size: list[int],
    out: Tensor,
    mirror: bool,
    exp: bool,
    align_corners: bool,
    backend: str,
) -> None:
    if _share_memory(scores, out):
        scores = scores.clone()
    whole = (size[0], size[1])
    if backend == "native":
        scores = common.channels_last(scores)
        upsample_softmax_sum_native(scores, whole, out, mirror, exp, align_corners)
    else:
        scores = common.channels_innermost(scores)
        upsample_softmax_sum_cuda(scores, whole, out, mirror, exp, align_corners, backend)


@_op.register_fake
def _(
    scores: Tensor,
    size: list[int],
    out: Tensor,
    mirror: bool,
    exp: bool,
    align_corners: bool,
    backend: str,
) -> None:
    return None


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from a's first to its last element overlaps b's."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a_begin, a_end), (b_begin, b_end) = span(a), span(b)
    return a_begin < b_end and b_begin < a_end


def _check_out(scores: Tensor, size: tuple[int, int], out: Tensor) -> None:
    common.check_4d(OP, "out", out)
    common.check_device(OP, "out", out, scores)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if out.dtype != dtype:
        raise TypeError(f"{OP}: out is {out.dtype}, for scores of {scores.dtype} it must be {dtype}")
    fits = all(1 <= made <= whole for made, whole in zip(out.shape[2:], size, strict=True))
    if out.shape[:2] != scores.shape[:2] or not fits:
        raise ValueError(
            f"{OP}: out is {tuple(out.shape)}, scores of {tuple(scores.shape)} resized to {tuple(size)} need"
            f" {tuple(scores.shape[:2])} and 1 to {size[0]} rows and 1 to {size[1]} columns"
        )
    if out.shape[3] > 1 and out.stride(3) != 1:
        raise ValueError(f"{OP}: out has stride {out.stride(3)} between columns, it must be 1")
    reach = 0
    for stride, extent in sorted((out.stride(d), out.shape[d]) for d in range(4) if out.shape[d] > 1):
        if stride <= reach:
            raise ValueError(f"{OP}: out has strides {out.stride()}, its elements must not share memory")
        reach += stride * (extent - 1)


def upsample_softmax_sum(
    scores: Tensor,
    size: tuple[int, int],
    out: Tensor,
    *,
    mirror: bool = False,
    exp: bool = False,
    align_corners: bool = True,
    backend: str = "auto",
) -> None:
    """Adds softmax over classes of the bilinear resize of scores to out, in place.

    Called once for every scale of an image and its mirror image, it accumulates the sum whose argmax is the
    result of multi-scale evaluation.

    Args:
        scores: (N, C, h, w), floating, any strides.
        size: (H, W) of the whole resize.
        out: (N, C, rows, columns), the first rows <= H and columns <= W of the result; may be a window
            of a larger tensor, with stride 1 between columns. float32; float64 for float64 scores.
        mirror: whether the scores are of the mirrored image; their whole resize is flipped left-right.
        exp: whether to add exp instead of softmax, as the published evaluation does. No maximum is
            subtracted: scores above 88.7 give infinity.
        align_corners: as in torch.nn.functional.interpolate.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls,
            which allocate the full-size tensor.

    Half dtypes are resized in float32. NaN and infinity give what torch's own calls give.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    resize.check(OP, scores, size, None)
    _check_out(scores, size, out)
    chosen = backends.choose(OP, backend, can_run(scores), (scores, out))
    if chosen == "reference":
        upsample_softmax_sum_reference(scores, size, out, mirror=mirror, exp=exp, align_corners=align_corners)
    else:
        _op(scores, list(size), out, mirror, exp, align_corners, chosen)
