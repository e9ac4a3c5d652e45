"""conv_train: 3x3 convolutions of stride 1 in training on a CPU, with the input's gradient, by Winograd.

Both are one kernel, the gradient's with the weights turned and transposed. In float32 oneDNN's direct
convolutions take 2.7 to 3.4 times as long (64 to 256 channels, 4096 to 256 pixels an image, batches of 4, 2
threads); in bfloat16 1.5 times, which transforming the weights at every step spends. The weights' gradient is
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import native
from . import _common as common
from ._conv_winograd import PackedWinograd, can_pay, conv_winograd_native, pays, weight_transform
from .conv_bn_act import PANEL

# Weights change at every step and are transformed for each pass: for 256 x 256 channels in 1.2 ms where so
# many pixels are convolved 7 ms sooner. With a quarter of them a ShelfNet50's step is no faster.
LEAST_PIXELS = 2048
# Bytes. Transformed weights of 512 x 512 channels leave the caches, and take 15 ms.
MOST_TRANSFORMED = 16 * 1024 * 1024
TRANSFORM = torch.kron(weight_transform(4), weight_transform(4)).float()


def takes_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether a 3x3 convolution of stride 1 and padding 1 is faster by Winograd's, weights and all."""
    n, _, h, w = x.shape
    fits = x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32
    if not fits or native.reason("conv_train") is not None or not can_pay(weight, 1, 1):
        return False
    small = weight.shape[0] * weight.shape[1] * len(TRANSFORM) * 4 <= MOST_TRANSFORMED
    return small and n * h * w >= LEAST_PIXELS and pays((n, weight.shape[0], h, w))


def pack(weight: Tensor) -> PackedWinograd:
    """Weights (K, C, 3, 3) transformed in float32: for one pass, in a tenth of the time of float64."""
    k, c = weight.shape[:2]
    panels = -(-k // PANEL)
    padded = F.pad(weight.detach().flatten(2), (0, 0, 0, 0, 0, panels * PANEL - k))
    taps = padded.view(panels, PANEL, c, 9).permute(0, 3, 2, 1).reshape(panels, 9, c * PANEL)
    return PackedWinograd((TRANSFORM @ taps).view(panels, -1, c, PANEL), k, c, 4, 1, False)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    out = common.empty_channels_last(x, (n, weight.shape[0], h, w))
    conv_winograd_native(common.channels_last(x), pack(weight), None, bias, None, None, out, None)
    return out


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3, stride 1, padding 1; the result in NHWC storage. Not recorded by autograd where by Winograd."""
    if takes_winograd(x, weight):
        return _filtered(x, weight, bias)
    return common.channels_last(F.conv2d(x, weight, bias, padding=1))


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that are needed."""
    filtered = needed[0] and takes_winograd(grad, weight.transpose(0, 1))
    grad_x = _filtered(grad, weight.flip(2, 3).transpose(0, 1), None) if filtered else None
    mask = [needed[0] and not filtered, needed[1], with_bias and needed[2]]
    if not any(mask):
        return grad_x, None, None
    sizes = [weight.shape[0]] if with_bias else None
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )
    return grad_x if filtered else found[0], found[1], found[2]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.with_bias = bias is not None
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return convolve_backward(common.channels_last(grad), x, weight, ctx.with_bias, ctx.needs_input_grad)


def conv_train(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x), by Winograd's filtering where that is faster: on a CPU, and what is not traced.

    In float32 its error is at most 4.5 times that of a direct convolution.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        conv: any module; faster is an nn.Conv2d of 3x3, stride 1 and padding 1 with 32 or more channels
            in float32.

    Returns:
        What conv gives; channels_last where by Winograd.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or not is_3x3(conv):
        return conv(x)
    assert isinstance(conv, nn.Conv2d)
    fits = x.ndim == 4 and x.shape[1] == conv.in_channels and not torch.is_autocast_enabled(x.device.type)
    if not fits or not takes_winograd(x, conv.weight):
        return conv(x)
    return _Function.apply(x, conv.weight, conv.bias)


def is_3x3(conv: nn.Module) -> bool:
    """Whether it is a plain 3x3 convolution of stride 1, padded with zeros to keep the size."""
    if type(conv) is not nn.Conv2d:
        return False
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
