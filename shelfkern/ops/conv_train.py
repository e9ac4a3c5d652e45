"""conv_train: convolutions in training on a CPU.

3x3 of stride 1 and the gradient of their input are by Winograd, in one kernel, the gradient's with the
weights turned and transposed. In float32 oneDNN's direct convolutions take 2.7 to 3.4 times as long (64 to
256 channels, 4096 to 256 pixels an image, batches of 4, 2 threads); in bfloat16 1.5 times, which transforming
the weights at every step spends.

With few pixels the weights' gradient of any convolution is a product of matrices, in the layout in which
weights are kept. oneDNN makes it in a layout of its own and copies it: for 512 x 512 channels 18 MiB more.
"""

from __future__ import annotations

import dataclasses
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
# What products of matrices are made of.
PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
TRANSFORM = torch.kron(weight_transform(4), weight_transform(4)).float()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a convolution does beside its weights; by rows and columns."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Module) -> Geometry | None:
        """Of an nn.Conv2d that pads so many zeros; None of other modules."""
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)

    def size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of the result."""
        sides = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        h, w = ((n + 2 * pad - gap * (k - 1) - 1) // by + 1 for n, k, by, pad, gap in sides)
        return h, w


# Of `is_3x3`.
SAME_3X3 = Geometry()


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


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    n, _, h, w = x.shape
    if out is None:
        out = common.keep_channels_last(x, (n, weight.shape[0], h, w))
    conv_winograd_native(common.channels_last(x), pack(weight), None, bias, None, None, out, None)
    return out


def _is_filtered(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    return geometry == SAME_3X3 and takes_winograd(x, weight)


def takes_products(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the gradient of a convolution's weights is better a product of matrices.

    With no more pixels in the result than channels it takes 0.3 to 1.1 of oneDNN's time, with twice as many
    1 to 1.4 (1x1 and 3x3, 256 to 2048 channels, float32 and bfloat16, 2 threads).
    """
    h, w = geometry.size(x, weight)
    fits = x.device.type == "cpu" and weight.dtype in PRODUCT_DTYPES and geometry.groups == 1
    return fits and 0 < x.shape[0] * h * w <= weight.shape[0] and min(h, w) > 0


def _columns(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """What each pixel of the result meets, (pixels, taps * C): x itself for 1x1 of stride 1, else a copy."""
    n, c = x.shape[:2]
    h, w = geometry.size(x, weight)
    (down, across), (gap_y, gap_x), (top, left) = geometry.stride, geometry.dilation, geometry.padding
    x = common.channels_last(x).permute(0, 2, 3, 1)
    if top or left:
        x = F.pad(x, (0, 0, left, left, top, top))
    image, row, pixel, channel = x.stride()
    shape = n, h, w, *weight.shape[2:], c
    strides = image, row * down, pixel * across, row * gap_y, pixel * gap_x, channel
    return x.as_strided(shape, strides).reshape(-1, weight[0].numel())


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, total: Tensor | None
) -> Tensor:
    """In NHWC storage, by a product; added to `total` where there is one."""
    k, c, *kernel = weight.shape
    channels = grad.permute(0, 2, 3, 1).reshape(-1, k).t()
    columns = _columns(x, weight, geometry)
    if total is not None:
        total.permute(0, 2, 3, 1).view(k, -1).addmm_(channels, columns)
        return total
    return torch.mm(channels, columns).view(k, *kernel, c).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry = SAME_3X3) -> Tensor:
    """The convolution's result in NHWC storage. Not recorded by autograd where by Winograd."""
    if _is_filtered(x, weight, geometry):
        return _filtered(x, weight, bias)
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return common.channels_last(F.conv2d(x, weight, bias, *options))


def convolve_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    with_bias: bool,
    needed: Sequence[bool],
    geometry: Geometry = SAME_3X3,
    total: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, those that are needed.

    Args:
        total: another gradient of weight, to which this one is added in place.
        overwrite: whether x, in NHWC storage, is not needed any more: its gradient may take its memory.
    """
    grad = common.channels_last(grad)
    needs_x, needs_weight, needs_bias = needed[0], needed[1], with_bias and needed[2]
    filtered = needs_x and _is_filtered(grad, weight.transpose(0, 1), geometry)
    multiplied = needs_weight and takes_products(x, weight, geometry)
    grad_x = grad_weight = grad_bias = None
    if multiplied:
        # Before torch takes and leaves memory, of which some would fit between, but not this.
        grad_weight = _weight_gradient(grad, x, weight, geometry, total)
    mask = [needs_x and not filtered, needs_weight and not multiplied, needs_bias and not multiplied]
    if any(mask):
        sizes = [weight.shape[0]] if with_bias else None
        options = geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], geometry.groups
        found = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *options, mask)
        grad_x, grad_bias = found[0], found[2]
        if mask[1]:
            grad_weight = found[1] if total is None else total.add_(found[1])
    if multiplied and needs_bias:
        # Of torch it would cost the gradient of weight.
        grad_bias = grad.sum((0, 2, 3))
    if filtered:
        turned = weight.flip(2, 3).transpose(0, 1)
        grad_x = _filtered(grad, turned, None, x if overwrite else None)
    return grad_x, grad_weight, grad_bias


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.with_bias, ctx.geometry = bias is not None, geometry
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias, geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return *convolve_backward(grad, x, weight, ctx.with_bias, needed, ctx.geometry), None


def conv_train(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x) on a CPU, by Winograd's filtering where that is faster, or with less memory for its gradient.

    In float32 the error of Winograd's is at most 4.5 times that of a direct convolution.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        conv: any module; faster is an nn.Conv2d of 3x3, stride 1 and padding 1 with 32 or more channels
            in float32, or any that makes no more pixels than channels.

    Returns:
        What conv gives; channels_last where it is not called.
    """
    geometry = Geometry.of(conv)
    if geometry is None or type(x) is not Tensor or torch.compiler.is_compiling():
        return conv(x)
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight
    if x.ndim != 4 or x.shape[1] != conv.in_channels or x.device != weight.device:
        return conv(x)
    autocast = torch.is_autocast_enabled(x.device.type)
    filtered = not autocast and is_3x3(conv) and takes_winograd(x, weight)
    if not filtered and not takes_products(x, weight, geometry):
        return conv(x)
    x, weight, bias = map(common.autocast, (x, weight, conv.bias))
    return _Function.apply(x, weight, bias, geometry)


def is_3x3(conv: nn.Module) -> bool:
    """Whether it is a plain 3x3 convolution of stride 1, padded with zeros to keep the size."""
    if type(conv) is not nn.Conv2d:
        return False
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
