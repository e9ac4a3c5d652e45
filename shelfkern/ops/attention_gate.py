"""attention_gate: sigmoid(scale * (w @ mean_hw(x)) + shift), the gate of attention refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import _backends as backends
from . import _common as common
from .quantize import Quantum

OP = "attention_gate"

# As in csrc/cuda/attention_gate.cu: bytes of one pixel's channels that a block reads at once.
CUDA_BLOCK_BYTES = 128
CUDA_BLOCK_PIXELS = 32


def attention_gate_reference(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """attention_gate in torch calls, for any device and dtype; differentiable. Half dtypes use float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    pooled = x.to(dtype).mean((2, 3))
    return torch.sigmoid(scale.to(dtype) * (pooled @ w.to(dtype).T) + shift.to(dtype))


def can_run(x: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
    if x.shape[2] * x.shape[3] == 0:
        return dict.fromkeys(backends.KERNELS[OP], "x has no pixels")
    return backends.reasons(OP, x)


def attention_gate_native(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, out: Tensor, quantum: Quantum | None = None
) -> None:
    """Runs the native kernel into `out` (N, K) float32, unchecked: NHWC storage, parameters float32.

    quantum: quantization of x where x is uint8.
    """
    n, c, height, width = x.shape
    quantum = quantum or Quantum(1.0)
    native.module.attention_gate(
        x.data_ptr(),
        w.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, height * width, c, w.shape[0],
        torch.get_num_threads(),
        quantum.step,
        quantum.zero,
    )  # fmt: skip


def pixel_slices(x: Tensor) -> int:
    """Slices of an image's pixels for the CUDA kernel: enough to fill the GPU, none of them empty."""
    n, c, h, w = x.shape
    blocks = n * -(-c * x.element_size() // CUDA_BLOCK_BYTES)
    return max(1, min(-(-h * w // CUDA_BLOCK_PIXELS), backends.multiprocessors(x) // max(1, blocks)))


def attention_gate_cuda(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    shift: Tensor,
    out: Tensor,
    backend: str = "cuda",
    slices: int | None = None,
    overlap: bool = False,
) -> None:
    """Runs the CUDA kernels into `out`, unchecked: channel stride 1 in x, parameters float32.

    slices: slices of an image's pixels, by default `pixel_slices`.
    overlap: see `call_cuda`.
    """
    n, c, height, width = x.shape
    slices = slices or pixel_slices(x)
    sums = x.new_empty((n, slices, c), dtype=torch.float32)
    backends.call_cuda(
        backend,
        overlap,
        OP,
        x,
        x.data_ptr(),
        w.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        sums.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, height, width, c,
        common.strides(x),
        slices,
        w.shape[0],
    )  # fmt: skip


@backends.custom_op(OP)
def _op(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, backend: str) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[0]), dtype=torch.float32)
    parameters = (common.float32(w), common.float32(scale), common.float32(shift))
    if backend == "native":
        attention_gate_native(common.channels_last(x), *parameters, out)
    else:
        attention_gate_cuda(common.channels_innermost(x), *parameters, out, backend)
    return out


@_op.register_fake
def _(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]), dtype=torch.float32)


def attention_gate(x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, *, backend: str = "auto") -> Tensor:
    """sigmoid(scale * (w @ mean over H, W of x) + shift).

    Args:
        x: (N, C, H, W), floating, any strides.
        w: (K, C), the 1x1 convolution's weights.
        scale, shift: (K,), the folded batch norm.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, K) float32 (float64 for a float64 x).

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    common.check_tensor(OP, "w", w)
    if w.ndim != 2 or w.shape[1] != x.shape[1]:
        raise ValueError(f"{OP}: w is {tuple(w.shape)}, x of {tuple(x.shape)} needs (K, {x.shape[1]})")
    for name, value in (("scale", scale), ("shift", shift)):
        common.check_shape(OP, name, value, (w.shape[0],), f"w of {tuple(w.shape)}")
    for name, value in (("w", w), ("scale", scale), ("shift", shift)):
        common.check_device(OP, name, value, x)
    chosen = backends.choose(OP, backend, can_run(x), (x, w, scale, shift))
    if chosen == "reference":
        return attention_gate_reference(x, w, scale, shift)
    return _op(x, w, scale, shift, chosen)
