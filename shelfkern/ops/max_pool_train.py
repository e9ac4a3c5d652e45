"""max_pool_train: the stem's pooling in training on a CPU.

Between forward and backward it keeps one byte per output, the index of the largest tap, where torch keeps the
input and eight bytes per output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import native
from . import _common as common
from ._backends import NATIVE_DTYPES

OP = "max_pool_train"


def takes_kernel(x: Tensor, pool: nn.Module) -> bool:
    """Whether the native kernel can take x and the pooling."""
    if type(pool) is not nn.MaxPool2d or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    options = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode
    fits = options == (3, 2, 1, 1, False, False) and x.ndim == 4 and x.numel() > 0
    return fits and x.device.type == "cpu" and x.dtype in NATIVE_DTYPES and native.reason(OP) is None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, c, h, w = ctx.shape = tuple(x.shape)
        pooled = n, c, (h + 1) // 2, (w + 1) // 2
        out = common.keep_channels_last(x, pooled)
        taps = torch.empty_like(out, dtype=torch.uint8)
        x = common.channels_last(x)
        native.module.max_pool(
            x.data_ptr(), out.data_ptr(), taps.data_ptr(),
            native.DTYPE_CODES[x.dtype], n, h, w, c, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(taps)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (taps,) = ctx.saved_tensors
        n, c, h, w = ctx.shape
        grad = common.channels_last(grad)
        grad_x = common.empty_channels_last(grad, ctx.shape)
        native.module.max_pool_backward(
            grad.data_ptr(), taps.data_ptr(), grad_x.data_ptr(),
            native.DTYPE_CODES[grad.dtype], n, h, w, c, torch.get_num_threads(),
        )  # fmt: skip
        return grad_x


def max_pool_train(x: Tensor, pool: nn.Module) -> Tensor:
    """pool(x), bit-identical, keeping less memory for its gradient on a CPU when not traced.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        pool: any module; an nn.MaxPool2d(3, 2, 1) has a kernel, for float32 and bfloat16.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)), channels_last from the kernel; for other modules, their result.
    """
    return _Function.apply(x) if takes_kernel(x, pool) else pool(x)
