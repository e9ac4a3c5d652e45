"""upsample_add: skip + gate * nearest_x2(x), the merge of the real-time models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _triton
from ._triton import gdc_launch_dependents, gdc_wait, jit, rounded, tl
from .quantize import Quantum

OP = "upsample_add"
# Elements of x per Triton program: 8 per thread, so that 16-bit loads are 16 bytes wide.
TRITON_TILE = 1024


def upsample_add_reference(x: Tensor, skip: Tensor, gate: Tensor | None = None) -> Tensor:
    """upsample_add in torch calls, for any device and dtype; differentiable."""
    if gate is not None:
        x = x * gate.to(x.dtype)[:, :, None, None]
    return skip + F.interpolate(x, scale_factor=2.0, mode="nearest")


def can_run(x: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
    return backends.reasons(OP, x)


def upsample_add_native(
    x: Tensor,
    skip: Tensor,
    gate: Tensor | None,
    out: Tensor,
    quanta: tuple[Quantum, Quantum, Quantum] | None = None,
) -> None:
    """Runs the native kernel into `out`, unchecked: NHWC storage, one dtype, gate float32.

    quanta: quantization of x, skip and out where they are uint8.
    """
    n, c, h, w = x.shape
    own, others, result = quanta or (Quantum(1.0), Quantum(1.0), Quantum(1.0))
    skip_scale = others.step / result.step
    native.module.upsample_add(
        x.data_ptr(),
        skip.data_ptr(),
        native.address(gate),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c,
        torch.get_num_threads(),
        own.zero,
        own.step / result.step,
        skip_scale,
        result.zero - others.zero * skip_scale,
    )  # fmt: skip


def upsample_add_cuda(
    x: Tensor,
    skip: Tensor,
    gate: Tensor | None,
    out: Tensor,
    backend: str = "cuda",
    overlap: bool = True,
) -> None:
    """Runs the CUDA kernel into `out`, unchecked: channel stride 1, any other strides, gate float32.

    overlap: see `call_cuda`; this kernel reads no weights.
    """
    n, c, h, w = x.shape
    backends.call_cuda(
        backend,
        overlap,
        OP,
        x,
        x.data_ptr(),
        skip.data_ptr(),
        native.address(gate),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c,
        common.strides(x),
        common.strides(skip),
        common.strides(out),
    )  # fmt: skip


@jit
def upsample_add_kernel(
    x, skip, gate, out, pixels, channels, h, w,
    x_n, x_h, x_w, skip_n, skip_h, skip_w, out_stride_n, out_stride_h, out_stride_w,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Reads BLOCK_M input pixels once and writes the four output pixels of each."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
    image, y, column = conv.pixel_of(rows, h, w)
    values = conv.load_rows(x, conv.offsets(image, y, column, x_n, x_h, x_w), columns, mask)
    if GATED:
        values = values * conv.load_rows(gate, image * channels, columns, mask)
    for corner in tl.static_range(4):
        to_y, to_x = 2 * y + corner // 2, 2 * column + corner % 2
        old = conv.load_rows(skip, conv.offsets(image, to_y, to_x, skip_n, skip_h, skip_w), columns, mask)
        to = conv.offsets(image, to_y, to_x, out_stride_n, out_stride_h, out_stride_w)
        tl.store(out + to[:, None] + columns[None, :], rounded(old + values, out), mask=mask)


def upsample_add_triton(
    x: Tensor, skip: Tensor, gate: Tensor | None, out: Tensor, overlap: bool = False
) -> None:
    """Runs the Triton kernel into `out`, unchecked: channel stride 1, any other strides, gate float32."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        return
    overlap = overlap and _triton.overlaps_launches(x)
    block_c = min(64, 1 << (c - 1).bit_length())
    block_m = TRITON_TILE // block_c
    with _triton.on_device_of(x):
        upsample_add_kernel[(conv.cdiv(n * h * w, block_m), conv.cdiv(c, block_c))](
            x, skip, gate, out, n * h * w, c, h, w,
            *common.strides(x), *common.strides(skip), *common.strides(out),
            GATED=gate is not None, BLOCK_M=block_m, BLOCK_C=block_c, OVERLAP=overlap,
            num_warps=4, **(dict(launch_pdl=True) if overlap else {}),
        )  # fmt: skip


@backends.custom_op(OP)
def _op(x: Tensor, skip: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    out = common.empty_channels_last(x, tuple(skip.shape))
    gate = None if gate is None else common.float32(gate)
    if backend == "native":
        upsample_add_native(common.channels_last(x), common.channels_last(skip), gate, out)
        return out
    x, skip = common.channels_innermost(x), common.channels_innermost(skip)
    if backend == "triton":
        upsample_add_triton(x, skip, gate, out)
    else:
        upsample_add_cuda(x, skip, gate, out, backend)
    return out


@_op.register_fake
def _(x: Tensor, skip: Tensor, gate: Tensor | None, backend: str) -> Tensor:
    return common.empty_channels_last(x, tuple(skip.shape))


def upsample_add(x: Tensor, skip: Tensor, gate: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """skip + gate[n, c] * nearest_x2(x).

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        skip: (N, C, 2H, 2W), dtype and device of x.
        gate: (N, C) floating, or None for ones.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, 2H, 2W), dtype of x; channels_last from the native kernel.

    Raises:
        ValueError, TypeError: a shape, device or dtype does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    x, skip = common.autocast(x), common.autocast(skip)
    common.check_4d(OP, "x", x)
    n, c, h, w = x.shape
    common.check_shape(OP, "skip", skip, (n, c, 2 * h, 2 * w), f"x of {tuple(x.shape)}")
    common.check_same(OP, "skip", skip, x)
    if gate is not None:
        common.check_shape(OP, "gate", gate, (n, c), f"x of {tuple(x.shape)}")
        common.check_device(OP, "gate", gate, x)
    chosen = backends.choose(OP, backend, can_run(x), (x, skip, gate))
    if chosen == "reference":
        return upsample_add_reference(x, skip, gate)
    return _op(x, skip, gate, chosen)
