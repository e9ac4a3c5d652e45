"""The stem by Winograd's filtering, against float64 and a bound on its roundings."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import DTYPES, each_isa, needs_native, poisoned, random
from test_conv_bn_act import (
    assert_no_bit_changes,
    assert_only_within,
    double,
    fenced,
    with_threads,
)
from test_conv_winograd import root_mean_square
from test_stem import ENLARGED, MEAN, SHAPES, SLOPES, STD, WIDE, parameters, pixels, truth
from torch import nn
from torch.nn import functional as F

from shelfkern.ops import stem_native
from shelfkern.ops._stem_winograd import (
    POINTS,
    pack_stem_winograd,
    quad_kernels,
    weight_transform,
)
from shelfkern.ops.quantize import Quantum
from shelfkern.ops.stem import StemCodes, normalise, normalised_values

TILE, TAPS = 4, 4
WINDOW = TILE + TAPS - 1
# In the worst case, one after the other: eight in each of the four transforms of data, twelve of products
# that are summed, one of the weights, two of scale and shift, one of an activation's slope.
ROUNDINGS = 4 * 8 + 12 + 4


def quads(x):
    """Pixels (N, 3, H, W) as (N, 12, H / 2, W / 2), with a border of what tiles of 4 see beyond them."""
    n, _, h, w = x.shape
    pairs = x.view(n, 3, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    beyond = [-(extent // 2) % TILE + 1 for extent in (w, h)]
    return F.pad(pairs, (2, beyond[0], 2, beyond[1]))


def data_transforms():
    """B^T (7, 7) and A^T (4, 7) in float64, from the points."""

    def product(points):
        coefficients = [Fraction(1)]
        for point in points:
            shifted = [Fraction(0), *coefficients]
            coefficients = [a - point * b for a, b in zip(shifted, [*coefficients, 0], strict=True)]
        return coefficients

    rows = [[*product(other for other in POINTS if other != point), Fraction(0)] for point in POINTS]
    bt = torch.tensor([[float(c) for c in row] for row in [*rows, product(POINTS)]], dtype=torch.float64)
    powers = [[float(point**i) for point in POINTS] + [float(i == TILE - 1)] for i in range(TILE)]
    return bt, torch.tensor(powers, dtype=torch.float64)


def filtered(x, w, magnitudes=False):
    """The convolution by Winograd's filtering in float64, or of the absolute values of all that is summed."""
    g, (bt, at) = weight_transform(), data_transforms()
    data, kernels = quads(x), quad_kernels(w)
    if magnitudes:
        g, bt, at, data, kernels = (t.abs() for t in (g, bt, at, data, kernels))
    windows = data.unfold(2, WINDOW, TILE).unfold(3, WINDOW, TILE)
    transformed = torch.einsum("ir,ncyxrs,js->ncyxij", bt, windows, bt)
    products = torch.einsum("ncyxij,kcij->nkyxij", transformed, g @ kernels @ g.T)
    outputs = torch.einsum("ri,nkyxij,sj->nkyrxs", at, products, at)
    return outputs.flatten(4, 5).flatten(2, 3)[:, :, : x.shape[2] // 2, : x.shape[3] // 2]


def seen(image, size, padded=None):
    """Normalised images in float64 as the convolution sees them."""
    mean, std = double([MEAN, STD])
    x = normalise(image, mean, std) if image.dtype is torch.uint8 else image.double()
    padded = padded or size
    x = F.pad(x, (0, padded[1] - x.shape[3], 0, padded[0] - x.shape[2]))
    return x if padded == size else F.interpolate(x, size, mode="bilinear")


def run(image, args, size, slope, dtype=None, padded=None):
    w, scale, shift = args
    out = poisoned((image.shape[0], size[0] // 4, size[1] // 4, len(w)), dtype or w.dtype)
    storage, out = fenced(out.permute(0, 3, 1, 2))
    packed, values = pack_stem_winograd(w), normalised_values(MEAN, STD)
    stem_native(image, packed, scale.float(), shift.float(), values, out, slope, padded=padded)
    if image.dtype is torch.uint8 or image.isfinite().all():
        assert_only_within(storage, out)
    return out


def assert_within_bound(result, image, args, size, slope, padded=None):
    """No farther from float64 than its roundings can bring it, which pooling only passes on."""
    w, scale, shift = double(args)
    exact = truth(image, *args, MEAN, STD, size, slope, padded)
    x = seen(image, size, padded)
    sums = filtered(x, w, magnitudes=True) * scale.abs()[:, None, None] + shift.abs()[:, None, None]
    bound = F.max_pool2d(sums, 3, 2, 1) * ROUNDINGS * 2.0**-24
    rounding = 0 if result.dtype is torch.float32 else 2.0**-8 * exact.abs()
    assert ((result.double() - exact).abs() <= bound + rounding).all()
    # Of either sign, they add up as their root does.
    if result.dtype is torch.float32 and exact.numel():
        assert root_mean_square(result - exact) <= ROUNDINGS**0.5 * 2.0**-24 * root_mean_square(sums)


def test_filtering_quads_is_the_convolution():
    x, w = random(2, 3, 20, 36).double(), random(5, 3, 7, 7).double()
    expected = F.conv2d(x, w, stride=2, padding=3)
    torch.testing.assert_close(filtered(x, w), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 16, 37])
def test_weights_are_transformed_once_in_float64(k):
    w = random(k, 3, 7, 7).requires_grad_()
    data = pack_stem_winograd(w).data
    panels = -(-k // 16)
    assert data.shape == (panels, 49, 12, 16) and data.dtype is torch.float32 and not data.requires_grad
    g = weight_transform()
    expected = (g @ quad_kernels(w.detach().double()) @ g.T).float()
    for channel in range(16 * panels):
        found = data[channel // 16, :, :, channel % 16].T.unflatten(1, (7, 7))
        # Sums of a few products in another order, before they are rounded.
        if channel < k:
            torch.testing.assert_close(found, expected[channel], rtol=2.0**-23, atol=1e-12)
        else:
            assert not found.any()


@needs_native
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, h, w, k, size", SHAPES + WIDE)
def test_every_isa_is_within_its_bound(n, h, w, k, size, dtype, raw):
    image, args = pixels(n, h, w), parameters(k, dtype)
    image = image if raw else normalise(image, MEAN, STD).contiguous()
    each_isa(lambda isa: assert_within_bound(run(image, args, size, 0.01), image, args, size, 0.01))


@needs_native
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("n, h, w, k, padded, size", ENLARGED)
def test_every_isa_enlarges_images(n, h, w, k, padded, size, raw):
    image, args = pixels(n, h, w), parameters(k)
    image = image if raw else normalise(image, MEAN, STD).contiguous()

    def check(isa):
        result = run(image, args, size, 0.0, padded=padded)
        assert_within_bound(result, image, args, size, 0.0, padded)

    each_isa(check)


@needs_native
@pytest.mark.parametrize("slope", SLOPES)
def test_every_slope(slope):
    image, args = pixels(1, 29, 50), parameters(19)
    assert_within_bound(run(image, args, (32, 52), slope), image, args, (32, 52), slope)


@needs_native
@given(
    n=st.integers(0, 2), h=st.integers(1, 80), w=st.integers(1, 90), k=st.integers(1, 40),
    beyond=st.tuples(st.integers(0, 3), st.integers(0, 2)), threads=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_size_on_every_isa(n, h, w, k, beyond, threads):
    size = -(-h // 4) * 4 + 4 * beyond[0], -(-w // 4) * 4 + 4 * beyond[1]
    image, args = pixels(n, h, w), parameters(k)
    each_isa(
        lambda isa: assert_within_bound(
            with_threads(threads, lambda: run(image, args, size, 0.25)), image, args, size, 0.25
        )
    )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_change_no_bit(dtype):
    # 50 rows of tiles: as many pieces as twice the threads.
    image, args = pixels(2, 400, 40), parameters(20, dtype)
    assert_no_bit_changes(lambda: run(image, args, (400, 40), 0.0))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_the_tiles_that_see_it_and_no_others(value):
    size, args = (96, 64), parameters(17)
    image = random(1, 3, *size)
    clean = run(image, args, size, None)
    image[0, 1, 37, 30] = value
    found = run(image, args, size, None)
    # Tile y sees the rows of pixels 8 y - 4 to 8 y + 9, and is pooled with the row before it.
    tiles = [torch.tensor([8 * t - 4 <= at <= 8 * t + 9 for t in range(extent // 8)])
             for at, extent in ((37, size[0]), (30, size[1]))]  # fmt: skip
    convolved = [one.repeat_interleave(TILE) for one in tiles]
    spoiled = convolved[0][:, None] & convolved[1][None]
    pooled = F.max_pool2d(spoiled.float()[None, None], 3, 2, 1)[0, 0] > 0
    assert torch.equal(found[..., ~pooled], clean[..., ~pooled])
    assert not torch.equal(found[..., pooled], clean[..., pooled])
    exact = truth(image, *args, MEAN, STD, size, None)
    assert not found[~exact.isfinite()].isfinite().any()


@needs_native
@pytest.mark.parametrize("n, h, w, k, size", SHAPES)
def test_codes_of_every_isa_are_those_of_the_floats(n, h, w, k, size):
    image, (weight, scale, shift) = pixels(n, h, w), parameters(k)
    quantum = Quantum(0.03, 5)
    norms = [F.pad(t / quantum.step, (0, -k % 16)) for t in (scale, shift)]
    packed, values = pack_stem_winograd(weight), normalised_values(MEAN, STD)

    def check(isa):
        floats = run(image, (weight, scale, shift), size, 0.01)
        out = torch.full((n, size[0] // 4, size[1] // 4, k), 77, dtype=torch.uint8).permute(0, 3, 1, 2)
        stem_native(image, packed, *norms, values, out, 0.01, StemCodes(bias=quantum.zero))
        off = (out.int() - quantum.codes(floats).int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-2, isa

    each_isa(check)


@needs_native
def test_is_the_module_in_eval_mode():
    convolution, pool = nn.Conv2d(3, 12, 7, 2, 3).double(), nn.MaxPool2d(3, 2, 1)
    image = random(1, 3, 64, 48)
    args = convolution.weight.detach().float(), torch.ones(12), convolution.bias.detach().float()
    expected = pool(F.relu(convolution(image.double()))).detach()
    torch.testing.assert_close(run(image, args, (64, 48), 0.0).double(), expected, rtol=0, atol=1e-5)
