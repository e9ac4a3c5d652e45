"""bn_act_conv_train: batch norm, activation, Dropout2d and the convolution that follows, in training.

Between forward and backward it keeps only x, the norm's statistics and one bit per element: the convolution's
input is recomputed in the backward pass, in one pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _backends as backends
from . import _common as common
from .bn_act_dropout import (
    bn_act_dropout,
    can_run,
    check_dropout,
    check_module,
    check_norm,
    draw_noise,
    forward_into,
    gradients_into,
    repeat,
    track_statistics,
)
from .conv_train import Geometry, conv_train, convolve, convolve_backward

OP = "bn_act_conv_train"


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        noise: Tensor | None,
        kernel: Tensor,
        kernel_bias: Tensor | None,
        eps: float,
        slope: float | None,
        geometry: Geometry,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = common.borrow_channels_last(x, tuple(x.shape))
        _, mean, var, mask = forward_into(h, x, weight, bias, None, noise, eps, slope, backend)
        ctx.with_bias, ctx.options, ctx.geometry = kernel_bias is not None, (eps, slope, backend), geometry
        ctx.save_for_backward(x, weight, bias, noise, mean, var, mask, kernel)
        ctx.mark_non_differentiable(mean, var)
        return convolve(h, kernel, kernel_bias, geometry), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, noise, mean, var, mask, kernel = ctx.saved_tensors
        eps, slope, backend = ctx.options
        needed = [any(ctx.needs_input_grad[:3]), *ctx.needs_input_grad[4:6]]
        h = repeat(x, weight, bias, noise, mean, var, eps, slope, backend)
        grad_h, *of_conv = convolve_backward(
            grad, h, kernel, ctx.with_bias, needed, ctx.geometry, overwrite=True
        )
        del h
        if grad_h is None:
            return None, None, None, None, *of_conv, None, None, None, None
        grad_x = common.channels_last(grad_h)
        found = gradients_into(grad_x, None, grad_x, x, weight, mean, var, noise, mask, eps, slope, backend)
        of_norm = (None, None) if weight is None else found
        return grad_x, *of_norm, None, *of_conv, None, None, None, None


def bn_act_conv_train(
    x: Tensor,
    bn: nn.Module,
    conv: nn.Module,
    *,
    slope: float | None = 0.0,
    p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """conv(dropout2d(act(bn(x)))) in training, with its gradient.

    The norm, activation and dropout are those of `bn_act_dropout`, with the same seeds and statistics; the
    convolution is that of `conv_train`. These two are called in turn where the kernels cannot run, conv is
    not an nn.Conv2d, autocast would round x, or a compiler traces, which itself decides what to keep.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        bn: an nn.BatchNorm2d(C) in train mode with float32 parameters.
        conv: an nn.Conv2d of C channels.
        slope: slope of the activation for negative values: 0 is relu, up to 1 leaky relu, None no activation.
        p: probability with which a channel of an image is dropped before the convolution.
        backend: one of `BACKENDS`, for the norm; "auto" takes the best kernel that can run, else torch's own
            calls.

    Returns:
        Result of conv, dtype of x; channels_last from the kernels.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    check_module(OP, "bn", bn)
    check_module(OP, "conv", conv)
    common.check_slope(OP, slope)
    check_dropout(OP, p)
    chosen = backends.choose("bn_act_dropout", backend, can_run(x, bn))
    geometry = Geometry.of(conv)
    traced = type(x) is not Tensor or torch.compiler.is_compiling()
    if chosen == "reference" or geometry is None or traced or common.autocast(x).dtype is not x.dtype:
        return conv_train(bn_act_dropout(x, bn, slope=slope, p=p, backend=backend), conv)
    assert isinstance(bn, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
    check_norm(OP, x, bn)
    kernel, kernel_bias = common.autocast(conv.weight), common.autocast(conv.bias)
    shape = (conv.out_channels, x.shape[1] // conv.groups, *conv.kernel_size)
    common.check_shape(OP, "conv.weight", kernel, shape, f"x of {tuple(x.shape)}")
    common.check_same(OP, "conv.weight", kernel, x)
    noise = draw_noise(x, p)
    out, mean, var = _Function.apply(
        x, bn.weight, bn.bias, noise, kernel, kernel_bias, bn.eps, slope, geometry, chosen
    )
    track_statistics(bn, mean, var, x.numel() // x.shape[1])
    return out
