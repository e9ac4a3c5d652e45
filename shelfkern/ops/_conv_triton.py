"""Convolution as an implicit matrix product in Triton: what conv_bn_act, deconv_add and shared_block share.

A program makes a tile of BLOCK_M output pixels by BLOCK_N output channels. One loop runs over all taps
and blocks of input channels, so that loads are in flight across taps. Every row of the left matrix is a
pixel's channels, NHWC, read where they lie; the right one is the weights, K x taps x C.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import _backends as backends
from . import _common as common
from ._triton import WIDEN, jit, tl


@dataclasses.dataclass(frozen=True)
class Config:
    """How a convolution is cut into programs.

    Attributes:
        block_m, block_n: output pixels and channels of a tile.
        block_bytes: input channels of one step of the loop, in bytes of the input's dtype.
        warps, stages: of a program: its warps, and the steps that are loaded ahead.
        split: programs that share the sum of one tile; each writes its part, a second kernel adds them up.
        swap: puts the weights on the left, so that 64 channels fill the 64 rows of a Hopper product.
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
        """Shared memory of a program."""
        return (self.block_m + self.block_n) * self.block_bytes * self.stages


# What a tuner may choose from: none spills registers, and all fit into the 163 KB of sm_80.
CONFIGS = (
    # Most arithmetic for each byte. 256 columns would need more registers than a thread has.
    Config(128, 128, 128, 8, 4),
    Config(256, 64, 128, 8, 3, swap=True),  # 64 channels, many pixels
    Config(128, 64, 64, 8, 4),  # 64 channels, or fewer pixels: several programs a multiprocessor
    Config(64, 64, 128, 4, 4),  # few pixels: more programs than multiprocessors come first
    Config(64, 64, 128, 4, 4, split=2),  # strides 16 and 32 at batch 1: 8 to 64 tiles for 132
    Config(64, 64, 128, 4, 4, split=4),
    Config(64, 64, 128, 4, 4, split=8),
)
# Full float32 products run on the ordinary cores and want few accumulators a thread; and where neighbours
# cannot be loaded sixteen bytes at a time, every one takes a register for its address.
SMALL_CONFIGS = (Config(64, 32, 64, 8, 3), Config(64, 32, 64, 8, 3, split=4))

# Results that a program finishes at once: for more, residual and skip would not fit its registers.
FINISHED_AT_ONCE = None if tl is None else tl.constexpr(64 * 64)

# For the cost model, of an H200: 790 TFLOP/s over 132 multiprocessors, 4.3 TB/s, a launch in a graph.
_MACS_A_US = 790e6 / 2 / 132
_BYTES_A_US = 4.3e6
_LAUNCH_US = 1.3


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution's sizes as a matrix product.

    Attributes:
        pixels, channels: of the output: rows and columns of the result.
        taps, depth: of the sum: taps of the kernel, and input channels.
        dtype: of input and weights.
        aligned: whether channels and strides of input, output and what is added are multiples of 16.
    """

    pixels: int
    channels: int
    taps: int
    depth: int
    dtype: torch.dtype
    aligned: bool = True


def microseconds(problem: Problem, config: Config, multiprocessors: int) -> float:
    """What a configuration may take on an H200: for an order, not for a prediction."""
    tiles = -(-problem.pixels // config.block_m) * -(-problem.channels // config.block_n) * config.split
    step = block_k(config, problem)
    steps = -(-problem.taps * -(-problem.depth // step) // config.split)
    # A small tile loads more for each product, and its loop is too short to hide its start.
    macs = config.block_m * config.block_n * step * steps
    loaded = (config.block_m + config.block_n) * step * steps * problem.dtype.itemsize
    tile = max(macs / _MACS_A_US, loaded * multiprocessors / (2 * _BYTES_A_US)) + 1.0
    # Small programs share a multiprocessor, which hides their waits but makes no products faster.
    waves = -(-tiles // multiprocessors)
    reduction = 0.0
    if config.split > 1:
        reduction = _LAUNCH_US + (config.split + 1) * 4 * problem.pixels * problem.channels / _BYTES_A_US
    return waves * tile + reduction


def configurations(
    problem: Problem, precision: str, multiprocessors: int, shared_bytes: int = 163 * 1024
) -> list[Config]:
    """The configurations that make sense for a problem, the one that should be fastest first.

    multiprocessors, shared_bytes: of the GPU, and of a block there at most.
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
    """Input channels of one step: a power of two, not far beyond the input's own."""
    most = config.block_bytes // problem.dtype.itemsize
    return max(16, min(most, 1 << (problem.depth - 1).bit_length()))


def default_precision(dtype: torch.dtype) -> str:
    """ "tf32" where torch's own convolutions of float32 would use it, otherwise "ieee"."""
    # Not cudnn.allow_tf32: that raises once a program has set the newer fp32_precision.
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if dtype is not torch.float32 or allowed else "ieee"


def pack_weight(w: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, C, kernel_h, kernel_w) -> (K, taps, C), contiguous, of the kernel's dtype."""
    return w.detach().to(dtype).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def best(problem: Problem, precision: str, x: Tensor, split: bool = True) -> Config:
    """The configuration that should be fastest on x's GPU; without `split`, of those that split no sum."""
    found = configurations(problem, precision, backends.multiprocessors(x), backends.shared_bytes(x))
    return next(config for config in found if split or config.split == 1)


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether the compiler sees that neighbouring channels can be loaded and stored together."""
    found = [t for t in tensors if t is not None]
    return all(n % 16 == 0 for t in found for n in (t.data_ptr(), t.shape[1], *common.strides(t)))


def workspace(config: Config, pixels: int, channels: int, like: Tensor) -> Tensor | None:
    """Memory for the parts of a split sum, None where nothing is split."""
    if config.split == 1:
        return None
    return torch.empty((config.split, pixels, channels), dtype=torch.float32, device=like.device)


def activation(slope: float | None) -> tuple[str, float]:
    """The kernels' ACT and slope."""
    if slope is None or slope == 1:
        return "none", 1.0
    return ("relu", 0.0) if slope == 0 else ("leaky", slope)


@jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; neighbours in time share rows of weights and pixels in the L2 cache."""
    group_size = GROUP * tiles_n
    first = pid // group_size * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + pid % group_size % rows, pid % group_size // rows


@jit
def multiply(pixels, weights, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc + pixels @ weights; with SWAP acc, and the product, are transposed."""
    if WIDEN:
        pixels, weights = pixels.to(tl.float32), weights.to(tl.float32)
    if SWAP:
        acc = tl.dot(tl.trans(weights), tl.trans(pixels), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(pixels, weights, acc, input_precision=PRECISION)
    return acc


@jit
def pixel_of(rows, height, width):
    """Image, row and column of the output pixels that `rows` counts."""
    pixel = rows % (height * width)
    return rows // (height * width), pixel // width, pixel % width


@jit
def offsets(image, y, x, stride_n, stride_h, stride_w):
    """Of pixels, in elements: images, and their rows, may be more than 2**31 apart."""
    return image.to(tl.int64) * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of a tile."""
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
    # Comparisons that leave NaN as it is.
    if ACT == "relu":
        acc = tl.where(acc < 0, 0.0, acc)
    if ACT == "leaky":
        acc = tl.where(acc < 0, slope * acc, acc)
    if HAS_SKIP:
        acc = acc + load_rows(skip, skip_rows, columns, mask)
    return acc


def flags(scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, skip: Tensor | None) -> dict:
    """The constants of `finish`."""
    tensors = dict(HAS_SCALE=scale, HAS_SHIFT=shift, HAS_RESIDUAL=residual, HAS_SKIP=skip)
    return {name: tensor is not None for name, tensor in tensors.items()}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
