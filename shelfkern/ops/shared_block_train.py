"""shared_block_train: the shared-weights residual block (paper 3.3) in training, with its gradient.

Between forward and backward it keeps x, both convolutions' results, the norms' statistics, two bits per
element and the dropout's noise. The second convolution's input is recomputed in the backward pass from the
first one's result and the norm's statistics: one pass over memory, no measurable time. The second one's
result is kept: recomputing it would add a seventh convolution pass to the six of forward and backward, an
eighth of the block's time (5.5 of 41 ms, 4x64x64x64 in float32 on 2 threads).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _backends as backends
from . import _common as common
from .bn_act_dropout import (
    check_dropout,
    check_module,
    check_norm,
    draw_noise,
    empty_mask,
    forward,
    forward_into,
    gradients,
    gradients_into,
    norm_reasons,
    repeat,
    track_statistics,
)
from .conv_train import convolve, convolve_backward, is_3x3

OP = "shared_block_train"


def shared_block_train_reference(
    x: Tensor,
    conv: nn.Module,
    bn1: nn.Module,
    bn2: nn.Module,
    *,
    slope: float | None = 0.0,
    p: float = 0.0,
    skip: bool = False,
) -> Tensor:
    """The op in torch calls, for any device, dtype and norms, also in eval mode; differentiable."""
    h = F.dropout2d(common.activate(bn1(conv(x)), slope), p)
    y = F.relu(bn2(conv(h)) + x)
    return y + x if skip else y


def can_run(x: Tensor, conv: nn.Module, bn1: nn.Module, bn2: nn.Module) -> backends.Reasons:
    """Reason why each kernel of the norms cannot run; None for those that can."""
    first, second = norm_reasons(x, bn1, "bn1"), norm_reasons(x, bn2, "bn2")
    return {
        backend: _unfit(conv) or backends.unavailable(OP, backend) or first[backend] or second[backend]
        for backend in first
    }


def _unfit(conv: nn.Module) -> str | None:
    if is_3x3(conv):
        return None
    return f"conv is {conv}, the op is for Conv2d of 3x3, stride 1 and padding 1 with zeros"


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    noise: Tensor | None,
    eps1: float,
    eps2: float,
    slope: float | None,
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and tensors to keep: both convolutions' results, each norm's mean, variance and mask."""
    x = common.channels_last(x)
    first = convolve(x, weight, bias)
    h = common.borrow_channels_last(first, tuple(first.shape))
    _, *kept1 = forward_into(h, first, weight1, bias1, None, noise, eps1, slope, backend)
    second = convolve(h, weight, bias)
    out, *kept2 = forward(second, weight2, bias2, x, None, eps2, 0.0, backend)
    if skip:
        out += x
    mean1, var1, mask1 = kept1
    mean2, var2, mask2 = kept2
    return out, first, second, mean1, var1, mask1, mean2, var2, mask2


_op = backends.custom_op(OP)(_forward)


@_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    noise: Tensor | None,
    eps1: float,
    eps2: float,
    slope: float | None,
    skip: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, first, second = (common.empty_channels_last(x, tuple(x.shape)) for _ in range(3))
    mean1, var1, mean2, var2 = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(4))
    return out, first, second, mean1, var1, empty_mask(x, slope), mean2, var2, empty_mask(x, 0.0)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    noise: Tensor | None,
    first: Tensor,
    second: Tensor,
    mean1: Tensor,
    var1: Tensor,
    mask1: Tensor,
    mean2: Tensor,
    var2: Tensor,
    mask2: Tensor,
    eps1: float,
    eps2: float,
    slope: float | None,
    skip: bool,
    with_bias: bool,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias that are needed, and those of the norms' weights and biases."""
    grad_second, grad_x, grad_weight2, grad_bias2 = gradients(
        grad, second, weight2, mean2, var2, None, mask2, eps2, 0.0, True, backend
    )
    h = repeat(first, weight1, bias1, noise, mean1, var1, eps1, slope, backend)
    parts = [True, *needed[1:]]
    grad_h, grad_weight, bias_of_second = convolve_backward(
        grad_second, h, weight, with_bias, parts, overwrite=True
    )
    assert grad_h is not None
    del h, grad_second
    grad_first = common.channels_last(grad_h)
    grad_weight1, grad_bias1 = gradients_into(
        grad_first, None, grad_first, first, weight1, mean1, var1, noise, mask1, eps1, slope, backend
    )
    del grad_h
    more_x, grad_weight, bias_of_first = convolve_backward(
        grad_first, common.channels_last(x), weight, with_bias, needed, total=grad_weight
    )
    if more_x is not None:
        grad_x += more_x
    if skip:
        grad_x += grad
    grad_bias = None
    if bias_of_first is not None and bias_of_second is not None:
        grad_bias = bias_of_first + bias_of_second
    # An op must return tensors: empty ones for gradients that are not needed.
    grad_weight, grad_bias = (x.new_empty(0) if g is None else g for g in (grad_weight, grad_bias))
    return grad_x, grad_weight, grad_bias, grad_weight1, grad_bias1, grad_weight2, grad_bias2


_gradients_op = backends.custom_op(OP + "_backward")(_gradients)


@_gradients_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    noise: Tensor | None,
    first: Tensor,
    second: Tensor,
    mean1: Tensor,
    var1: Tensor,
    mask1: Tensor,
    mean2: Tensor,
    var2: Tensor,
    mask2: Tensor,
    eps1: float,
    eps2: float,
    slope: float | None,
    skip: bool,
    with_bias: bool,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, needs_weight, needs_bias = needed
    grad_weight = torch.empty_like(weight) if needs_weight else x.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[0]) if with_bias and needs_bias else x.new_empty(0)
    a, b, c, d = (torch.empty_like(mean1) for _ in range(4))
    return common.empty_channels_last(x, tuple(x.shape)), grad_weight, grad_bias, a, b, c, d


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, weight1, bias1, weight2, _, noise, *ctx.options, ctx.backend = inputs
    _, *kept = output
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, weight1, bias1, weight2, noise, *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Arguments of `_gradients`."""
    needed = list(ctx.needs_input_grad[:3])
    return grad, *ctx.saved_tensors, *ctx.options, ctx.with_bias, needed, ctx.backend


def _unpacked(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Results of `_gradients` as gradients of the inputs of `_forward`."""
    wanted = zip(found, ctx.needs_input_grad, strict=False)
    return *(gradient if needed else None for gradient, needed in wanted), *(None,) * 6


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None,) * 13 if grad is None else _unpacked(ctx, _gradients_op(*_saved(ctx, grad)))


_op.register_autograd(_backward, setup_context=_save)


class _Function(torch.autograd.Function):
    """The op without the dispatcher, like bn_act_dropout's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * 13 if grad is None else _unpacked(ctx, _gradients(*_saved(ctx, grad)))


def shared_block_train(
    x: Tensor,
    conv: nn.Module,
    bn1: nn.Module,
    bn2: nn.Module,
    *,
    slope: float | None = 0.0,
    p: float = 0.0,
    skip: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h = dropout2d(act(bn1(conv(x)))), y = relu(bn2(conv(h)) + x), + x if `skip`; with its gradient.

    The convolutions are those of `conv_train`; the norms, activations and dropout those of `bn_act_dropout`,
    with the same seeds, statistics and backends.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        conv: an nn.Conv2d(C, C, 3, padding=1). For any other, and for norms without a `bn_act_dropout`
            kernel, the modules are called one after the other.
        bn1, bn2: nn.BatchNorm2d(C) in train mode.
        slope: slope of the first activation for negative values: 0 is relu, up to 1 leaky relu, None no
            activation.
        p: probability with which a channel of an image is dropped between the convolutions.
        skip: whether x is added once more at the end, as at the entry of a down column.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, H, W), dtype of x, or autocast's dtype under autocast; channels_last from the kernels.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    x = common.autocast(x)
    common.check_4d(OP, "x", x)
    for name, module in (("conv", conv), ("bn1", bn1), ("bn2", bn2)):
        check_module(OP, name, module)
    common.check_slope(OP, slope)
    check_dropout(OP, p)
    chosen = backends.choose(OP, backend, can_run(x, conv, bn1, bn2))
    if chosen == "reference":
        return shared_block_train_reference(x, conv, bn1, bn2, slope=slope, p=p, skip=skip)
    assert isinstance(conv, nn.Conv2d) and isinstance(bn1, nn.BatchNorm2d) and isinstance(bn2, nn.BatchNorm2d)
    c = x.shape[1]
    common.check_shape(OP, "conv.weight", conv.weight, (c, c, 3, 3), f"x of {tuple(x.shape)}")
    weight, bias = common.autocast(conv.weight), common.autocast(conv.bias)
    common.check_same(OP, "conv.weight", weight, x)
    for name, bn in (("bn1", bn1), ("bn2", bn2)):
        check_norm(OP, x, bn, name)
    noise = draw_noise(x, p)
    # Tracers need the registered op.
    call = _Function.apply if type(x) is Tensor and not torch.compiler.is_compiling() else _op
    out, _, _, mean1, var1, _, mean2, var2, _ = call(
        x, weight, bias, bn1.weight, bn1.bias, bn2.weight, bn2.bias, noise,
        bn1.eps, bn2.eps, slope, skip, chosen,
    )  # fmt: skip
    count = x.numel() // c
    track_statistics(bn1, mean1, var1, count)
    track_statistics(bn2, mean2, var2, count)
    return out
