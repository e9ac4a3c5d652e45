"""3x3 convolutions by Winograd's minimal filtering, on the CPU.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). F(m x m, 3 x 3) computes
m x m outputs of stride 1 from the m + 2 x m + 2 inputs under them with (m + 2)^2 products for each pair of
channels, where a direct convolution takes 9 m^2: 2.25 times fewer for m = 2, 4 times fewer for m = 4. m = 6
is not implemented: at its best points, 0, 1/2, 1, 2 and their opposites, it has 4.2 times the error of m = 4,
and layers of 128 channels take 0.9 of the time, of 64 and 256 as long, of 512 1.4 times as long.

In a convolution of stride 2 the middle tap reads every second input and the other two the inputs between. In
one dimension 4 outputs take 4 products for the middle tap and, by F(4, 2), 5 for the others, where a direct
convolution takes 12: 1.78 times fewer in two dimensions. A transposed convolution of stride 2 is the same
with its even and odd outputs. All 4 products of the middle tap share one weight, so transformed weights have
4 times the original size, as with F(4 x 4).

For bfloat16 activations, products are float32, or int16 where the CPU has instructions for it, at twice the
rate, without VNNI at 1.6 times. Transformed values rounded to bfloat16, of 8 bits, would have 4 to 7 times
eager's bfloat16 error with F(4x4). int16 values have 14 bits below the largest value of a tile, and the
weights are as fine as int32 sums of 64 channels allow: the error is at most 1.4 times eager's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _common as common
from .conv_bn_act import FLOATS, PANEL, ConvCodes, PackedConv

# Evaluation points of the polynomials, besides infinity; as in csrc/cpu/winograd_filters.h. The usual 1 and 2
# in place of 5/8 and 3/2 have twice the error, and so have 0, 1, -1 and 2 in place of those for two taps.
POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}
POINTS_OF_TWO_TAPS = (Fraction(3, 8), Fraction(-3, 8), Fraction(5, 4), Fraction(-5, 4))

# By stride: with fewer channels the transforms take much of the time, and the gain is not worth the
# precision. For stride 2 the speedup is 1.35 with 64 channels, 1.2 from 32 to 64, and none with 32.
LEAST_CHANNELS = {1: 32, 2: 64}
# Bytes. Larger transformed weights would come from memory at each call; transforming a quarter of them takes
# 0.8 of the time for 512 channels at 16 x 16, for 256 channels 0.9 there and 1.05 at 32 x 32, but from 128
# channels to 256 1.15. int16 products take half as long, so that 512 channels take 1.05 and 1.1 of the time
# at 16 x 16 and 32 x 32, but a quarter of the memory; 256 channels would take 1.1 to 1.2.
MOST_TRANSFORMED = 8 * 1024 * 1024
# Channels whose products are summed before they join the total: kTerms in csrc/cpu/winograd_products.h.
TERMS = 64


@dataclasses.dataclass(frozen=True)
class PackedWinograd:
    """Weights of a 3x3 convolution for the native kernel.

    Attributes:
        data: float32 (panels, frequencies, in_channels, 16) if transformed: panels of 16 output channels,
            zero-padded beyond the last; rows, then columns of the transformed kernels, (tile + 2)^2 in all;
            or int16 (panels, frequencies, pairs of in_channels, 16, 2). Otherwise the data of a `PackedConv`.
        out_channels, in_channels: sizes of the convolution.
        tile: outputs of a tile in each dimension, 2 or 4; inputs if transposed.
        stride: 1 or 2.
        transposed: whether the convolution is transposed, with padding 1 and output padding 1.
        chunk: 0 if data is transformed; else the chunk of the `PackedConv`, whose weights the kernel
            transforms: float32, or bfloat16 for int16 products.
        units: for int16 products, quantization step of the weights, float32 (panels, frequencies, 16); else
            None.
        levels: for int16 products, factor of each input channel, by which its weights are divided, float32
            (in_channels,).
    """

    data: Tensor
    out_channels: int
    in_channels: int
    tile: int
    stride: int
    transposed: bool
    chunk: int = 0
    units: Tensor | None = None
    levels: Tensor | None = None

    @property
    def product(self) -> torch.dtype:
        """dtype of the products."""
        return torch.float32 if self.units is None else torch.int16


def evaluations(points: Sequence[Fraction], taps: int) -> Tensor:
    """G for some taps: powers of each point over the product of its distances to the others, and infinity."""
    rows = []
    for point in points:
        distances = Fraction(1)
        for other in points:
            distances *= point - other if other != point else 1
        rows.append([float(point**power / distances) for power in range(taps)])
    infinity = [0.0] * (taps - 1) + [1.0]
    return torch.tensor([*rows, infinity], dtype=torch.float64)


def weight_transform(tile: int, stride: int = 1, transposed: bool = False) -> Tensor:
    """G, float64 (tile + 2, 3): for stride 2 the middle tap, then the evaluations of the other two.

    Raises:
        ValueError: there is no such algorithm.
    """
    if stride == 1 and not transposed and tile in POINTS:
        return evaluations(POINTS[tile], 3)
    if stride != 2 or tile != 4:
        raise ValueError(
            f"conv_winograd: tile, stride and transposed are {tile}, {stride} and {transposed}, "
            "they may be 2 or 4, 1 and False; or 4, 2 and either"
        )
    g = torch.zeros(6, 3, dtype=torch.float64)
    g[0, 1] = 1
    # The input after an odd output of a transposed convolution is multiplied by the first tap.
    g[1:, [2, 0] if transposed else [0, 2]] = evaluations(POINTS_OF_TWO_TAPS, 2)
    return g


def pack_winograd(
    w: Tensor,
    tile: int = 4,
    stride: int = 1,
    transposed: bool = False,
    product: torch.dtype = torch.float32,
) -> PackedWinograd:
    """Transforms weights (K, C, 3, 3), (C, K, 3, 3) if transposed, for the native kernel.

    G w Gt is computed in float64 and rounded once.

    Args:
        product: dtype of the products, float32 or, for bfloat16 activations in tiles of 4, int16.

    Raises:
        ValueError: w is not of 3x3 kernels, or there is no such algorithm.
    """
    if w.ndim != 4 or w.shape[2:] != (3, 3):
        order = "(C, K, 3, 3)" if transposed else "(K, C, 3, 3)"
        raise ValueError(f"conv_winograd: w is {tuple(w.shape)}, it must be {order}")
    g = weight_transform(tile, stride, transposed)
    levels = None
    if product is not torch.float32:
        _check_whole(tile, product)
        levels = _levels(w, transposed)
    panels = _transformed(w, g, transposed, levels)
    k, c = w.shape[:2] if not transposed else (w.shape[1], w.shape[0])
    frequencies = (tile + 2) ** 2
    if product is torch.float32:
        data = native.empty((-(-k // PANEL), frequencies, c, PANEL), torch.float32, pooled=False)
        for panel, values in enumerate(panels):
            data[panel] = values
        return PackedWinograd(data, k, c, tile, stride, transposed)
    units = torch.empty(-(-k // PANEL), frequencies, PANEL, dtype=torch.float32)
    words = native.empty((*units.shape[:2], -(-c // 2), PANEL, 2), torch.int16, pooled=False)
    for panel, values in enumerate(panels):
        units[panel] = _units(values)
        whole = values.div_(units[panel].double()[:, None]).round_()
        words[panel] = F.pad(whole, (0, 0, 0, c % 2)).unflatten(1, (-1, 2)).transpose(2, 3)
    return PackedWinograd(words, k, c, tile, stride, transposed, 0, units, levels)


def _levels(w: Tensor, transposed: bool) -> Tensor:
    """Root mean square of each input channel's weights, relative to the largest; float32.

    A channel with large values costs the others precision, so channels are equalised by their contribution.
    """
    squares = torch.zeros(w.shape[0 if transposed else 1], dtype=torch.float64)
    # Some output channels at a time: a large layer in float64 would take twice its size.
    for kernels in (w.transpose(0, 1) if transposed else w).detach().cpu().split(PANEL):
        squares += kernels.double().square().sum((0, 2, 3))
    levels = squares.sqrt()
    # A non-finite weight spoils its own output, but not everything that its input channel contributes to.
    levels = levels.where(levels.isfinite(), 1)
    return (levels / levels.max().clamp_min(torch.finfo(torch.float64).tiny)).float()


def _transformed(w: Tensor, g: Tensor, transposed: bool, levels: Tensor | None = None) -> Iterator[Tensor]:
    """Panels of g w gt, float64 (frequencies, in_channels, 16), divided by the levels of the input channels.

    One at a time: a large layer in float64 would take eight times the size of the result.
    """
    transform = torch.kron(g, g)
    for kernels in (w.transpose(0, 1) if transposed else w).detach().cpu().split(PANEL):
        kernels = kernels.double()
        if levels is not None:
            kernels = kernels / levels.double().where(levels > 0, 1)[:, None, None]
        values = transform @ kernels.flatten(2).permute(2, 1, 0).flatten(1)
        values = values.unflatten(1, (kernels.shape[1], -1))
        yield values if len(kernels) == PANEL else F.pad(values, (0, PANEL - len(kernels)))


def _check_whole(tile: int, product: torch.dtype) -> None:
    if product is not torch.int16 or tile != 4:
        raise ValueError(
            f"conv_winograd: product and tile are {product} and {tile}, they may be torch.float32 and 2 or "
            "4, or torch.int16 and 4"
        )


def _units(values: Tensor) -> Tensor:
    """Quantization step of a panel's int16 weights, float32 (frequencies, 16).

    Inputs have 14 bits and a sign, and the kernel sums up to 64 adjacent channels in int32, so the magnitudes
    of 64 weights may add up to 2^17, less half of each for rounding.
    """
    sums = F.pad(values, (0, 0, 1, 0)).abs_().cumsum_(1)
    window = min(TERMS, values.shape[1])
    largest_sum = (sums[:, window:] - sums[:, :-window]).amax(1)
    largest = torch.maximum(values.amax(1), -values.amin(1))
    units = torch.maximum(largest_sum / (2**17 - TERMS), largest / (2**15 - 2))
    return units.where(units != 0, 1).float()


def keeps_transformed(w: Tensor, tile: int = 4, product: torch.dtype = torch.float32) -> bool:
    """Whether transformed weights of 3x3 kernels are better kept than recomputed at each call."""
    return w.shape[0] * w.shape[1] * (tile + 2) ** 2 * product.itemsize <= MOST_TRANSFORMED


def as_winograd(
    packed: PackedConv,
    tile: int = 4,
    stride: int = 1,
    transposed: bool = False,
    w: Tensor | None = None,
) -> PackedWinograd:
    """Weights in the memory of `packed`, which the kernel transforms in float32 at each call.

    Args:
        packed: weights (K, C, 3, 3), also for a transposed convolution, whose own are (C, K, 3, 3). Products
            are float32 if it is float32, int16 if it is bfloat16.
        w: the weights, which are read for int16 products.

    Raises:
        ValueError: packed has other than 3x3 kernels, another dtype or other weights than w, or there is no
            such algorithm.
    """
    k, c = packed.out_channels, packed.in_channels
    if packed.kernel != (3, 3):
        raise ValueError(f"conv_winograd: packed is of kernels of {packed.kernel}, they must be (3, 3)")
    g = weight_transform(tile, stride, transposed)
    dtype = packed.data.dtype
    if dtype is torch.float32:
        return PackedWinograd(packed.data, k, c, tile, stride, transposed, packed.chunk)
    if dtype is not torch.bfloat16:
        raise ValueError(f"conv_winograd: packed is {dtype}, it must be float32 or bfloat16")
    shape = (c, k, 3, 3) if transposed else (k, c, 3, 3)
    if w is None or w.shape != shape:
        given = None if w is None else tuple(w.shape)
        raise ValueError(f"conv_winograd: w is {given}, with packed of bfloat16 it must be {shape}")
    _check_whole(tile, torch.int16)
    w = w.bfloat16()
    levels = _levels(w, transposed)
    # Allocated first: data that outlives the loop would otherwise keep a panel's memory from being reused.
    units = torch.empty(len(packed.data), len(g) ** 2, PANEL)
    for panel, values in enumerate(_transformed(w, g, transposed, levels)):
        units[panel] = _units(values)
    return PackedWinograd(packed.data, k, c, tile, stride, transposed, packed.chunk, units, levels)


def can_pay(w: Tensor, stride: int, padding: int) -> bool:
    """Whether tiles of 4 with these weights are faster than a direct convolution for inputs of some size.

    stride, padding: also for a transposed convolution.
    """
    filtered = tuple(w.shape[2:]) == (3, 3) and stride in LEAST_CHANNELS and padding == 1
    return filtered and min(w.shape[:2]) >= LEAST_CHANNELS[stride]


def pays(shape: Sequence[int], stride: int = 1, transposed: bool = False) -> bool:
    """Whether tiles of 4 are faster for outputs of this shape, (N, K, H, W); of inputs if transposed.

    A tile takes the time of 5 to 6 pixels convolved directly, with stride 2 of 11 to 12, however few of its
    16 pixels are within the image. Reading the weights of 512 channels takes the time of 27. For that reason
    one tile with stride 2 gains nothing and four gain 1.2 times; one transposed tile gains 1.3 times, because
    it replaces four direct convolutions.
    """
    n, _, h, w = shape
    pixels, tiles = n * h * w, n * -(-h // 4) * -(-w // 4)
    if stride == 1:
        return pixels >= max(8 * tiles, 32)
    return pixels >= max(12 * tiles, 16 if transposed else 64)


def conv_winograd_native(
    x: Tensor,
    packed: PackedWinograd,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    out: Tensor,
    slope: float | None,
    codes: ConvCodes = FLOATS,
) -> None:
    """act(scale * conv(x, w) + shift + residual) + skip into `out`, unchecked, as `conv_bn_act_native`.

    Arithmetic is float32. Against float64, as root mean squares, the error of F(4x4) is at most 4.5 times
    that of eager torch's direct convolution in float32, 7 times with one channel; that of F(2x2) 1.7 and 2.2
    times; with stride 2, 2.2 and 4 times; transposed, where eager sums the taps separately, 3.2 and 4.5
    times. With up to 16 channels it is a sixth more where the kernel transforms the weights, in float32. With
    int16 products the error of any is at most 1.4 times eager's in bfloat16.

    A non-finite value in x spoils the outputs of every tile whose window contains it, nothing beyond. Tiles
    are tile x tile outputs counted from the top left, 8 x 8 if transposed, and a window is the inputs that
    their taps read, if transposed the 5 x 5 inputs from the first. An infinity may become NaN.

    Args:
        x: (N, C, H, W) in NHWC storage, float32 or bfloat16, the latter for int16 products; padding is 1.
        scale, shift: float32 (K,), or None.
        residual, skip, out: (N, K, H', W') in x's dtype, with channel stride 1 and equal other strides; they
            need not be dense. H' is ceil(H / stride), 2 H if transposed; so is W'.
        slope: slope of the activation for negative values: 0 is relu, up to 1 leaky relu, None no activation.
        codes: quantization parameters where x, residual, skip and out are uint8 and products int16; scale and
            shift then cover whole panels.
    """
    n, c, h, w = x.shape
    _, k, out_h, out_w = out.shape
    stride_n, _, stride_h, stride_w = out.stride()
    native.module.winograd(
        x.data_ptr(),
        packed.data.data_ptr(),
        native.address(packed.units),
        native.address(packed.levels),
        native.address(scale),
        native.address(shift),
        native.address(residual),
        native.address(skip),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        native.PRODUCT_CODES[packed.product],
        n, h, w, c, out_h, out_w, k,
        packed.tile,
        packed.stride,
        packed.transposed,
        packed.chunk,
        stride_n, stride_h, stride_w,
        common.native_slope(slope),
        torch.get_num_threads(),
        codes.x_zero,
        codes.residual_scale,
        codes.skip_scale,
        codes.bias,
    )  # fmt: skip


def shared_block_winograd_native(
    x: Tensor,
    packed: PackedWinograd,
    scale1: Tensor,
    shift1: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    hidden: Tensor,
    out: Tensor,
    slope: float | None,
    skip: bool,
) -> None:
    """Runs a shared block into `out`, unchecked: both convolutions at once, the second close behind the
    first.

    Bit-identical to one `conv_winograd_native` after the other.

    Args:
        x, out: (N, C, H, W) in NHWC storage, float32 or bfloat16.
        hidden: memory of x's shape and dtype for the intermediate tensor.
        packed: transformed weights of stride 1 and tiles of 4.
        scale1, shift1, scale2, shift2: float32 (C,).
        slope: slope of the first activation, as in `conv_winograd_native`.
        skip: whether x is added again after the second activation.
    """
    n, c, h, w = x.shape
    native.module.winograd_block(
        x.data_ptr(),
        packed.data.data_ptr(),
        native.address(packed.units),
        native.address(packed.levels),
        scale1.data_ptr(),
        shift1.data_ptr(),
        scale2.data_ptr(),
        shift2.data_ptr(),
        hidden.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[x.dtype],
        native.PRODUCT_CODES[packed.product],
        n, h, w, c,
        skip,
        common.native_slope(slope),
        torch.get_num_threads(),
    )  # fmt: skip
