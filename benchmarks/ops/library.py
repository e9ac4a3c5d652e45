"""The libraries' own fused convolutions: oneDNN on a CPU, cuDNN on a GPU, batch norms folded into weights."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shelfkern.engine.cpu.library import make_conv
from shelfkern.engine.plan import Activation

Conv = Callable[..., Tensor]


def fused_conv(
    library: str,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int = 1,
    slope: float | None = 0.0,
) -> Conv:
    """A function of x and optionally a residual: act(scale * conv(x, w) + shift + residual).

    Padding is half the kernel.

    library: "oneDNN"; "cuDNN" is the convolution with a bias, the rest in place; "cuDNN fused" is
        torch.cudnn_convolution_relu and torch.cudnn_convolution_add_relu.
    """
    folded = w if scale is None else w.float() * scale[:, None, None, None]
    folded = folded.to(w.dtype).contiguous(memory_format=torch.channels_last)
    bias = None if shift is None else shift.to(w.dtype)
    if library == "oneDNN":
        return onednn(folded, bias, stride, slope)
    # cuDNN fuses relu only.
    make = cudnn_fused if library == "cuDNN fused" and slope == 0 else cudnn
    return make(folded, bias, stride, slope)


def onednn(w: Tensor, bias: Tensor | None, stride: int, slope: float | None) -> Conv:
    @functools.cache
    def laid_out_for(shape: tuple[int, ...]) -> Conv:
        return make_conv(w, None, bias, stride, Activation(slope), shape, w.dtype)

    return lambda x, residual=None: laid_out_for(tuple(x.shape))(x, residual)


def cudnn(w: Tensor, bias: Tensor | None, stride: int, slope: float | None) -> Conv:
    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, w, bias, stride, w.shape[2] // 2)
        if residual is not None:
            out += residual
        return out if slope is None else F.leaky_relu_(out, slope)

    return run


def cudnn_fused(w: Tensor, bias: Tensor | None, stride: int, slope: float | None) -> Conv:
    geometry = ([stride] * 2, [w.shape[2] // 2] * 2, [1, 1], 1)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, w, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, w, residual, 1.0, bias, *geometry)

    return run
