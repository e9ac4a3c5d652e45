"""Convolution as an implicit matrix product in Triton, shared by conv_bn_act, deconv_add and shared_block.

A program computes a tile of BLOCK_M output pixels by BLOCK_N output channels. One loop runs over all taps and
blocks of input channels, so that loads stay in flight across taps. Each row of the left matrix holds a
pixel's channels, NHWC, read in place; the right matrix is the weights, K x taps x C.

Both may be 8-bit quantized values. int8 products are summed as integers, exactly for up to 131071 of them,
float8 products in float32. Dequantization is up to the caller: the steps of weights and input are folded into
the scale of the epilogue.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import _backends as backends
from . import _common as common
from ._triton import INTERPRETED, WIDEN, jit, tl


@dataclasses.dataclass(frozen=True)
class Config:
    """How a convolution is divided into programs.

    Attributes:
        block_m, block_n: output pixels and channels of a tile.
        block_bytes: bytes of input channels per step of the loop, in the input's dtype.
        warps, stages: warps of a program, and loop steps that are loaded ahead.
        split: programs that share the sum of one tile; each writes its part, a second kernel adds them up.
        swap: whether the weights are on the left, so that 64 channels fill the 64 rows of a Hopper product.
    """

    block_m: int
    block_n: int
    block_bytes: int
    warps: int
    stages: int
    split: int = 1
    swap: bool = False

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program in bytes."""
        return (self.block_m + self.block_n) * self.block_bytes * self.stages


# The tuner's choices: none spills registers, and all fit into the 163 KB of sm_80.
CONFIGS = (
    # Most arithmetic per byte. 256 columns would need more registers than a thread has.
    Config(128, 128, 128, 8, 4),
    Config(256, 64, 128, 8, 3, swap=True),  # 64 channels, many pixels
    Config(128, 64, 64, 8, 4),  # 64 channels, or fewer pixels: several programs a multiprocessor
    Config(64, 64, 128, 4, 4),  # few pixels: more programs than multiprocessors come first
    Config(64, 64, 128, 4, 4, split=2),  # strides 16 and 32 at batch 1: 8 to 64 tiles for 132
    Config(64, 64, 128, 4, 4, split=4),
    Config(64, 64, 128, 4, 4, split=8),
)
# Full float32 products run on the CUDA cores and want few accumulators per thread; and where neighbours
# cannot be loaded sixteen bytes at a time, each takes a register for its address.
SMALL_CONFIGS = (Config(64, 32, 64, 8, 3), Config(64, 32, 64, 8, 3, split=4))

# Quantized dtypes, and the compute capability from which tensor cores multiply them.
CODE_CAPABILITIES = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}

# Results that a program finishes at once: with more, residual and skip would not fit its registers.
FINISHED_AT_ONCE = None if tl is None else tl.constexpr(64 * 64)

# Hopper sums float8 products to about 14 bits of the largest. This many products form a partial sum that is
# added to the total in float32: 4608 products are 36 short sums, with one addition per 128 products. Below
# 32, Triton multiplies in float16, at half the rate.
IMPRECISE = None if tl is None else tl.constexpr(128)

# Before the wait each thread prefetches one or two cache lines of weights. More would not arrive: a launch
# overlaps its predecessor's end for about a microsecond, in which memory delivers about 4 MB. That is 256
# lines for each of 128 programs, which every GPU that overlaps launches starts at once.
LINE = None if tl is None else tl.constexpr(128)
PREFETCHED_LINES = None if tl is None else tl.constexpr(256)
PREFETCHING_PROGRAMS = None if tl is None else tl.constexpr(128)

# Cost model constants of an H200: 790 TFLOP/s over 132 multiprocessors, 4.3 TB/s, a launch in a graph.
MACS_A_US = 790e6 / 2 / 132
BYTES_A_US = 4.3e6
LAUNCH_US = 1.3


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution's sizes as a matrix product.

    Attributes:
        pixels, channels: output pixels and channels: rows and columns of the result.
        taps, depth: taps of the kernel and input channels, over which the sum runs.
        dtype: dtype of input and weights.
        aligned: whether channels and strides of input, outputs, residual and skip are multiples of 16.
    """

    pixels: int
    channels: int
    taps: int
    depth: int
    dtype: torch.dtype
    aligned: bool = True


def microseconds(problem: Problem, config: Config, multiprocessors: int) -> float:
    """Estimated time of a configuration on an H200: meant for ranking, not for prediction."""
    tiles = -(-problem.pixels // config.block_m) * -(-problem.channels // config.block_n) * config.split
    step = block_k(config, problem)
    steps = -(-problem.taps * -(-problem.depth // step) // config.split)
    # A small tile loads more per product, and its loop is too short to hide its start.
    macs = config.block_m * config.block_n * step * steps
    rate = MACS_A_US * (2 if problem.dtype.itemsize == 1 else 1)
    loaded = (config.block_m + config.block_n) * step * steps * problem.dtype.itemsize
    tile = max(macs / rate, loaded * multiprocessors / (2 * BYTES_A_US)) + 1.0
    # Small programs share a multiprocessor, which hides their waits but makes no product faster.
    waves = -(-tiles // multiprocessors)
    reduction = 0.0
    if config.split > 1:
        reduction = LAUNCH_US + (config.split + 1) * 4 * problem.pixels * problem.channels / BYTES_A_US
    return waves * tile + reduction


def configurations(
    problem: Problem, precision: str, multiprocessors: int, shared_bytes: int = 163 * 1024
) -> list[Config]:
    """The configurations that make sense for a problem, the one that should be fastest first.

    multiprocessors, shared_bytes: multiprocessors of the GPU, and shared memory available to a block.
    """
    exact = precision == "ieee" and problem.dtype is torch.float32
    known = CONFIGS if problem.aligned and not exact else SMALL_CONFIGS
    steps = problem.taps * -(-problem.depth // block_k(known[-1], problem))
    columns = max(64, 2 * problem.channels - 1)
    fitting = [
        config
        for config in known
        if config.split <= steps and config.block_n <= columns and config.shared_bytes <= shared_bytes
    ]
    return sorted(fitting, key=lambda config: microseconds(problem, config, multiprocessors))


def block_k(config: Config, problem: Problem) -> int:
    """Input channels of one step: a power of two, not far beyond the input's; at least 32 for 8 bits."""
    most = config.block_bytes // problem.dtype.itemsize
    # One instruction multiplies 32 bytes of 8-bit values, and 16 channels of wider dtypes.
    least = 32 if problem.dtype.itemsize == 1 else 16
    return max(least, min(most, 1 << (problem.depth - 1).bit_length()))


def default_precision(dtype: torch.dtype) -> str:
    """ "tf32" where torch's own float32 convolutions would use it, otherwise "ieee"."""
    # Not cudnn.allow_tf32: it raises once a program has set the newer fp32_precision.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if dtype is not torch.float32 or allowed else "ieee"


def pack_weight(w: Tensor, dtype: torch.dtype, precision: str = "ieee") -> Tensor:
    """(K, C, kernel_h, kernel_w) -> (K, taps, C), contiguous, in the kernel's dtype.

    Args:
        precision: precision of the products. float32 weights are rounded here for "tf32": tensor cores
            truncate, and truncating both factors has 2.6 times the error of rounding both; with one of them
            rounded it is 1.6 times. The interpreter's products are exact.
    """
    packed = w.detach().to(dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    rounds = precision == "tf32" and dtype is torch.float32 and not INTERPRETED
    return round_to_tf32(packed) if rounds else packed


def round_to_tf32(values: Tensor) -> Tensor:
    """float32 rounded to 10 bits of mantissa, ties away from 0, as the GPU's cvt.rna does."""
    bits = values.view(torch.int32)
    return torch.where(values.isfinite(), (bits + 0x1000) & ~0x1FFF, bits).view(torch.float32)


def best(problem: Problem, precision: str, x: Tensor, split: bool = True) -> Config:
    """The configuration that should be fastest on x's GPU; without `split`, none with a split sum."""
    found = configurations(problem, precision, backends.multiprocessors(x), backends.shared_bytes(x))
    return next(config for config in found if split or config.split == 1)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether the compiler sees that neighbouring channels can be loaded and stored together."""
    found = [t for t in tensors if t is not None]
    return all(n % 16 == 0 for t in found for n in (t.data_ptr(), t.shape[1], *common.strides(t)))


def scratch_bytes(config: Config, pixels: int, channels: int) -> int:
    """Bytes for the parts of a split sum, 0 where nothing is split."""
    return 4 * config.split * pixels * channels if config.split > 1 else 0


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype in which products of a dtype are summed: int32, which is exact, for int8."""
    return torch.int32 if dtype is torch.int8 else torch.float32


def workspace(config: Config, pixels: int, channels: int, like: Tensor) -> Tensor | None:
    """Memory for the parts of a split sum of products in the dtype of `like`, None where nothing is split."""
    if config.split == 1:
        return None
    return torch.empty((config.split, pixels, channels), dtype=sum_dtype(like.dtype), device=like.device)


def parts_of(parts: Tensor | None, config: Config, pixels: int, channels: int, like: Tensor) -> Tensor | None:
    """The caller's memory for the parts of a split sum, or a workspace if none is given.

    Raises:
        ValueError: parts is too small.
    """
    if parts is None or config.split == 1:
        return workspace(config, pixels, channels, like)
    needed = scratch_bytes(config, pixels, channels)
    if parts.numel() * parts.itemsize < needed:
        found = parts.numel() * parts.itemsize
        raise ValueError(f"parts has {found} bytes, a sum split in {config.split} needs {needed}")
    return parts.view(sum_dtype(like.dtype))


def activation(slope: float | None) -> tuple[str, float]:
    """The kernels' ACT and slope."""
    if slope is None or slope == 1:
        return "none", 1.0
    return ("relu", 0.0) if slope == 0 else ("leaky", slope)


@jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; tiles that run together share rows of weights and pixels in the L2 cache."""
    group_size = GROUP * tiles_n
    first = pid // group_size * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + pid % group_size % rows, pid % group_size // rows


@jit
def lines_of(program, programs, lines):
    """The cache lines that a program prefetches out of `lines`, and which of them exist."""
    fetching = tl.minimum(programs, PREFETCHING_PROGRAMS)
    # Adjacent lines go to different programs: if not all can be prefetched, the first ones are.
    line = program + tl.arange(0, PREFETCHED_LINES) * fetching
    return line, (line < lines) & (program < fetching)


@jit
def prefetch(weight, count):
    """Prefetches `count` weights into the L2 cache, across all programs; does not wait for them."""
    size = LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    line, asked = lines_of(program, tl.num_programs(0) * tl.num_programs(1), tl.cdiv(count, size))
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [weight + line.to(tl.int64) * size, asked.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def wide(values):
    """Operands of a product in a dtype that the interpreter multiplies correctly."""
    if values.dtype == tl.float8e4nv:
        # The interpreter reads the code of NaN as 480.
        bits = values.to(tl.uint8, bitcast=True)
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), values.to(tl.float32))
    elif values.dtype != tl.int8:
        values = values.to(tl.float32)
    return values


@jit
def multiply(pixels, weights, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + pixels @ weights; with SWAP acc, and the product, are transposed."""
    if WIDEN:
        pixels, weights = wide(pixels), wide(weights)
    depth: tl.constexpr = pixels.shape[1]
    of_float8: tl.constexpr = pixels.dtype == tl.float8e4nv
    short: tl.constexpr = depth if depth < IMPRECISE else IMPRECISE
    imprecise: tl.constexpr = short if of_float8 else 0
    if SWAP:
        acc = tl.dot(
            tl.trans(weights), tl.trans(pixels), acc, PRECISION,
            max_num_imprecise_acc=imprecise, out_dtype=acc.dtype,
        )  # fmt: skip
    else:
        acc = tl.dot(pixels, weights, acc, PRECISION, max_num_imprecise_acc=imprecise, out_dtype=acc.dtype)
    return acc


@jit
def sums(like, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zero accumulators for products in the dtype that `like` points to."""
    whole: tl.constexpr = like.dtype.element_ty == tl.int8
    return tl.zeros((ROWS, COLUMNS), tl.int32 if whole else tl.float32)


@jit
def float8(values):
    """float32 values from -448 to 448 as float8, where the interpreter's rounding differs from a GPU's."""
    size = tl.abs(values)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 8 * (127 - 7)
    # Below 2**-6 float8 values are multiples of 2**-9.
    small = (size * 512 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    found = tl.where(size < 0.015625, small, normal)
    found = tl.where(values == values, found, 0x7F)
    sign = (values.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (found | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@jit
def code(values, pointer):
    """float32 values in the 8-bit dtype that the pointer points to: saturated, then rounded to nearest, ties
    to even. NaN stays NaN in float8, and becomes 0 in int8.
    """
    if pointer.dtype.element_ty == tl.int8:
        inside = tl.minimum(tl.maximum(values, -128.0), 127.0)
        inside = tl.where(values == values, inside, 0.0)
        # From 2**23 on adjacent floats are 1 apart: the sum's low byte is the integer.
        codes = (inside + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        values = tl.where(values > 448.0, 448.0, values)
        values = tl.where(values < -448.0, -448.0, values)
        codes = float8(values) if WIDEN else values.to(pointer.dtype.element_ty)
    return codes


@jit
def pixel_of(rows, height, width):
    """Image, row and column of the output pixels with indices `rows`."""
    pixel = rows % (height * width)
    return rows // (height * width), pixel // width, pixel % width


@jit
def offsets(image, y, x, stride_n, stride_h, stride_w):
    """Offsets of pixels, in elements: images and their rows may be more than 2**31 apart."""
    return image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right halves of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@jit
def load_rows(base, rows, columns, mask):
    """A tile of residual or skip, in float32."""
    return tl.load(base + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def finish(
    acc, columns, channels, mask, scale, shift, residual, residual_rows, skip, skip_rows, slope,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_SKIP: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """act(scale * acc + shift + residual) + skip."""
    inside = columns < channels
    if HAS_SCALE:
        acc = acc * tl.load(scale + columns, mask=inside, other=0.0)[None, :]
    if HAS_SHIFT:
        acc = acc + tl.load(shift + columns, mask=inside, other=0.0)[None, :]
    if HAS_RESIDUAL:
        acc = acc + load_rows(residual, residual_rows, columns, mask)
    # These comparisons keep NaN.
    if ACT == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    if ACT == "leaky":
        acc = tl.where(acc < 0, slope * acc, acc)
    if HAS_SKIP:
        acc = acc + load_rows(skip, skip_rows, columns, mask)
    return acc


def flags(scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, skip: Tensor | None) -> dict:
    """The constexpr flags of `finish`."""
    tensors = dict(HAS_SCALE=scale, HAS_SHIFT=shift, HAS_RESIDUAL=residual, HAS_SKIP=skip)
    return {name: tensor is not None for name, tensor in tensors.items()}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
