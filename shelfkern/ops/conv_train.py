"""conv_train: convolutions in training on a CPU.

3x3 convolutions of stride 1 and their input gradients use Winograd's filtering, with one kernel; the gradient
uses the rotated and transposed weights. In float32 oneDNN's direct convolutions take 2.7 to 3.4 times as long
(64 to 256 channels, 4096 to 256 pixels per image, batches of 4, 2 threads); in bfloat16 1.5 times, which is
lost again to transforming the weights at every step.

In bfloat16 convolutions are computed in float32 where oneDNN has no kernels for bfloat16: torch's own take 20
to 40 times as long as float32 (3x3, 64 to 256 channels, AMD Zen 3 with AVX2, 2 threads).

With few pixels, any convolution's weight gradient is computed as one matrix product, in the layout of the
weights. oneDNN computes it in its own layout and copies it: for 512 x 512 channels 18 MiB more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import native
from . import _common as common
from ._conv_winograd import PackedWinograd, can_pay, conv_winograd_native, pays, weight_transform
from .conv_bn_act import PANEL

P = ParamSpec("P")
R = TypeVar("R")

# Weights change at every step and are transformed for each pass: for 256 x 256 channels this takes 1.2 ms and
# saves 7 ms at this many pixels. With a quarter of them a ShelfNet50's step is no faster.
LEAST_PIXELS = 2048
# Bytes. Transformed weights of 512 x 512 channels do not fit in the caches, and take 15 ms.
MOST_TRANSFORMED = 16 * 1024 * 1024
# dtypes for which the weight gradient can be a matrix product.
PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# Whether oneDNN convolves bfloat16 on this CPU: from AVX-512 on.
ONEDNN_HAS_BFLOAT16: bool = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)()
TRANSFORM = torch.kron(weight_transform(4), weight_transform(4)).float()


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Stride, padding and similar parameters of a convolution, each as (rows, columns)."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Module) -> Geometry | None:
        """Geometry of an nn.Conv2d with zero padding; None for other modules."""
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups)

    def size(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of the result."""
        sides = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        h, w = ((n + 2 * pad - gap * (k - 1) - 1) // by + 1 for n, k, by, pad, gap in sides)
        return h, w


# The geometry that `is_3x3` accepts.
SAME_3X3 = Geometry()


def takes_winograd(x: Tensor, weight: Tensor) -> bool:
    """Whether Winograd's filtering is faster for a 3x3, stride 1, padding 1 convolution, packing included."""
    n, _, h, w = x.shape
    fits = x.device.type == "cpu" and x.dtype is weight.dtype is torch.float32
    if not fits or native.reason("conv_train") is not None or not can_pay(weight, 1, 1):
        return False
    small = weight.shape[0] * weight.shape[1] * len(TRANSFORM) * 4 <= MOST_TRANSFORMED
    return small and n * h * w >= LEAST_PIXELS and pays((n, weight.shape[0], h, w))


def pack(weight: Tensor) -> PackedWinograd:
    """Packs weights (K, C, 3, 3) for one pass, transformed in float32: float64 takes 10 times as long."""
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
    """Whether a convolution's weight gradient should be computed as a matrix product.

    With no more output pixels than channels it takes 0.3 to 1.1 of oneDNN's time, with twice as many pixels 1
    to 1.4 (1x1 and 3x3, 256 to 2048 channels, float32 and bfloat16, 2 threads).
    """
    h, w = geometry.size(x, weight)
    fits = x.device.type == "cpu" and weight.dtype in PRODUCT_DTYPES and geometry.groups == 1
    return fits and 0 < x.shape[0] * h * w <= weight.shape[0] and min(h, w) > 0


def takes_float32(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a convolution of x in `dtype` should be computed in float32."""
    return x.device.type == "cpu" and dtype is torch.bfloat16 and not ONEDNN_HAS_BFLOAT16


def _columns(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """im2col of x, (pixels, taps * C): x itself for 1x1 with stride 1, else a copy."""
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
    """The weight gradient in NHWC storage, as a matrix product; added to `total` if given."""
    k, c, *kernel = weight.shape
    channels = grad.permute(0, 2, 3, 1).reshape(-1, k).t()
    columns = _columns(x, weight, geometry)
    if total is not None:
        total.permute(0, 2, 3, 1).view(k, -1).addmm_(channels, columns)
        return total
    return torch.mm(channels, columns).view(k, *kernel, c).permute(0, 3, 1, 2)


def _without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function with autocast off: its tensors are cast, and gradients may be computed within autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        x = args[0]
        assert isinstance(x, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **options)

    return run


@_without_autocast
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry = SAME_3X3) -> Tensor:
    """The convolution's result in NHWC storage. The Winograd path is not recorded by autograd."""
    if takes_float32(x, x.dtype):
        wide = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), wide, geometry).to(x.dtype)
    if _is_filtered(x, weight, geometry):
        return _filtered(x, weight, bias)
    options = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    return common.channels_last(F.conv2d(x, weight, bias, *options))


@_without_autocast
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
    """The gradients of x, weight and bias that are needed.

    Args:
        total: another gradient of weight, to which this one is added in place.
        overwrite: whether x, in NHWC storage, is no longer needed, so that its gradient may reuse its memory.
    """
    if takes_float32(x, x.dtype):
        wide = grad.float(), common.channels_last(x).float(), weight.float()
        found = convolve_backward(*wide, with_bias, needed, geometry, overwrite=True)
        grad_x, grad_weight, grad_bias = (None if g is None else g.to(x.dtype) for g in found)
        if total is not None and grad_weight is not None:
            grad_weight = total.add_(grad_weight)
        return grad_x, grad_weight, grad_bias
    grad = common.channels_last(grad)
    needs_x, needs_weight, needs_bias = needed[0], needed[1], with_bias and needed[2]
    filtered = needs_x and _is_filtered(grad, weight.transpose(0, 1), geometry)
    multiplied = needs_weight and takes_products(x, weight, geometry)
    grad_x = grad_weight = grad_bias = None
    if multiplied:
        # Before torch allocates and frees memory, which would leave gaps too small for this.
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
        # Asking torch for it would also compute the gradient of weight.
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


def _in_float32(x: Tensor, conv: nn.Module, dtype: torch.dtype) -> Tensor:
    """conv(x) computed in float32, with x, weight and bias rounded to `dtype` as its result is."""
    with torch.autocast("cpu", enabled=False):
        rounded = {name: value.to(dtype).float() for name, value in conv.named_parameters()}
        return torch.func.functional_call(conv, rounded, x.to(dtype).float()).to(dtype)


def conv_train(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x) on a CPU, with Winograd's filtering where that is faster, or with less memory for its gradient.

    In float32 Winograd's filtering has at most 4.5 times the error of a direct convolution.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        conv: any module; accelerated are nn.Conv2d of 3x3, stride 1 and padding 1 with 32 or more channels
            in float32, and those with no more output pixels than channels; and where oneDNN has no kernels
            for bfloat16, every nn.Conv2d and nn.ConvTranspose2d in bfloat16.

    Returns:
        Result of conv; channels_last where conv itself is not called.
    """
    geometry = Geometry.of(conv)
    compiling = torch.compiler.is_compiling()
    if type(x) is not Tensor or x.ndim != 4:
        return conv(x)
    dtype = common.autocast_dtype(x)
    if takes_float32(x, dtype) and (compiling or geometry is None) and type(conv) in CONVOLUTIONS:
        return _in_float32(x, conv, dtype)
    if compiling or geometry is None:
        return conv(x)
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight
    if x.shape[1] != conv.in_channels or x.device != weight.device:
        return conv(x)
    filtered = dtype is x.dtype and is_3x3(conv) and takes_winograd(x, weight)
    if not (filtered or takes_float32(x, dtype) or takes_products(x, weight, geometry)):
        return conv(x)
    x, weight, bias = map(common.autocast, (x, weight, conv.bias))
    return _Function.apply(x, weight, bias, geometry)


def is_3x3(conv: nn.Module) -> bool:
    """Whether conv is a plain 3x3 convolution of stride 1 with zero padding that keeps the size."""
    if type(conv) is not nn.Conv2d:
        return False
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
