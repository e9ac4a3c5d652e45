"""3x3 convolutions by Winograd's minimal filtering, on the CPU.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). F(m x m, 3 x 3) makes
m x m outputs of stride 1 from the m + 2 x m + 2 inputs under them by (m + 2)^2 products for each pair of
channels, where a direct convolution takes 9 m^2: 2.25 times fewer for m = 2, 4 times fewer for m = 4. There
is none for m = 6: at its best points, 0, 1/2, 1, 2 and their opposites, it has 4.2 times the error of m = 4,
and layers of 128 channels take 0.9 of the time, of 64 and 256 as long, of 512 1.4 times as long.

Of a convolution of stride 2 the middle tap meets every second input and the other two those between. In one
dimension 4 outputs take 4 products of the one and, by F(4, 2), 5 of the others, where 12 are direct: 1.78
times fewer in two. A transposed convolution of stride 2 is the same with its even and odd outputs. All 4
products of the middle tap have one weight, so that transformed weights are 4 times as many, as of F(4 x 4).

Products of bfloat16 activations are float32, or whole numbers of 16 bits where the CPU has instructions for
them, at twice the rate. Transformed values rounded to bfloat16, of 8 bits, would make 4 to 7 times eager's
error in bfloat16 with F(4x4). Whole numbers have 14 bits below the largest value of a tile, and the weights'
are as fine as sums of 64 channels in 32 bits allow: the error is at most 1.4 times eager's.
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

# Where polynomials are evaluated, beside infinity; as csrc/cpu/winograd_filters.h. The usual 1 and 2 in place
# of 5/8 and 3/2 make twice the error, and so do 0, 1, -1 and 2 in place of those of two taps.
POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
}
POINTS_OF_TWO_TAPS = (Fraction(3, 8), Fraction(-3, 8), Fraction(5, 4), Fraction(-5, 4))

# By stride: with fewer the transforms take a good part of the time, and what is gained is not worth the
# digits. Of stride 2 that is 1.35 times with 64 channels, 1.2 from 32 to 64, and nothing with 32.
LEAST_CHANNELS = {1: 32, 2: 64}
# Bytes. More transformed weights than these would come from memory at each call; transforming a quarter of
# them takes 0.8 of the time for 512 channels at 16 x 16, for 256 channels 0.9 there and 1.05 at 32 x 32, but
# from 128 channels to 256 1.15. Products of int16 take half as long, so that 512 channels take 1.05 and 1.1
# of the time at 16 x 16 and 32 x 32, but a quarter of the memory; 256 channels would take 1.1 to 1.2.
MOST_TRANSFORMED = 8 * 1024 * 1024
# Channels whose products are summed before they join the rest: kTerms in csrc/cpu/winograd_products.h.
TERMS = 64


@dataclasses.dataclass(frozen=True)
class PackedWinograd:
    """Weights of a 3x3 convolution for the native kernel.

    Attributes:
        data: float32. If transformed (panels, frequencies, in_channels, 16): panels of 16 output channels,
            zeros beyond the last; the rows of the transformed kernels, then their columns, (tile + 2)^2 in
            all; or int16 (panels, frequencies, pairs of in_channels, 16, 2). Else that of `PackedConv`.
        out_channels, in_channels: of the convolution.
        tile: outputs of a tile in each dimension, 2 or 4; inputs if transposed.
        stride: 1 or 2.
        transposed: the convolution is a transposed one, of padding 1 and output padding 1.
        chunk: 0 if they are transformed; else that of `PackedConv`, and the kernel transforms them: those of
            float32, or for products of int16 of bfloat16.
        units: where products are int16, what 1 is worth, float32 (panels, frequencies, 16); else None.
        levels: there by what each channel of the input is multiplied, for its weights are divided by it,
            float32 (in_channels,).
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
        """What is multiplied."""
        return torch.float32 if self.units is None else torch.int16


def evaluations(points: Sequence[Fraction], taps: int) -> Tensor:
    """G of some taps: powers of each point, over the product of its distances to the others, and infinity."""
    rows = []
    for point in points:
        distances = Fraction(1)
        for other in points:
            distances *= point - other if other != point else 1
        rows.append([float(point**power / distances) for power in range(taps)])
    infinity = [0.0] * (taps - 1) + [1.0]
    return torch.tensor([*rows, infinity], dtype=torch.float64)


def weight_transform(tile: int, stride: int = 1, transposed: bool = False) -> Tensor:
    """G, float64 (tile + 2, 3): of stride 2 the middle tap, then the evaluations of the other two.

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
    # The input after an odd output of a transposed convolution meets the first tap.
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

    G w Gt is float64, rounded once.

    Args:
        product: what is multiplied, float32 or, of bfloat16 activations in tiles of 4, int16.

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
    """Of each input channel the size of its weights, root mean square, in that of the largest; float32.

    A channel's largest values cost the others digits, so they are made alike by what becomes of them.
    """
    squares = torch.zeros(w.shape[0 if transposed else 1], dtype=torch.float64)
    # Some output channels at a time: all of a large layer in float64 would be twice its size.
    for kernels in (w.transpose(0, 1) if transposed else w).detach().cpu().split(PANEL):
        squares += kernels.double().square().sum((0, 2, 3))
    levels = squares.sqrt()
    # A weight that is not finite spoils what it makes, but not all that its channel does.
    levels = levels.where(levels.isfinite(), 1)
    return (levels / levels.max().clamp_min(torch.finfo(torch.float64).tiny)).float()


def _transformed(w: Tensor, g: Tensor, transposed: bool, levels: Tensor | None = None) -> Iterator[Tensor]:
    """Panels of g w gt, float64 (frequencies, in_channels, 16), divided by the levels of input channels.

    One at a time: all of a large layer in float64 would be eight times the size of what is kept.
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
    """What 1 is worth of a panel's weights in 16 bits, float32 (frequencies, 16).

    Inputs have 14 bits and a sign, and the kernel sums up to 64 neighbouring channels in 32 bits, so that the
    sizes of so many weights may add up to 2^17, less half of each that rounding may add.
    """
    sums = F.pad(values, (0, 0, 1, 0)).abs_().cumsum_(1)
    window = min(TERMS, values.shape[1])
    largest_sum = (sums[:, window:] - sums[:, :-window]).amax(1)
    largest = torch.maximum(values.amax(1), -values.amin(1))
    units = torch.maximum(largest_sum / (2**17 - TERMS), largest / (2**15 - 2))
    return units.where(units != 0, 1).float()


def keeps_transformed(w: Tensor, tile: int = 4, product: torch.dtype = torch.float32) -> bool:
    """Whether weights of 3x3 kernels are better kept transformed than transformed at each call."""
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
        packed: of weights (K, C, 3, 3); of a transposed convolution's as well, though they come as
            (C, K, 3, 3). Products are float32 where it is that, int16 where it is bfloat16.
        w: the weights, which are read where products are int16.

    Raises:
        ValueError: packed is not of 3x3 kernels, of another dtype or of other weights than w, or there is no
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
    # Made first: what stays keeps the memory of a panel's values from being used again.
    units = torch.empty(len(packed.data), len(g) ** 2, PANEL)
    for panel, values in enumerate(_transformed(w, g, transposed, levels)):
        units[panel] = _units(values)
    return PackedWinograd(packed.data, k, c, tile, stride, transposed, packed.chunk, units, levels)


def can_pay(w: Tensor, stride: int, padding: int) -> bool:
    """Whether tiles of 4 with these weights are faster than a direct convolution on inputs of some size.

    Of a transposed convolution these are the stride and the padding too.
    """
    filtered = tuple(w.shape[2:]) == (3, 3) and stride in LEAST_CHANNELS and padding == 1
    return filtered and min(w.shape[:2]) >= LEAST_CHANNELS[stride]


def pays(shape: Sequence[int], stride: int = 1, transposed: bool = False) -> bool:
    """Whether they are faster with outputs of this shape, (N, K, H, W), if transposed with inputs.

    A tile takes the time of 5 to 6 pixels convolved directly, of stride 2 that of 11 to 12, however few of
    its 16 pixels are within the image. Reading the weights of 512 channels takes that of 27. Of stride 2 one
    tile gains nothing for that reason and four 1.2 times; if transposed one gains 1.3 times, for there are
    four direct convolutions in its place.
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
    that of eager torch's direct convolution in float32, 7 times with one channel; that of F(2x2) 1.7 and
    2.2 times; of stride 2, 2.2 and 4 times; of a transposed one, whose taps eager sums apart, 3.2 and 4.5
    times. With up to 16 channels a sixth more where the kernel transforms the weights, in float32. With
    products of int16 the error of any is at most 1.4 times eager's in bfloat16.

    What is not finite in x spoils the outputs of every tile whose window holds it, nothing beyond. Tiles are
    tile x tile outputs counted from the top left, 8 x 8 if transposed, and a window is what their taps meet,
    of a transposed one the 5 x 5 inputs from the first. An infinity may become NaN.

    Args:
        x: (N, C, H, W) in NHWC storage, float32 or bfloat16, the latter where products are int16; padding
            is 1.
        scale, shift: float32 (K,), or None.
        residual, skip, out: (N, K, H', W') of x's dtype, with one stride of channels, 1, and the same other
            strides; they need not be dense. H' is ceil(H / stride), if transposed 2 H; so is W'.
        slope: of the activation: 0 relu, up to 1 leaky relu, None nothing.
        codes: where x, residual, skip and out are codes, uint8, and products int16; scale and shift are of
            whole panels there.
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
    """A shared block into `out`, unchecked: both convolutions at once, the second close behind the first.

    Equal bit for bit to one `conv_winograd_native` after the other.

    Args:
        x, out: (N, C, H, W) in NHWC storage, float32 or bfloat16.
        hidden: memory of x's shape and dtype for what lies between.
        packed: transformed weights of stride 1 and tiles of 4.
        scale1, shift1, scale2, shift2: float32 (C,).
        slope: of the first activation, as of `conv_winograd_native`.
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
