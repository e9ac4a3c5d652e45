"""Kernels on unsigned codes of 8 bits, the activations of the CPU engine in int8, against float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import DTYPES, EVERY, Layer, each_isa, needs_native, nhwc, random
from test_conv_bn_act import assert_no_bit_changes, framed, walled, with_threads
from test_stem import MEAN, STD, parameters, pixels
from torch.nn import functional as F

from shelfkern import ops
from shelfkern.ops import attention_gate_native, stem_native, upsample_add_native
from shelfkern.ops._conv_codes import (
    CodedFilters,
    conv_codes_native,
    deconv_codes_native,
    fold,
    pack_conv_codes,
    pack_deconv_codes,
    pack_winograd_codes,
)
from shelfkern.ops._conv_winograd import as_winograd, pack_winograd
from shelfkern.ops.conv_bn_act import conv_bn_act_reference, out_shape, pack_conv, whole_panels
from shelfkern.ops.deconv_add import deconv_add_reference
from shelfkern.ops.quantize import Quantum, quantize_native
from shelfkern.ops.stem import (
    StemCodes,
    fold_raw,
    normalise,
    normalised_values,
    pack_stem_rows,
    stem_reference,
)

pytestmark = needs_native
NAN, INF = float("nan"), float("inf")
U8 = torch.uint8
# What direct convolutions multiply.
PRODUCTS = (torch.int8, torch.int16)
POISON = 55
# Powers of two, so that what is exact can be told from what is nearly so.
X, RESIDUAL, SKIP, OUT = Quantum(0.5, 3), Quantum(0.25, 7), Quantum(2.0, 1), Quantum(0.5, 100)
# n, c, h, w, k, kernel, stride, padding
SHAPES = [
    (2, 19, 5, 4, 67, (3, 3), 2, 1),
    (1, 64, 6, 13, 64, (3, 3), 1, 1),
    (1, 1, 1, 1, 1, (3, 3), 1, 1),
    (3, 130, 4, 5, 33, (1, 1), 2, 0),
    (1, 64, 9, 20, 192, (1, 1), 1, 0),
    (1, 48, 9, 20, 48, (1, 1), 1, 0),
    (1, 600, 3, 4, 17, (3, 3), 1, 1),
    (2, 6, 9, 70, 18, (2, 5), 1, 2),
]


def some_codes(*shape, seed=0, highest=8):
    generator = torch.Generator().manual_seed(seed)
    return nhwc(torch.randint(0, highest + 1, shape, generator=generator, dtype=U8))


class OfCodes(Layer):
    """A convolution of codes whose result is exact in float32."""

    def truth(self):
        values = [
            None if t is None else quantum.values(t, torch.float64)
            for t, quantum in ((self.x, X), (self.residual, RESIDUAL), (self.skip, SKIP))
        ]
        norms = [None if t is None else t.double() for t in (self.scale, self.shift)]
        x, others = values[0], values[1:]
        weight = self.weight.double() / 4
        return conv_bn_act_reference(x, weight, *norms, *others, self.stride, self.padding, self.slope)

    def direct(self, product=torch.int8):
        return pack_conv(self.weight, self.stride, self.padding, dtype=product)

    def winograd(self):
        return pack_winograd(self.weight, 4, self.stride, product=torch.int16)

    def winograd_of_taps(self):
        taps = self.weight.bfloat16()
        packed = pack_conv(taps, self.stride, 1, dtype=torch.bfloat16)
        return as_winograd(packed, 4, self.stride, w=taps)

    def run(self, out, packed):
        """Into memory with poison around it, from memory with other codes around it."""
        filters = CodedFilters(packed, torch.full((len(self.weight),), 0.25))
        residual, skip = (None if t is None else framed(t, 9)[1] for t in (self.residual, self.skip))
        quanta = (None if residual is None else RESIDUAL, None if skip is None else SKIP)
        folded = fold(filters, self.scale, self.shift, X, out, *quanta)
        folded = dataclasses.replace(folded, scale=walled(folded.scale), shift=walled(folded.shift))
        shape = out_shape(self.x, self.weight, self.stride, self.padding)
        fill = NAN if out is None else POISON
        frame, result = framed(torch.full(shape, fill, dtype=U8 if out else torch.float32), fill)
        conv_codes_native(self.x, filters.packed, folded, residual, skip, result, self.slope)
        found = result.clone()
        result.fill_(fill)
        assert (frame == fill).all() or frame.isnan().all()
        return found

    def check(self, out=OUT):
        truth = self.truth()
        for product in PRODUCTS:
            found = self.run(out, self.direct(product))
            assert torch.equal(found, truth.float() if out is None else out.codes(truth)), product

    def check_winograd(self, out=OUT):
        # Truths are quarters of codes, of which many lie in the middle of two.
        for packed in (self.winograd(), self.winograd_of_taps()):
            assert_near(self.run(out, packed), self.truth(), out, 1e-3, equal=-1)


def layer(shape, present=EVERY, slope=0.25):
    n, c, h, w, k, kernel, stride, padding = shape
    x = some_codes(n, c, h, w)
    weight = (2 * random(k, c, *kernel, seed=1)).round().clamp(-4, 4).to(torch.int8)
    maps = out_shape(x, weight, stride, padding)
    scale = 2.0 ** torch.arange(k).remainder(4).sub(6) * (1 - 2 * torch.arange(k).remainder(2))
    shift = (4 * random(k, seed=2)).round()
    others = some_codes(*maps, seed=3, highest=255), some_codes(*maps, seed=4, highest=20)
    return OfCodes(x, weight, scale, shift, *others, stride, padding, slope).only(present)


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_to_codes_and_to_floats(shape):
    for out in (OUT, None):
        layer(shape).check(out)


@pytest.mark.parametrize("slope", [0.0, 0.25, None])
@pytest.mark.parametrize("present", [(), *((name,) for name in EVERY), EVERY])
def test_conv_every_part_of_the_epilogue(present, slope):
    # With a zero of 0, relu is what the codes' own range does.
    for k, out in itertools.product((19, 64), (OUT, Quantum(0.5))):
        layer((1, 12, 5, 9, k, (3, 3), 1, 1), present, slope).check(out)


@given(
    n=st.integers(1, 2), c=st.one_of(st.integers(1, 35), st.sampled_from([128, 131])), h=st.integers(1, 9),
    w=st.integers(1, 30), k=st.one_of(st.integers(1, 70), st.sampled_from([96, 128])),
    kernel=st.sampled_from([(1, 1), (3, 3)]), stride=st.integers(1, 2),
    present=st.sets(st.sampled_from(EVERY)), out=st.sampled_from([OUT, None, Quantum(0.125)]),
    count=st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_conv_on_every_isa(n, c, h, w, k, kernel, stride, present, out, count):
    one = layer((n, c, h, w, k, kernel, stride, kernel[0] // 2), present)
    one.x = fenced_codes(one.x)
    with_threads(count, lambda: each_isa(lambda isa: one.check(out)))


@pytest.mark.parametrize("slope", [0.0, 0.25, None])
@pytest.mark.parametrize("present", [(), *((name,) for name in EVERY), EVERY])
def test_winograd_every_part_of_the_epilogue(present, slope):
    for k, stride in itertools.product((19, 64), (1, 2)):
        layer((1, 32, 9, 14, k, (3, 3), stride, 1), present, slope).check_winograd()


@given(
    n=st.integers(1, 2), c=st.one_of(st.integers(1, 35), st.sampled_from([128, 131])), h=st.integers(1, 9),
    w=st.integers(1, 30), k=st.one_of(st.integers(1, 70), st.sampled_from([96, 128])),
    stride=st.integers(1, 2), present=st.sets(st.sampled_from(EVERY)), count=st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_winograd_on_every_isa(n, c, h, w, k, stride, present, count):
    one = layer((n, c, h, w, k, (3, 3), stride, 1), present)
    one.x = fenced_codes(one.x)
    with_threads(count, lambda: each_isa(lambda isa: one.check_winograd()))


def test_winograd_of_the_largest_codes_on_every_isa():
    """Sums of 16 bits by 16 bits stay within 32."""
    for sign in (1, -1):
        weight = torch.full((16, 512, 3, 3), sign * 127, dtype=torch.int8)
        weight[3, ::2] *= -1
        filters = CodedFilters(pack_winograd(weight, product=torch.int16), torch.ones(16))
        x, out = nhwc(torch.full((1, 512, 9, 9), 255, dtype=U8)), Quantum(2.0**21, 120)
        truth = F.conv2d(x.double(), weight.double(), padding=1)

        def run(isa, filters=filters, x=x, out=out, truth=truth):
            result = nhwc(torch.zeros(truth.shape, dtype=U8))
            folded = fold(filters, None, None, Quantum(1.0), out)
            conv_codes_native(x, filters.packed, folded, None, None, result, None)
            assert_near(result, truth, out, 1e-3, equal=0.5)

        each_isa(run)


def fenced_codes(t):
    """t in dense NHWC storage between bytes that would show."""
    n, c, h, w = t.shape
    storage = torch.full((t.numel() + 1000,), 255, dtype=U8)
    return storage[500:-500].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


def test_sums_of_the_largest_codes_on_every_isa():
    """255 times 127 and times -127 in every product: whatever saturates on the way is seen."""
    for sign, product in itertools.product((1, -1), PRODUCTS):
        weight = torch.full((16, 512, 3, 3), sign * 127, dtype=torch.int8)
        weight[3, ::2] *= -1
        filters = CodedFilters(pack_conv(weight, padding=1, dtype=product), torch.ones(16))
        x, out = nhwc(torch.full((1, 512, 4, 4), 255, dtype=U8)), Quantum(2.0**21, 120)
        truth = F.conv2d(x.double(), weight.double(), padding=1)

        def run(isa, filters=filters, x=x, out=out, truth=truth):
            result = nhwc(torch.zeros(truth.shape, dtype=U8))
            conv_codes_native(
                x, filters.packed, fold(filters, None, None, Quantum(1.0), out), None, None, result, None
            )
            assert torch.equal(result, out.codes(truth)), isa

        each_isa(run)


@pytest.mark.parametrize("zero", [0, 17, 255])
def test_every_code_and_every_rounding_on_every_isa(zero):
    """A 1x1 convolution of one channel by 1: what is stored is the shift and the rounding of x."""
    x, weight = nhwc(torch.arange(256, dtype=U8).view(1, 1, 16, 16)), torch.ones(1, 1, 1, 1, dtype=torch.int8)
    values, shift = Quantum(1.0, zero).values(x, torch.float64), torch.tensor([0.5])
    for step, product in itertools.product((0.5, 1.0, 0.25, 2.0, 3.0), PRODUCTS):
        filters = CodedFilters(pack_conv(weight, dtype=product), torch.ones(1))
        # Divided by 3 a half is no longer one.
        allowed, out = int(step == 3), Quantum(step, 40)

        def run(isa, filters=filters, allowed=allowed, out=out):
            result = nhwc(torch.zeros(1, 1, 16, 16, dtype=U8))
            folded = fold(filters, None, shift, Quantum(1.0, zero), out)
            conv_codes_native(x, filters.packed, folded, None, None, result, None)
            expected = out.codes((values + shift).float())
            assert (result.int() - expected.int()).abs().max() <= allowed, isa

        each_isa(run)


def test_conv_what_is_not_finite_on_every_isa():
    """NaN becomes the lowest code, what is beyond the codes the last on its side."""
    x, weight = nhwc(torch.full((1, 4, 2, 2), 9, dtype=U8)), torch.ones(64, 4, 1, 1, dtype=torch.int8)
    filters = CodedFilters(pack_conv(weight, dtype=torch.int8), torch.ones(64))
    shift = torch.zeros(64)
    shift[0], shift[17], shift[18], shift[40] = NAN, INF, -INF, 1e30

    def run(isa):
        result = nhwc(torch.zeros(1, 64, 2, 2, dtype=U8))
        conv_codes_native(
            x, filters.packed, fold(filters, None, shift, X, Quantum(1.0, 30)), None, None, result, None
        )
        assert result[0, [0, 17, 18, 40, 1], 0, 0].tolist() == [0, 255, 0, 255, 42], isa

    each_isa(run)


def test_threads_and_repeats_change_no_bit():
    one = layer((1, 64, 30, 40, 64, (3, 3), 1, 1))
    for packed in (one.direct(), one.winograd(), one.winograd_of_taps()):
        assert_no_bit_changes(functools.partial(one.run, OUT, packed))


@pytest.mark.parametrize(("channels", "numbers", "dtype"), [(64, 36, torch.int16), (512, 9, torch.bfloat16)])
@pytest.mark.parametrize(("stride", "transposed"), [(1, False), (2, False), (2, True)])
def test_many_weights_in_codes_are_transformed_at_each_call(channels, numbers, dtype, stride, transposed):
    w = random(32, channels, 3, 3).repeat(channels // 32, 1, 1, 1)
    filters = pack_winograd_codes(w.transpose(0, 1) if transposed else w, stride, transposed)
    assert filters.packed.data.dtype is dtype and filters.packed.product is torch.int16
    assert filters.packed.data.numel() == channels**2 * numbers
    assert torch.equal(filters.step, w.abs().amax((1, 2, 3)) / 127)


def test_weights_in_codes():
    """Each output channel's largest weight is 127 steps, those of a transposed convolution too."""
    w = random(5, 7, 3, 3) * 2.0 ** torch.arange(5).view(5, 1, 1, 1)
    filters = pack_conv_codes(w, 1, 1)
    assert torch.equal(filters.step, w.abs().amax((1, 2, 3)) / 127)
    taps = pack_deconv_codes(w.transpose(0, 1))
    assert [one.packed.kernel for one in taps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(torch.equal(one.step, filters.step) for one in taps)
    assert torch.equal(sum(one.packed.sums for one in taps), filters.packed.sums)


def test_refuses_sums_that_could_overflow():
    message = (
        r"^conv_bn_act: w is \(1, 65794, 1, 1\) int8, an output may be the sum of at most 65793 products$"
    )
    for product in PRODUCTS:
        pack_conv(torch.zeros(1, 65793, 1, 1, dtype=torch.int8), dtype=product)
        with pytest.raises(ValueError, match=message):
            pack_conv(torch.zeros(1, 65794, 1, 1, dtype=torch.int8), dtype=product)


def assert_near(found, truth, out, slack=1e-5, equal=0.9):
    """Codes are those of the truth, or its neighbour where that lies within slack of the middle of both."""
    near = slack * truth.abs().max()
    low, high = out.codes(truth - near), out.codes(truth + near)
    assert ((found >= low) & (found <= high)).all() and (low == high).double().mean() > equal


@pytest.mark.parametrize("n, c, k, h, w", [(1, 64, 64, 6, 8), (2, 37, 21, 3, 5), (1, 1, 1, 1, 1)])
def test_deconv_on_every_isa(n, c, k, h, w):
    x, skip = some_codes(n, c, h, w, highest=255), some_codes(n, k, 2 * h, 2 * w, seed=1, highest=255)
    weight, bias = random(c, k, 3, 3, seed=2) / c**0.5, random(k, seed=3)
    own, of_skip, out = Quantum(0.02, 3), Quantum(0.03, 5), Quantum(0.05, 90)
    ways = [pack_deconv_codes(weight, product) for product in PRODUCTS]
    filters = pack_winograd_codes(weight, 2, transposed=True)
    step = filters.step.double()[:, None, None]
    exact = (weight / step.float()).round().double() * step
    values = own.values(x, torch.float64), exact, bias.double(), of_skip.values(skip, torch.float64)
    truth = deconv_add_reference(*values)

    def run(isa):
        for taps in ways:
            result = nhwc(torch.full(skip.shape, POISON, dtype=U8))
            folded = tuple(fold(one, None, bias, own, out, skip=of_skip) for one in taps)
            deconv_codes_native(fenced_codes(x), taps, folded, skip, result)
            assert_near(result, truth, out)
        result = nhwc(torch.full(skip.shape, POISON, dtype=U8))
        folded = fold(filters, None, bias, own, out, skip=of_skip)
        conv_codes_native(fenced_codes(x), filters.packed, folded, None, skip, result, None)
        assert_near(result, truth, out, 2e-4, equal=0.5)

    each_isa(run)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n, c, h, w", [(2, 64, 3, 5), (1, 21, 4, 2), (1, 1, 1, 1)])
def test_upsample_add_on_every_isa(n, c, h, w, gated):
    x, skip = some_codes(n, c, h, w, highest=255), some_codes(n, c, 2 * h, 2 * w, seed=1, highest=255)
    gate = random(n, c, seed=2).sigmoid() if gated else None
    # Of no common step, so that few sums lie in the middle of two codes.
    quanta = Quantum(0.0197, 3), Quantum(0.0311, 120), Quantum(0.0407, 80)
    values = (quantum.values(t, torch.float64) for quantum, t in zip(quanta, (x, skip), strict=False))
    truth = ops.upsample_add_reference(*values, None if gate is None else gate.double())

    def run(isa):
        storage = torch.full((skip.numel() + 64,), POISON, dtype=U8)
        result = storage[32:-32].view(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
        upsample_add_native(x, skip, gate, result, quanta)
        assert_near(result, truth, quanta[2])
        assert (storage[:32] == POISON).all() and (storage[-32:] == POISON).all()

    each_isa(run)


@pytest.mark.parametrize("n, c, h, w", [(2, 64, 13, 15), (1, 21, 1, 1)])
def test_attention_gate_on_every_isa(n, c, h, w):
    x, quantum = some_codes(n, c, h, w, highest=255), Quantum(0.02, 90)
    weight, scale, shift = random(c, c) / c**0.5, random(c, seed=1), random(c, seed=2)
    truth = ops.attention_gate_reference(
        quantum.values(x, torch.float64), weight.double(), scale.double(), shift.double()
    )

    def run(isa):
        out = torch.full((n, c), NAN)
        attention_gate_native(x, weight, scale, shift, out, quantum)
        assert (out - truth).abs().max() < 1e-6, isa

    each_isa(run)


def run_stem(image, packed, scale, shift, size, slope, codes, padded=None):
    n = len(image)
    shape = (n, packed.out_channels, size[0] // 4, size[1] // 4)
    result = nhwc(torch.full(shape, POISON, dtype=U8))
    stem_native(image, packed, scale, shift, normalised_values(MEAN, STD), result, slope, codes, padded)
    return result


STEMS = [
    (1, 32, 64, 64, (32, 64)),
    (2, 30, 33, 17, (32, 64)),
    (1, 5, 7, 3, (8, 8)),
    (1, 37, 300, 48, (68, 304)),
]


@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, h, w, k, size", STEMS)
def test_stem_of_normalised_products_on_every_isa(n, h, w, k, size, dtype, slope):
    """Codes of what floats would be pooled to: rounding and the maximum change places."""
    image, (weight, scale, shift) = pixels(n, h, w), parameters(k)
    out = Quantum(0.03, 5)
    packed = pack_stem_rows(weight, dtype)
    norms = [whole_panels(t / out.step) for t in (scale, shift)]
    # As the kernel rounds its factors.
    seen = normalise(image, MEAN, STD).to(dtype).double()
    truth = stem_reference(
        seen, *(t.double() for t in (weight.to(dtype), scale, shift, MEAN, STD)), size, slope
    )

    def run(isa):
        found = run_stem(image, packed, *norms, size, slope, StemCodes(bias=out.zero))
        assert_near(found, truth, out, 1e-4)

    each_isa(run)


@pytest.mark.parametrize("n, h, w, k, size", STEMS)
def test_stem_of_raw_products_on_every_isa(n, h, w, k, size):
    """Raw pixels are exact; beyond the image, where 0 is between two of them, the nearer is taken."""
    image, (weight, scale, shift) = pixels(n, h, w), parameters(k)
    mean, std = MEAN.double(), STD.double()
    out = Quantum(0.03, 5)
    packed, *norms, codes = fold_raw(weight, scale, shift, mean, std, out)
    per_pixel = weight / (255 * STD[:, None, None])
    step = per_pixel.abs().amax((1, 2, 3), keepdim=True) / 127
    rounded = (per_pixel / step).round().double() * step.double()
    seen = torch.zeros(n, 3, size[0] + 6, size[1] + 6, dtype=torch.float64)
    zero = (255 * mean).round()
    seen += (zero - 255 * mean)[:, None, None]
    seen[:, :, 3 : 3 + h, 3 : 3 + w] = image.double().permute(0, 3, 1, 2) - (255 * mean)[:, None, None]
    y = F.conv2d(seen, rounded, stride=2) * scale.double()[:, None, None] + shift.double()[:, None, None]
    truth = F.max_pool2d(F.leaky_relu(y, 0.01), 3, 2, 1)
    floating = normalise(image, mean, std).float().contiguous()

    def run(isa):
        found = run_stem(image, packed, *norms, size, 0.01, codes)
        assert_near(found, truth, out, 1e-4)
        assert torch.equal(run_stem(floating, packed, *norms, size, 0.01, codes), found), isa

    each_isa(run)


@pytest.mark.parametrize("padded, size", [((40, 40), (64, 64)), ((33, 35), (100, 60)), ((31, 34), (32, 36))])
def test_stem_of_raw_products_of_enlarged_images_on_every_isa(padded, size):
    """As of the image that was enlarged before and given as floats."""
    image, (weight, scale, shift) = pixels(2, 31, 34), parameters(20)
    packed, *norms, codes = fold_raw(weight, scale, shift, MEAN.double(), STD.double(), Quantum(0.03, 5))
    around = F.pad(normalise(image, MEAN, STD), (0, padded[1] - 34, 0, padded[0] - 31))
    enlarged = F.interpolate(around, size, mode="bilinear", align_corners=False).contiguous()

    def run(isa):
        expected = run_stem(enlarged, packed, *norms, size, 0.01, codes)
        for given_image in (image, normalise(image, MEAN, STD).contiguous()):
            found = run_stem(given_image, packed, *norms, size, 0.01, codes, padded)
            # A raw value that lies between two may be rounded to the other.
            off = (found.int() - expected.int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 0.02, isa

    each_isa(run)


def test_raw_products_of_floats_beyond_raw_ones_saturate():
    weight, scale, shift = parameters(16)
    packed, *norms, codes = fold_raw(weight, scale, shift, MEAN.double(), STD.double(), Quantum(0.03, 5))
    far, near = (
        torch.full((1, 3, 8, 8), 50.0),
        (1 - MEAN)[None, :, None, None].expand(1, 3, 8, 8) / STD[:, None, None],
    )
    results = [run_stem(x.contiguous(), packed, *norms, (8, 8), 0.0, codes) for x in (far, near)]
    assert torch.equal(*results)


@given(n=st.integers(0, 3), c=st.integers(1, 140), source=st.sampled_from(DTYPES), zero=st.integers(0, 255))
@settings(max_examples=25, deadline=None)
def test_quantize_on_every_isa(n, c, source, zero):
    x, quantum = nhwc(random(n, c, 5, 4, dtype=source)), Quantum(2.0**-5, zero)

    def run(isa):
        storage = torch.full((x.numel() + 64,), POISON, dtype=U8)
        codes = storage[32:-32].view(n, 5, 4, c).permute(0, 3, 1, 2)
        quantize_native(x, quantum.step, codes, quantum.zero)
        assert torch.equal(codes, quantum.codes(x.float())), isa
        assert (storage[:32] == POISON).all() and (storage[-32:] == POISON).all()

    each_isa(run)


def test_a_quantum_is_its_inverse():
    quantum, codes = Quantum(0.3, 40), torch.arange(256, dtype=U8)
    assert torch.equal(quantum.codes(quantum.values(codes)), codes)
    assert quantum.codes(torch.tensor([NAN, INF, -INF, 0.0, 0.16])).tolist() == [40, 255, 0, 40, 41]
