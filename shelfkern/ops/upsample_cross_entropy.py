"""upsample_cross_entropy: the loss of scores resized to the image's size, without storing them resized."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _resize as resize
from . import _triton
from ._triton import jit, tl
from .upsample_bilinear import load_columns, readers, share, source

OP = "upsample_cross_entropy"
# Pixels per Triton program of the loss kernel, one per thread: tiles of pixels by classes would spill.
LOSS_PIXELS = 128
# For the gradient kernel: pixels and classes of the output tile, and full-size columns accumulated at a time.
# 16 classes take 80 to 126 registers, 32 up to 234.
GRADIENT_PIXELS, GRADIENT_CLASSES, GRADIENT_COLUMNS = 32, 16, 32


@dataclasses.dataclass(frozen=True)
class Ohem:
    """Online hard example mining: only pixels that the model finds hard contribute to the loss.

    A pixel is kept if its loss is above -log(threshold), or if it is among the hardest `min_kept` of all
    pixels; ignored pixels count towards the total, and are kept last, with a loss of 0. The result is the
    mean over the kept pixels. Where pixels tie with the last one kept and not all fit, each of them counts an
    equal fraction.

    Attributes:
        threshold: probability of the right class above which a pixel is easy; more than 0, at most 1.
        min_kept: the fraction of all pixels, ignored ones too, from 0 to 1, rounded down to whole pixels.
    """

    threshold: float = 0.7
    min_kept: float = 1 / 16

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"Ohem: threshold is {self.threshold}, it may be above 0 and up to 1")
        if not 0 <= self.min_kept <= 1:
            raise ValueError(f"Ohem: min_kept is {self.min_kept}, it may be from 0 to 1")


def upsample_cross_entropy_reference(
    scores: Tensor,
    target: Tensor,
    size: tuple[int, int],
    align_corners: bool = True,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem: Ohem | None = None,
) -> Tensor:
    """upsample_cross_entropy in torch calls, for any device and dtype; differentiable."""
    crop = (target.shape[1], target.shape[2])
    full = common.wide(resize.reference(scores, size, crop, align_corners))
    weight = None if weight is None else weight.to(full.dtype)
    loss = functools.partial(
        F.cross_entropy,
        full,
        target.long(),
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    if ohem is None:
        return loss()
    losses = loss(reduction="none")
    ignored = target == ignore_index
    ranked = losses.detach().masked_fill(ignored, -1)
    hardest = _select(ranked, *_limits(ohem, target))
    part = _part(ranked, hardest.cutoff, hardest.share).masked_fill(ignored, 0)
    return (losses * part).sum() / hardest.kept


@dataclasses.dataclass(frozen=True)
class _Hardest:
    """The kept losses: all above cutoff, and `share` of each one equal to it; `kept` is at least 1."""

    cutoff: Tensor
    share: Tensor
    kept: Tensor
    loss: Tensor


def _limits(ohem: Ohem, target: Tensor) -> tuple[int, float]:
    """The minimum number of pixels to keep, and the loss above which all are kept."""
    return int(target.numel() * ohem.min_kept), -math.log(ohem.threshold)


def _select(losses: Tensor, least: int, threshold: float) -> _Hardest:
    """Selects which losses are kept; ignored pixels have -1, NaN is above everything."""
    # Filled on the device: copying a host scalar there would synchronize.
    cutoff = losses.new_full((), threshold)
    if least > 0:
        last = losses.flatten().topk(least, sorted=False).values.min()
        cutoff = torch.where(last > cutoff, cutoff, last)
    hard = ~(losses <= cutoff)
    above, equal = hard.sum(), (losses == cutoff).sum()
    missing = (least - above).clamp(min=0)
    # Ignored pixels fill the remaining places with a loss of 0.
    total = losses.where(hard, 0).sum(dtype=torch.float64) + missing * cutoff.clamp(min=0)
    kept = above.clamp(min=max(least, 1))
    return _Hardest(cutoff, (missing / equal.clamp(min=1)).to(losses.dtype), kept, total)


def _part(losses: Tensor, cutoff: Tensor, share: Tensor) -> Tensor:
    part = (~(losses <= cutoff)).to(losses.dtype)
    return torch.where(losses == cutoff, share, part)


def can_run(scores: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take scores; None for those that can."""
    return resize.reasons(OP, scores)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of the kernels: scores in NHWC storage, or at least with channel stride 1."""

    scores: Tensor
    target: Tensor
    size: tuple[int, int]
    align_corners: bool
    ignore_index: int
    weight: Tensor | None
    label_smoothing: float
    ohem: Ohem | None


def upsample_cross_entropy_native(problem: Problem, gradient: Tensor | None) -> Tensor:
    """The loss by the native kernel; its gradient is written to float32 (N, C, h, w), contiguous."""
    if problem.ohem is None:
        total, weight = _call_native(problem, gradient=gradient)
        scale = 1 / weight if weight else 0.0
        loss = total / weight if weight else math.nan
    else:
        losses = native.empty(tuple(problem.target.shape), torch.float32)
        _call_native(problem, losses=losses)
        cutoff, share_of_last, total, kept = native.module.select_hardest(
            losses.data_ptr(), losses.numel(), *_limits(problem.ohem, losses), torch.get_num_threads()
        )
        scale = 1 / max(kept, 1)
        loss = total * scale
        if gradient is not None:
            _call_native(problem, None, gradient, losses, cutoff, share_of_last)
    if gradient is not None:
        gradient.mul_(scale)
    return problem.scores.new_tensor(loss, dtype=torch.float32)


def _call_native(
    problem: Problem,
    losses: Tensor | None = None,
    gradient: Tensor | None = None,
    kept_of: Tensor | None = None,
    cutoff: float = 0.0,
    share_of_last: float = 0.0,
) -> tuple[float, float]:
    """Sums of the losses and of their labels' weights; raises for labels that are not a class."""
    scores, target = problem.scores, problem.target
    n, c, h, w = scores.shape
    if target.numel() == 0:
        return 0.0, 0.0
    total, weight, unknown = native.module.upsample_cross_entropy(
        scores.data_ptr(), native.DTYPE_CODES[scores.dtype], n, h, w, c,
        *problem.size, *target.shape[1:], problem.align_corners, torch.get_num_threads(),
        target.data_ptr(), target.dtype is torch.int64, problem.ignore_index,
        native.address(problem.weight), problem.label_smoothing,
        native.address(losses), native.address(gradient), native.address(kept_of), cutoff, share_of_last,
    )  # fmt: skip
    if unknown >= 0:
        raise _no_class(int(target.flatten()[unknown]), c, problem.ignore_index)
    return total, weight


def _no_class(label: int, classes: int, ignore_index: int) -> ValueError:
    allowed = f"from 0 to {classes - 1} or ignore_index {ignore_index}"
    return ValueError(f"{OP}: target has the label {label}, it may be {allowed}")


@jit
def resized_row(
    scores, image, y, left, right, across, columns, mask, scores_n, scores_h, scores_w
):  # fmt: skip
    """Some classes of a source row, interpolated along the row."""
    row = scores + conv.offsets(image, y, y * 0, scores_n, scores_h, scores_w)
    a = load_columns(row, left, columns, mask, scores_w)
    b = load_columns(row, right, columns, mask, scores_w)
    return a * (1 - across[:, None]) + b * across[:, None]


@jit
def load_class(pixels, k, mask):
    """One class of each pixel, in float32."""
    return tl.load(pixels + k, mask=mask, other=0.0).to(tl.float32)


@jit
def load_labels(target, at, mask, channels, ignore):
    """Labels of pixels (-1 where not counted or invalid), whether they count, whether they are valid."""
    label = tl.load(target + at, mask=mask, other=0).to(tl.int64)
    counts = mask & (label != ignore)
    known = (label >= 0) & (label < channels)
    return tl.where(counts & known, label, -1).to(tl.int32), counts, known


@jit
def load_weights(weight, label, WEIGHTED: tl.constexpr):
    """The weights of labels, 0 for those below 0."""
    if WEIGHTED:
        return tl.load(weight + tl.maximum(label, 0), mask=label >= 0, other=0.0)
    else:
        return tl.where(label >= 0, 1.0, 0.0)


@jit
def upsample_cross_entropy_kernel(
    scores, target, weight, log_sums, losses, sums, channels, h, w, out_h, out_w,
    scores_n, scores_h, scores_w, step_y, step_x, ignore, hard_share, smoothing, smooth_total,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, MINED: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Part of one row: each pixel's log-sum-exp and loss, and the sums of losses and weights."""
    image, y = tl.program_id(0) // out_h, tl.program_id(0) % out_h
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    at = (image.to(tl.int64) * out_h + y) * out_w + x
    label, counts, known = load_labels(target, at, x < out_w, channels, ignore)
    top, bottom, down = source(y, h, step_y, ALIGN)
    left, right, across = source(x, w, step_x, ALIGN)
    images = image + tl.zeros((PIXELS,), tl.int32)
    a = scores + conv.offsets(images, top, left, scores_n, scores_h, scores_w)
    b = scores + conv.offsets(images, top, right, scores_n, scores_h, scores_w)
    c = scores + conv.offsets(images, bottom, left, scores_n, scores_h, scores_w)
    d = scores + conv.offsets(images, bottom, right, scores_n, scores_h, scores_w)

    greatest = tl.full((PIXELS,), float("-inf"), tl.float32)
    total = tl.zeros((PIXELS,), tl.float32)
    shown = tl.zeros((PIXELS,), tl.float32)
    even = tl.zeros((PIXELS,), tl.float32)
    for k in range(0, channels):
        above = load_class(a, k, x < out_w) * (1 - across) + load_class(b, k, x < out_w) * across
        below = load_class(c, k, x < out_w) * (1 - across) + load_class(d, k, x < out_w) * across
        value = above * (1 - down) + below * down
        if SMOOTH:
            even += value * (tl.load(weight + k) * smoothing)
        shown = tl.where(label == k, value, shown)
        higher = tl.maximum(greatest, value)
        total = total * tl.exp(greatest - higher) + tl.exp(value - higher)
        greatest = higher

    hard = load_weights(weight, label, WEIGHTED) * hard_share
    log_sum = tl.log(total)
    loss = hard * ((greatest - shown) + log_sum)
    if SMOOTH:
        loss += tl.load(smooth_total) * (greatest + log_sum) - even
    # An invalid label makes the loss NaN.
    loss = tl.where(counts, tl.where(known, loss, float("nan")), 0.0)
    tl.store(log_sums + at, greatest + log_sum, mask=x < out_w)
    if MINED:
        tl.store(losses + at, tl.where(counts, loss, -1.0), mask=x < out_w)
    to = sums + 2 * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    tl.store(to, tl.sum(loss, 0))
    tl.store(to + 1, tl.sum(load_weights(weight, label, WEIGHTED), 0))


@jit
def upsample_cross_entropy_backward_kernel(
    scores, target, weight, log_sums, losses, selection, out, channels, h, w, out_h, out_w,
    scores_n, scores_h, scores_w, step_y, step_x, inverse_y, inverse_x, ignore, hard_share, smoothing,
    smooth_total,
    ALIGN: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, MINED: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Part of one row of the gradient of the summed losses, for some classes.

    The full-size rows that read this source row lie between its neighbours, so three source rows,
    interpolated along the row, are enough for all of them.
    """
    image, y = tl.program_id(0) // h, tl.program_id(0) % h
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    classes = tl.program_id(2) * CLASSES + tl.arange(0, CLASSES)
    top, bottom = readers(y, y, h, out_h, inverse_y, ALIGN)
    last = tl.minimum(tl.program_id(1) * PIXELS + PIXELS, w) - 1
    first, end = readers(tl.program_id(1) * PIXELS, last, w, out_w, inverse_x, ALIGN)
    images = image + tl.zeros((1,), tl.int32)
    here = y + tl.zeros((1,), tl.int32)
    all_smooth = 0.0
    if SMOOTH:
        all_smooth = tl.load(smooth_total)
        smooth = load_weights(weight, tl.where(classes < channels, classes, -1), WEIGHTED) * smoothing

    result = tl.zeros((PIXELS, CLASSES), tl.float32)
    for start in range(first, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < end
        mask = inside[:, None] & (classes < channels)[None, :]
        left, right, across = source(columns, w, step_x, ALIGN)
        before = resized_row(
            scores, images, tl.maximum(here - 1, 0), left, right, across, classes, mask,
            scores_n, scores_h, scores_w,
        )  # fmt: skip
        middle = resized_row(
            scores, images, here, left, right, across, classes, mask, scores_n, scores_h, scores_w
        )
        after = resized_row(
            scores, images, tl.minimum(here + 1, h - 1), left, right, across, classes, mask,
            scores_n, scores_h, scores_w,
        )  # fmt: skip
        sums = tl.zeros((COLUMNS, CLASSES), tl.float32)
        for row in range(top, bottom):
            down = share(row + tl.arange(0, 1), here, h, step_y, ALIGN)
            from_above = share(row + tl.arange(0, 1), here - 1, h, step_y, ALIGN)
            from_below = share(row + tl.arange(0, 1), here + 1, h, step_y, ALIGN)
            value = before * from_above[:, None] + middle * down[:, None] + after * from_below[:, None]
            at = (image.to(tl.int64) * out_h + row) * out_w + columns
            read = inside & (down > 0.0)
            label, counts, _ = load_labels(target, at, read, channels, ignore)
            part = tl.where(counts, down, 0.0)
            if MINED:
                loss = tl.load(losses + at, mask=read, other=-1.0)
                cutoff, shared = tl.load(selection), tl.load(selection + 1)
                part *= tl.where(loss == cutoff, shared, tl.where(loss <= cutoff, 0.0, 1.0))
            hard = load_weights(weight, label, WEIGHTED) * hard_share
            log_sum = tl.load(log_sums + at, mask=read, other=float("inf"))
            gradient = tl.exp(value - log_sum[:, None]) * (hard + all_smooth)[:, None]
            gradient -= tl.where(classes[None, :] == label[:, None], hard[:, None], 0.0)
            if SMOOTH:
                gradient -= smooth[None, :]
            sums += gradient * part[:, None]
        weights = share(columns[None, :], x[:, None], w, step_x, ALIGN)
        # Three TF32 products replace one of float32: as accurate, on tensor cores.
        result += tl.dot(tl.where(inside[None, :], weights, 0.0), sums, input_precision="tf32x3")
    plane = image.to(tl.int64) * channels + classes
    to = (plane[None, :] * h + y) * w + x[:, None]
    tl.store(out + to, result, mask=(x < w)[:, None] & (classes < channels)[None, :])


def upsample_cross_entropy_triton(problem: Problem, gradient: Tensor | None) -> Tensor:
    """The loss by the Triton kernels; its gradient is written to float32 (N, C, h, w), contiguous."""
    target, mined = problem.target, problem.ohem is not None
    log_sums = target.new_empty(target.shape, dtype=torch.float32)
    losses = torch.empty_like(log_sums) if mined else None
    total, weight = _losses_triton(problem, log_sums, losses)
    selection = None
    if problem.ohem is None:
        scale = torch.where(weight > 0, 1 / weight, 0)
        loss = total / weight
    else:
        assert losses is not None
        hardest = _select(losses, *_limits(problem.ohem, losses))
        selection = torch.stack([hardest.cutoff, hardest.share])
        scale = 1 / hardest.kept
        loss = hardest.loss * scale
    if gradient is not None:
        _gradient_triton(problem, log_sums, losses, selection, gradient)
        gradient.mul_(scale.to(torch.float32))
    return loss.to(torch.float32)


def _losses_triton(problem: Problem, log_sums: Tensor, losses: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fills log_sums and losses; returns float64 sums of the losses and of their labels' weights."""
    n, out_h, out_w = problem.target.shape
    blocks = conv.cdiv(out_w, LOSS_PIXELS)
    sums = log_sums.new_zeros((n * out_h * blocks, 2))
    if problem.target.numel():
        with _triton.on_device_of(log_sums):
            upsample_cross_entropy_kernel[(n * out_h, blocks)](
                problem.scores, problem.target, problem.weight, log_sums, losses, sums,
                **_arguments(problem), MINED=losses is not None, PIXELS=LOSS_PIXELS, num_warps=4,
            )  # fmt: skip
    total, weight = sums.sum(0, dtype=torch.float64)
    return total, weight


def _gradient_triton(
    problem: Problem, log_sums: Tensor, losses: Tensor | None, selection: Tensor | None, out: Tensor
) -> None:
    n, c, h, w = out.shape
    if problem.target.numel() == 0:
        out.zero_()
        return
    arguments = _arguments(problem)
    # If all positions read the same source, any value large enough to reach the last position works.
    inverses = [
        1 / arguments[step] if arguments[step] else float(full)
        for step, full in zip(("step_y", "step_x"), problem.size, strict=True)
    ]
    blocks = conv.cdiv(w, GRADIENT_PIXELS), conv.cdiv(c, GRADIENT_CLASSES)
    with _triton.on_device_of(out):
        upsample_cross_entropy_backward_kernel[(n * h, blocks[0], blocks[1])](
            problem.scores, problem.target, problem.weight, log_sums, losses, selection, out,
            **arguments, inverse_y=inverses[0], inverse_x=inverses[1], MINED=losses is not None,
            PIXELS=GRADIENT_PIXELS, COLUMNS=GRADIENT_COLUMNS, CLASSES=GRADIENT_CLASSES, num_warps=4,
        )  # fmt: skip


def _arguments(problem: Problem) -> dict[str, Any]:
    """Arguments shared by both kernels."""
    scores, (_, out_h, out_w) = problem.scores, problem.target.shape
    _, c, h, w = scores.shape
    stride_n, stride_h, stride_w = common.strides(scores)
    smoothing, smooth_total = problem.label_smoothing / c, None
    if smoothing:
        assert problem.weight is not None
        smooth_total = problem.weight.sum() * smoothing
    return dict(
        channels=c, h=h, w=w, out_h=out_h, out_w=out_w,
        scores_n=stride_n, scores_h=stride_h, scores_w=stride_w,
        step_y=resize.step(h, problem.size[0], problem.align_corners),
        step_x=resize.step(w, problem.size[1], problem.align_corners),
        ignore=problem.ignore_index, hard_share=1 - problem.label_smoothing, smoothing=smoothing,
        smooth_total=smooth_total, ALIGN=problem.align_corners, WEIGHTED=problem.weight is not None,
        SMOOTH=smoothing > 0,
    )  # fmt: skip


@backends.custom_op(OP)
def _op(
    scores: Tensor,
    target: Tensor,
    size: list[int],
    align_corners: bool,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    ohem: list[float],
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient if requested: computed together, so no full-size tensor is kept for it."""
    scores = common.channels_innermost(scores) if backend == "triton" else common.channels_last(scores)
    weight = None if weight is None else common.float32(weight)
    if backend == "triton" and label_smoothing and weight is None:
        weight = scores.new_ones(scores.shape[1], dtype=torch.float32)
    problem = Problem(
        scores, target.contiguous(), (size[0], size[1]), align_corners, ignore_index, weight, label_smoothing,
        Ohem(*ohem) if ohem else None,
    )  # fmt: skip
    gradient = _empty_gradient(scores, with_gradient)
    run = upsample_cross_entropy_triton if backend == "triton" else upsample_cross_entropy_native
    return run(problem, gradient if with_gradient else None), gradient


def _empty_gradient(scores: Tensor, with_gradient: bool) -> Tensor:
    return scores.new_empty(scores.shape if with_gradient else (0,), dtype=torch.float32)


@_op.register_fake
def _(
    scores: Tensor,
    target: Tensor,
    size: list[int],
    align_corners: bool,
    ignore_index: int,
    weight: Tensor | None,
    label_smoothing: float,
    ohem: list[float],
    backend: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty((), dtype=torch.float32), _empty_gradient(scores, with_gradient)


# Scores are an input so that a second derivative, which would need them, raises instead of being dropped.
@backends.custom_op(f"{OP}_backward")
def _backward_op(loss_gradient: Tensor, gradient: Tensor, scores: Tensor) -> Tensor:
    return (gradient * loss_gradient).to(scores.dtype, copy=True)


@_backward_op.register_fake
def _(loss_gradient: Tensor, gradient: Tensor, scores: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=scores.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _gradient(ctx: Any, loss_gradient: Tensor, _: Any) -> tuple[Any, ...]:
    return _backward_op(loss_gradient, *ctx.saved_tensors), *[None] * 9


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_second(ctx: Any, gradient: Tensor) -> None:
    raise RuntimeError(f"{OP}: the kernels have no second derivative, backend='reference' has")


_op.register_autograd(_gradient, setup_context=_keep)
_backward_op.register_autograd(_no_second, setup_context=_keep_nothing)


def upsample_cross_entropy(
    scores: Tensor,
    target: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = True,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ohem: Ohem | None = None,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.cross_entropy of the bilinear resize of scores, without full-size scores.

    Neither the full-size scores nor their gradient are ever stored: the kernels compute the gradient at the
    size of scores together with the loss, in float32 and in a fixed order, so that it is bit-identical in
    every run and for any number of threads. With `ohem` one float32 per pixel is stored during the call.

    Args:
        scores: (N, C, h, w), floating, any strides.
        target: (N, H, W) uint8 or int64: classes, or ignore_index.
        size: height and width of the whole resize, of which target is the top left part.
        align_corners: whether the centres of corner pixels are aligned.
        ignore_index: label of pixels without a loss; any integer.
        weight: (C,), at least 0: weight of each class in the mean, as in torch's function.
        label_smoothing: from 0 to 1, as in torch's function.
        ohem: which pixels are kept, as in the training of the paper's real-time models; all by default.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        A scalar, float64 for float64 scores, otherwise float32: the mean over labels, weighted by `weight`;
        NaN where all pixels are ignored, with a gradient of 0, as in torch. With `ohem` the unweighted mean
        of the kept losses, and 0 where all pixels are ignored.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a CPU, also for a label that
            is neither a class nor ignore_index; on a GPU such a label makes the loss NaN, because checking
            would synchronize.
        RuntimeError: the backend asked for cannot run, weight requires grad, or a second derivative is asked
            for, which only torch's calls have.
    """
    _check(scores, target, size, weight, label_smoothing)
    if ohem is not None and not isinstance(ohem, Ohem):
        raise TypeError(f"{OP}: ohem is {ohem!r}, it must be an Ohem or None")
    chosen = backends.choose(OP, backend, can_run(scores), (weight,))
    if chosen == "reference":
        _check_labels(target, scores.shape[1], ignore_index)
        return upsample_cross_entropy_reference(
            scores, target, size, align_corners, ignore_index, weight, label_smoothing, ohem
        )
    limits = [] if ohem is None else [ohem.threshold, ohem.min_kept]
    options = (list(size), align_corners, ignore_index, weight, label_smoothing, limits, chosen)
    return _op(scores, target, *options, backends.needs_grad(scores))[0]


def _check(
    scores: Tensor, target: Tensor, size: tuple[int, int], weight: Tensor | None, label_smoothing: float
) -> None:
    common.check_4d(OP, "scores", scores)
    if scores.shape[1] == 0:
        raise ValueError(f"{OP}: scores is {tuple(scores.shape)}, it must have a class at least")
    common.check_tensor(OP, "target", target)
    if target.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"{OP}: target is {target.dtype}, it may be torch.uint8 or torch.int64")
    if target.ndim != 3 or target.shape[0] != scores.shape[0]:
        raise ValueError(
            f"{OP}: target is {tuple(target.shape)}, scores of {tuple(scores.shape)} need "
            f"({scores.shape[0]}, height, width)"
        )
    common.check_device(OP, "target", target, scores)
    resize.check(OP, scores, size, None)
    if min(target.shape[1:]) < 1 or target.shape[1] > size[0] or target.shape[2] > size[1]:
        raise ValueError(
            f"{OP}: target has {target.shape[1]} x {target.shape[2]} pixels, it may have from 1 x 1 to size "
            f"{size[0]} x {size[1]}"
        )
    if weight is not None:
        common.check_shape(OP, "weight", weight, (scores.shape[1],), f"scores of {tuple(scores.shape)}")
        common.check_device(OP, "weight", weight, scores)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{OP}: label_smoothing is {label_smoothing}, it may be from 0 to 1")


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Checks labels on a CPU, with a clear message; on a GPU torch's own check ends the process."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = target[(target != ignore_index) & ((target >= classes) | (target < 0))]
    if wrong.numel():
        raise _no_class(int(wrong[0]), classes, ignore_index)
