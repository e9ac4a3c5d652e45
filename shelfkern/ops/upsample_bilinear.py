"""upsample_bilinear: class scores resized to the image's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _resize as resize
from . import _triton
from ._triton import gdc_launch_dependents, gdc_wait, jit, rounded, tl

OP = "upsample_bilinear"
# Output elements per Triton program.
TRITON_TILE = 1024
# For the gradient kernel: pixels of the output tile, and full-size rows and columns accumulated at a time.
GRADIENT_PIXELS, GRADIENT_ROWS, GRADIENT_COLUMNS = 32, 16, 64


def upsample_bilinear_reference(
    scores: Tensor, size: tuple[int, int], crop: tuple[int, int], align_corners: bool = True
) -> Tensor:
    """upsample_bilinear in torch calls, for any device and dtype; differentiable."""
    return resize.reference(scores, size, crop, align_corners)


def can_run(scores: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


def upsample_bilinear_native(scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool) -> None:
    """Runs the native kernel into the contiguous `out` (N, C, crop), unchecked: scores in NHWC storage."""
    resize.run_native(OP, scores, size, out, align_corners)


@jit
def upsample_bilinear_kernel(
    scores, out, channels, h, w, out_h, out_w, scores_n, scores_h, scores_w, step_y, step_x,
    ALIGN: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Part of one output row, for some classes."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    image, y = tl.program_id(0) // out_h, tl.program_id(0) % out_h
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    columns = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (x < out_w)[:, None] & (columns < channels)[None, :]

    # A row index as a one-element tensor, so that both axes share the code.
    top, bottom, down = source(y + tl.arange(0, 1), h, step_y, ALIGN)
    left, right, across = source(x, w, step_x, ALIGN)
    image = image + tl.zeros((1,), tl.int32)
    upper = scores + conv.offsets(image, top, top * 0, scores_n, scores_h, scores_w)
    lower = scores + conv.offsets(image, bottom, bottom * 0, scores_n, scores_h, scores_w)
    a = load_columns(upper, left, columns, mask, scores_w)
    b = load_columns(upper, right, columns, mask, scores_w)
    c = load_columns(lower, left, columns, mask, scores_w)
    d = load_columns(lower, right, columns, mask, scores_w)
    across, down = across[:, None], down[:, None]
    above, below = a * (1 - across) + b * across, c * (1 - across) + d * across
    result = above * (1 - down) + below * down

    plane = (image.to(tl.int64) * channels + columns) * out_h + y
    to = plane[None, :] * out_w + x[:, None]
    tl.store(out + to, rounded(result, out), mask=mask)


@jit
def source(position, size, step, ALIGN: tl.constexpr):
    """The two taps of output positions along one axis, and the weight of the second."""
    if ALIGN:
        at = position.to(tl.float32) * step
    else:
        at = tl.maximum((position.to(tl.float32) + 0.5) * step - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), size - 1)
    # An axis that keeps its size has one tap, so that an infinity is never multiplied by zero.
    second = tl.where(step == 1.0, first, tl.minimum(first + 1, size - 1))
    return first, second, tl.minimum(at - first.to(tl.float32), 1.0)


@jit
def load_columns(row, x, columns, mask, stride_w):
    """The pixels at x of a row, some classes of each, in float32."""
    at = row + x.to(tl.int64) * stride_w
    return tl.load(at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


def upsample_bilinear_triton(
    scores: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool, overlap: bool = False
) -> None:
    """Runs the Triton kernel into contiguous `out` (N, C, crop), unchecked: channel stride 1 in scores."""
    n, c, h, w = scores.shape
    if n * c == 0:
        return
    overlap = overlap and _triton.overlaps_launches(scores)
    block_c = min(32, 1 << (c - 1).bit_length())
    block_x = TRITON_TILE // block_c
    step_y, step_x = (resize.step(a, b, align_corners) for a, b in ((h, size[0]), (w, size[1])))
    out_h, out_w = out.shape[2:]
    with _triton.on_device_of(scores):
        upsample_bilinear_kernel[(n * out_h, conv.cdiv(out_w, block_x), conv.cdiv(c, block_c))](
            scores, out, c, h, w, out_h, out_w, *common.strides(scores), step_y, step_x,
            ALIGN=align_corners, BLOCK_X=block_x, BLOCK_C=block_c, OVERLAP=overlap,
            num_warps=4, **(dict(launch_pdl=True) if overlap else {}),
        )  # fmt: skip


def upsample_bilinear_backward_native(
    gradient: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool
) -> None:
    """Writes the gradient of scores to `out` (N, C, h, w), unchecked: both contiguous, of one dtype."""
    n, c, h, w = out.shape
    native.module.upsample_bilinear_backward(
        gradient.data_ptr(), out.data_ptr(), native.DTYPE_CODES[out.dtype], n, h, w, c,
        *size, *gradient.shape[2:], align_corners, torch.get_num_threads(),
    )  # fmt: skip


@jit
def upsample_bilinear_backward_kernel(
    gradient, out, h, w, out_h, out_w, step_y, step_x, inverse_y, inverse_x,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Part of one row of one class's gradient: full-size rows are added first, then columns."""
    plane, y = tl.program_id(0) // h, tl.program_id(0) % h
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    top, bottom = readers(y, y, h, out_h, inverse_y, ALIGN)
    last = tl.minimum(tl.program_id(1) * PIXELS + PIXELS, w) - 1
    left, right = readers(tl.program_id(1) * PIXELS, last, w, out_w, inverse_x, ALIGN)
    gradient += plane.to(tl.int64) * out_h * out_w

    result = tl.zeros((PIXELS,), tl.float32)
    for start in range(left, right, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        sums = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(top, bottom, ROWS):
            rows = begin + tl.arange(0, ROWS)
            weights = tl.where(rows < bottom, share(rows, y, h, step_y, ALIGN), 0.0)
            # Values with weight 0 are not read: they may be infinite.
            mask = (weights > 0.0)[:, None] & (columns < right)[None, :]
            at = gradient + rows.to(tl.int64)[:, None] * out_w + columns[None, :]
            values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            sums += tl.sum(values * weights[:, None], 0)
        weights = share(columns[:, None], x[None, :], w, step_x, ALIGN)
        result += tl.sum(tl.where(weights > 0.0, sums[:, None] * weights, 0.0), 0)
    to = out + (plane.to(tl.int64) * h + y) * w + x
    tl.store(to, rounded(result, out), mask=x < w)


@jit
def readers(first, last, size, out_size, inverse, ALIGN: tl.constexpr):
    """Range of output positions that read source positions first to last, widened slightly for rounding."""
    shift = 0.0 if ALIGN else 0.5
    begin = ((first - 1).to(tl.float32) + shift) * inverse - shift
    end = ((last + 1).to(tl.float32) + shift) * inverse - shift
    begin = tl.where(first == 0, 0, tl.maximum(begin.to(tl.int32) - 1, 0))
    # The last source position is read by all output positions beyond it.
    end = tl.where(last == size - 1, out_size, tl.minimum(end.to(tl.int32) + 2, out_size))
    return begin, end


@jit
def share(position, target, size, step, ALIGN: tl.constexpr):
    """The weight with which output positions read a source position."""
    first, second, fraction = source(position, size, step, ALIGN)
    fraction = tl.where(first == second, 0.0, fraction)
    return tl.where(first == target, 1 - fraction, 0.0) + tl.where(second == target, fraction, 0.0)


def upsample_bilinear_backward_triton(
    gradient: Tensor, size: tuple[int, int], out: Tensor, align_corners: bool
) -> None:
    """Runs the Triton kernel for the gradient into `out` (N, C, h, w), unchecked: both contiguous."""
    n, c, h, w = out.shape
    if n * c == 0:
        return
    steps = [resize.step(a, b, align_corners) for a, b in ((h, size[0]), (w, size[1]))]
    # If all positions read the same source, any value large enough to reach the last position works.
    inverses = [1 / step if step else float(full) for step, full in zip(steps, size, strict=True)]
    with _triton.on_device_of(out):
        upsample_bilinear_backward_kernel[(n * c * h, conv.cdiv(w, GRADIENT_PIXELS))](
            gradient, out, h, w, *gradient.shape[2:], *steps, *inverses,
            ALIGN=align_corners, PIXELS=GRADIENT_PIXELS, ROWS=GRADIENT_ROWS, COLUMNS=GRADIENT_COLUMNS,
            num_warps=4,
        )  # fmt: skip


@backends.custom_op(OP)
def _op(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
    out = scores.new_empty((*scores.shape[:2], *crop))
    if backend == "triton":
        scores = common.channels_innermost(scores)
        upsample_bilinear_triton(scores, (size[0], size[1]), out, align_corners)
    else:
        upsample_bilinear_native(common.channels_last(scores), (size[0], size[1]), out, align_corners)
    return out


@_op.register_fake
def _(scores: Tensor, size: list[int], crop: list[int], align_corners: bool, backend: str) -> Tensor:
    return scores.new_empty((*scores.shape[:2], *crop))


@backends.custom_op(f"{OP}_backward")
def _backward_op(
    gradient: Tensor, size: list[int], low: list[int], align_corners: bool, backend: str
) -> Tensor:
    out = gradient.new_empty((*gradient.shape[:2], *low))
    run = upsample_bilinear_backward_triton if backend == "triton" else upsample_bilinear_backward_native
    run(gradient.contiguous(), (size[0], size[1]), out, align_corners)
    return out


@_backward_op.register_fake
def _(gradient: Tensor, size: list[int], low: list[int], align_corners: bool, backend: str) -> Tensor:
    return gradient.new_empty((*gradient.shape[:2], *low))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, ctx.size, _, ctx.align_corners, ctx.backend = inputs
    ctx.low = list(scores.shape[2:])


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return _backward_op(gradient, ctx.size, ctx.low, ctx.align_corners, ctx.backend), None, None, None, None


def _keep_of_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, ctx.size, _, ctx.align_corners, ctx.backend = inputs
    ctx.crop = list(gradient.shape[2:])


def _gradient_of_gradient(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    # The gradient is linear, so its own gradient is the resize.
    return _op(gradient, ctx.size, ctx.crop, ctx.align_corners, ctx.backend), None, None, None, None


_op.register_autograd(_gradient, setup_context=_keep)
_backward_op.register_autograd(_gradient_of_gradient, setup_context=_keep_of_gradient)


def upsample_bilinear(
    scores: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int] | None = None,
    align_corners: bool = True,
    *,
    backend: str = "auto",
) -> Tensor:
    """The bilinear resize of scores, as torch.nn.functional.interpolate.

    The gradient is a gather: each pixel of scores sums the gradients of the pixels that read it, in a fixed
    order, so that it is bit-identical in every run.

    Args:
        scores: (N, C, h, w), floating, any strides.
        size: (H, W) of the whole resize.
        crop: number of rows and columns to compute, from the top left; all by default.
        align_corners: whether the centres of corner pixels are aligned.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, *crop), contiguous from the native kernel, dtype of scores.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    crop = resize.check(OP, scores, size, crop)
    chosen = backends.choose(OP, backend, can_run(scores))
    if chosen == "reference":
        return upsample_bilinear_reference(scores, size, crop, align_corners)
    return _op(scores, list(size), list(crop), align_corners, chosen)
