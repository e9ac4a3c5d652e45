"""quantize: a tensor as 8-bit multiples of a step: int8, or float8_e4m3fn."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from . import _triton
from ._triton import gdc_launch_dependents, gdc_wait, jit, tl

OP = "quantize"
# Elements per Triton program: 16 per thread, whose results are stored together.
TRITON_TILE = 2048
# Output channels of weights that are quantized at a time.
QUANTIZED_CHANNELS = 64
# Largest magnitude of a quantized weight, in steps: int8 leaves out -128 to be symmetric.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclasses.dataclass(frozen=True)
class Quantum:
    """Quantization of uint8 values, used for activations on a CPU: step * (code - zero).

    Non-negative activations need no sign: with `zero` 0 their steps are half as large.
    """

    step: float
    zero: int = 0

    def codes(self, x: Tensor) -> Tensor:
        """Nearest uint8 values of a floating tensor, ties to even."""
        codes = torch.where(x.isnan(), 0.0, x / self.step) + self.zero
        return codes.round().clamp(0, 255).to(torch.uint8)

    def values(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that `codes` represent."""
        return (codes.to(dtype) - self.zero) * self.step


def quantize_reference(x: Tensor, step: float | Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """quantize in torch calls, for any device and dtype; in float64 for float64, otherwise in float32."""
    values = common.wide(x) / step
    if dtype is torch.int8:
        values = torch.where(values.isnan(), 0.0, values.clamp(-128, 127)).round()
    else:
        values = values.clamp(-448, 448)
    return values.to(dtype)


def quantize_weight(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes weights (K, C, kernel_h, kernel_w), with one step per output channel.

    Symmetric: the largest magnitude of an output channel is 127 or 448 steps. A channel of zeros has step 1.

    Returns:
        (K, taps, C) in `dtype`, as `conv_bn_act_triton` takes them, and the steps, (K,) float32.

    Raises:
        ValueError: dtype is neither int8 nor float8_e4m3fn, or a weight is not finite.
    """
    _check_dtype("quantize_weight", dtype)
    w = w.detach()
    largest = common.float32(torch.maximum(w.amax((1, 2, 3)), -w.amin((1, 2, 3))))
    if not largest.isfinite().all():
        raise ValueError("quantize_weight: w holds what is not finite, every weight must be")
    step = largest / LARGEST[dtype]
    step = torch.where(step > 0, step, 1.0)
    k, c, kernel_h, kernel_w = w.shape
    codes = torch.empty((k, kernel_h * kernel_w, c), dtype=dtype, device=w.device)
    # A few channels at a time, so that temporaries stay small compared with a large layer.
    parts = zip(w.split(QUANTIZED_CHANNELS), step.split(QUANTIZED_CHANNELS), strict=True)
    for part, (filters, steps) in zip(codes.split(QUANTIZED_CHANNELS), parts, strict=True):
        quantized = quantize_reference(common.float32(filters), steps[:, None, None, None], dtype)
        part.copy_(conv.pack_weight(quantized, dtype))
    return codes, step


def can_run(x: Tensor, dtype: torch.dtype = torch.int8) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
    why = backends.reasons(OP, x)
    if why["native"] is None and dtype is not torch.int8:
        why["native"] = f"dtype is {dtype}, the native kernel makes int8"
    needed = conv.CODE_CAPABILITIES.get(dtype, (8, 0))
    if why["triton"] is None and x.is_cuda and torch.cuda.get_device_capability(x.device) < needed:
        found = "{}.{}".format(*torch.cuda.get_device_capability(x.device))
        why["triton"] = f"x is on a GPU of compute capability {found}, codes of {dtype} need 8.9"
    return why


def quantize_native(x: Tensor, step: float, codes: Tensor, zero: int = 0) -> None:
    """Runs the native kernel into `codes`, unchecked: both dense, with the same element order.

    codes: int8, or uint8 with zero point `zero`.
    """
    sign = 128 if codes.dtype is torch.int8 else 0
    native.module.quantize(
        x.data_ptr(),
        codes.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        x.numel(),
        1 / step,
        zero + sign,
        sign,
        torch.get_num_threads(),
    )


@jit
def quantize_kernel(
    x, codes, pixels, channels, h, w, x_n, x_h, x_w, codes_n, codes_h, codes_w, codes_scale,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_M pixels."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < pixels)[:, None] & (columns < channels)[None, :]
    image, y, column = conv.pixel_of(rows, h, w)
    values = conv.load_rows(x, conv.offsets(image, y, column, x_n, x_h, x_w), columns, mask)
    to = conv.offsets(image, y, column, codes_n, codes_h, codes_w)
    tl.store(codes + to[:, None] + columns[None, :], conv.code(values * codes_scale, codes), mask=mask)


def quantize_triton(x: Tensor, step: float, codes: Tensor, overlap: bool = False) -> None:
    """Runs the Triton kernel into `codes`, unchecked: channel stride 1, any other strides."""
    n, c, h, w = x.shape
    if x.numel() == 0:
        return
    overlap = overlap and _triton.overlaps_launches(x)
    block_c = min(64, 1 << (c - 1).bit_length())
    block_m = TRITON_TILE // block_c
    with _triton.on_device_of(x):
        quantize_kernel[(conv.cdiv(n * h * w, block_m), conv.cdiv(c, block_c))](
            x, codes, n * h * w, c, h, w, *common.strides(x), *common.strides(codes), 1 / step,
            BLOCK_M=block_m, BLOCK_C=block_c, OVERLAP=overlap,
            num_warps=4, **(dict(launch_pdl=True) if overlap else {}),
        )  # fmt: skip


def _codes_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)


@backends.custom_op(OP)
def _op(x: Tensor, step: float, dtype: torch.dtype, backend: str) -> Tensor:
    codes = _codes_like(x, dtype)
    if backend == "native":
        quantize_native(common.channels_last(x), step, codes)
    else:
        quantize_triton(common.channels_innermost(x), step, codes)
    return codes


@_op.register_fake
def _(x: Tensor, step: float, dtype: torch.dtype, backend: str) -> Tensor:
    return _codes_like(x, dtype)


def quantize(x: Tensor, step: float, dtype: torch.dtype = torch.int8, *, backend: str = "auto") -> Tensor:
    """x / step as 8-bit values: saturated, then rounded to nearest, ties to even.

    A result may be off by one value where x / step is so near a midpoint that float32 cannot tell. NaN stays
    NaN in float8, and becomes 0 in int8.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        step: quantization step.
        dtype: int8, for results from -128 to 127, or float8_e4m3fn, from -448 to 448.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, H, W) in `dtype`, channels_last from the kernel.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    common.check_4d(OP, "x", x)
    if not (math.isfinite(step) and step > 0):
        raise ValueError(f"{OP}: step is {step}, it must be a finite number above 0")
    _check_dtype(OP, dtype)
    chosen = backends.choose(OP, backend, can_run(x, dtype), (x,))
    if chosen == "reference":
        return quantize_reference(x, step, dtype)
    return _op(x, step, dtype, chosen)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise ValueError(f"{name}: dtype is {dtype}, it may be torch.int8 or torch.float8_e4m3fn")
