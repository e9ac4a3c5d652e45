"""shared_block: the shared-weights residual block (paper 3.3), one weight tensor for both convolutions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from . import _conv_triton as conv
from .conv_bn_act import (
    PackedConv,
    conv_bn_act_native,
    conv_bn_act_reference,
    conv_bn_act_triton,
    pack_conv,
)

OP = "shared_block"

# As in csrc/cuda/shared_block.cu: channels are padded to 64 or 128, and a tile is some rows of 16 pixels.
MAX_CUDA_CHANNELS = 128
CUDA_TILE_WIDTH = 16
# For 64 and 128 padded channels: rows of a tile, and its cost in units of 64 convolved pixels; h has 18
# pixels per row and two more rows. 12 rows fill their units best; 128 channels leave room for 8.
CUDA_TILE_ROWS = {64: {12: 4 + 3, 8: 3 + 2, 4: 2 + 1}, 128: {8: 3 + 2, 4: 2 + 1}}


def shared_block_reference(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None = 0.0,
    skip: bool = False,
) -> Tensor:
    """shared_block in torch calls, for any device and dtype; differentiable."""
    h = conv_bn_act_reference(x, w, scale1, shift1, padding=1, slope=slope)
    return conv_bn_act_reference(h, w, scale2, shift2, x, x if skip else None, padding=1)


def can_run(x: Tensor) -> backends.Reasons:
    """Reason why each kernel cannot take x; None for those that can."""
    why = backends.reasons(OP, x)
    for backend in ("cuda", "emulated"):
        why[backend] = why[backend] or _cuda_reason(backend, x)
    return why


def _cuda_reason(backend: str, x: Tensor) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, the {backend} kernel takes bfloat16 and float16"
    if not 1 <= x.shape[1] <= MAX_CUDA_CHANNELS:
        return f"x has {x.shape[1]} channels, the {backend} kernel takes 1 to {MAX_CUDA_CHANNELS}"
    needed = cuda_shared_bytes(x.shape[1], 4)
    if backends.shared_bytes(x) < needed:
        return f"the {backend} kernel needs {needed} bytes of shared memory, x's GPU has fewer for a block"
    return None


def shared_block_native(
    x: Tensor,
    packed: PackedConv,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    hidden: Tensor,
    out: Tensor,
    slope: float | None,
    skip: bool,
) -> None:
    """Runs the native kernel into `out`, unchecked; `hidden` is memory of x's shape for the intermediate."""
    conv_bn_act_native(x, packed, scale1, shift1, None, None, hidden, slope)
    conv_bn_act_native(hidden, packed, scale2, shift2, x, x if skip else None, out, 0.0)


@dataclasses.dataclass(frozen=True)
class PackedBlock:
    """A block's parameters for the CUDA kernel, with channels zero-padded to 64 or 128.

    Attributes:
        weight: (9 taps, padded / 64, padded, 64) in the kernel's dtype: output channels, then 64 input
            channels innermost.
        scale1, shift1, scale2, shift2: (padded,) float32.
    """

    weight: Tensor
    scale1: Tensor
    shift1: Tensor
    scale2: Tensor
    shift2: Tensor


def pack_block(
    w: Tensor, scale1: Tensor, shift1: Tensor, scale2: Tensor, shift2: Tensor, dtype: torch.dtype
) -> PackedBlock:
    """Packs a block's parameters for the CUDA kernel."""
    c = w.shape[0]
    padded = 64 if c <= 64 else 128
    square = F.pad(w.detach(), (0, 0, 0, 0, 0, padded - c, 0, padded - c)).to(dtype)
    taps = square.permute(2, 3, 1, 0).reshape(9, padded // 64, 64, padded)
    vectors = [F.pad(common.float32(v), (0, padded - c)) for v in (scale1, shift1, scale2, shift2)]
    return PackedBlock(taps.transpose(2, 3).contiguous(), *vectors)


def cuda_shared_bytes(c: int, rows: int) -> int:
    """Shared memory of a CUDA block in bytes: weights, and tiles of x and h with their borders."""
    padded = 64 if c <= 64 else 128
    weights = 9 * 64 * 64 if padded == 64 else 3 * 64 * 128
    pixels = (rows + 4) * (CUDA_TILE_WIDTH + 4) + (rows + 2) * (CUDA_TILE_WIDTH + 2)
    return 2 * (weights + pixels * padded)


def tile_rows(shape: tuple[int, ...], multiprocessors: int, shared_bytes: int = 227 * 1024) -> int:
    """Rows per tile that finish an (N, C, H, W) input soonest: large tiles, but in full waves.

    multiprocessors, shared_bytes: multiprocessors of the GPU, and shared memory available to a block.
    """
    n, c, h, w = shape
    columns = -(-w // CUDA_TILE_WIDTH)

    def cost(candidate: tuple[int, int]) -> int:
        rows, work = candidate
        return -(-n * -(-h // rows) * columns // multiprocessors) * work

    every = CUDA_TILE_ROWS[64 if c <= 64 else 128].items()
    return min((tile for tile in every if cuda_shared_bytes(c, tile[0]) <= shared_bytes), key=cost)[0]


def shared_block_cuda(
    x: Tensor,
    packed: PackedBlock,
    out: Tensor,
    slope: float | None,
    skip: bool,
    backend: str = "cuda",
    rows: int | None = None,
    blocks: int | None = None,
    overlap: bool = False,
) -> None:
    """Runs the CUDA kernel into `out`, unchecked: channel stride 1, any other strides.

    rows: rows of a tile, one of `CUDA_TILE_ROWS`.
    blocks: number of blocks that share the tiles, by default one per multiprocessor.
    overlap: see `call_cuda`.
    """
    n, c, h, w = x.shape
    multiprocessors = backends.multiprocessors(x)
    backends.call_cuda(
        backend,
        overlap,
        OP,
        x,
        x.data_ptr(),
        packed.weight.data_ptr(),
        packed.scale1.data_ptr(),
        packed.shift1.data_ptr(),
        packed.scale2.data_ptr(),
        packed.shift2.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        n, h, w, c,
        common.strides(x),
        common.strides(out),
        common.native_slope(slope),
        skip,
        rows or tile_rows(tuple(x.shape), multiprocessors, backends.shared_bytes(x)),
        blocks or multiprocessors,
    )  # fmt: skip


def shared_block_triton(
    x: Tensor,
    weight: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    hidden: Tensor,
    out: Tensor | None,
    slope: float | None,
    skip: bool,
    config: conv.Config | tuple[conv.Config, conv.Config] | None = None,
    precision: str | None = None,
    overlap: bool = False,
    parts: Tensor | None = None,
    residual: Tensor | None = None,
    codes: Tensor | None = None,
    codes_step: float = 1.0,
    hidden_step: float = 1.0,
) -> None:
    """Runs two launches of the Triton convolution into `out`, unchecked: channel stride 1, any other strides.

    Args:
        weight: result of `pack_weight`, or of `quantize_weight` where x is quantized.
        scale1, scale2: where x is quantized, each includes the steps of the weights, and of x or hidden.
        hidden: memory of x's shape and dtype. Where x is quantized, so is hidden, with step `hidden_step`.
        config: one configuration for both convolutions, or one for each.
        parts: memory for the split sums of one convolution: they run one after the other.
        residual: floating tensor to add at the end; required where x is quantized.
        precision, overlap, codes, codes_step: see `conv_bn_act_triton`.

    Raises:
        ValueError: x is quantized and residual is not given, or for the reasons of `conv_bn_act_triton`.
    """
    coded = x.dtype in conv.CODE_CAPABILITIES
    if coded and residual is None:
        raise ValueError(f"{OP}: residual is None, it must be given where x is {x.dtype}")
    residual = x if residual is None else residual
    first, second = config if isinstance(config, tuple) else (config, config)
    options, between = (precision, overlap, parts), (None, hidden) if coded else (hidden, None)
    conv_bn_act_triton(
        x, weight, scale1, shift1, None, None, between[0], (3, 3), 1, 1, slope, first, *options,
        codes=between[1], codes_step=hidden_step,
    )  # fmt: skip
    again = residual if skip else None
    conv_bn_act_triton(
        hidden, weight, scale2, shift2, residual, again, out, (3, 3), 1, 1, 0.0, second, *options,
        codes=codes, codes_step=codes_step,
    )  # fmt: skip


@backends.custom_op(OP)
def _op(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None,
    skip: bool,
    backend: str,
) -> Tensor:
    shape = tuple(x.shape)
    out = common.empty_channels_last(x, shape)
    norms = (scale1, shift1, scale2, shift2)
    if backend in ("cuda", "emulated"):
        packed = pack_block(w, *norms, x.dtype)
        shared_block_cuda(common.channels_innermost(x), packed, out, slope, skip, backend)
        return out
    hidden = common.empty_channels_last(x, shape)
    scale1, shift1, scale2, shift2 = map(common.float32, norms)
    rest = (scale1, shift1, scale2, shift2, hidden, out, slope, skip)
    if backend == "triton":
        weight = conv.pack_weight(w, x.dtype, conv.default_precision(x.dtype))
        shared_block_triton(common.channels_innermost(x), weight, *rest)
    else:
        shared_block_native(common.channels_last(x), pack_conv(w, padding=1), *rest)
    return out


@_op.register_fake
def _(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    slope: float | None,
    skip: bool,
    backend: str,
) -> Tensor:
    return common.empty_channels_last(x, tuple(x.shape))


def shared_block(
    x: Tensor,
    w: Tensor,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    *,
    slope: float | None = 0.0,
    skip: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h = act(scale1 * conv(x, w) + shift1); relu(scale2 * conv(h, w) + shift2 + x), + x if `skip`.

    Args:
        x: (N, C, H, W), floating; channels_last is fastest, any strides work.
        w: (C, C, 3, 3), used by both convolutions, padding 1.
        scale1, shift1, scale2, shift2: (C,), the two folded batch norms.
        slope: slope of the first activation for negative values: 0 is relu, up to 1 leaky relu, None no
            activation.
        skip: whether x is added once more at the end, as at the entry of a down column.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, C, H, W), dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    x = common.autocast(x)
    common.check_4d(OP, "x", x)
    c = x.shape[1]
    common.check_shape(OP, "w", w, (c, c, 3, 3), f"x of {tuple(x.shape)}")
    common.check_device(OP, "w", w, x)
    affine = dict(scale1=scale1, shift1=shift1, scale2=scale2, shift2=shift2)
    for name, value in affine.items():
        common.check_shape(OP, name, value, (c,), f"x of {tuple(x.shape)}")
        common.check_device(OP, name, value, x)
    common.check_slope(OP, slope)
    tensors = (x, w, scale1, shift1, scale2, shift2)
    chosen = backends.choose(OP, backend, can_run(x), tensors)
    if chosen == "reference":
        return shared_block_reference(*tensors, slope, skip)
    return _op(*tensors, slope, skip, chosen)
