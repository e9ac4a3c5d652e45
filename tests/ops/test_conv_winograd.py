from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import DTYPES, assert_as_exact, each_isa, needs_native, nhwc, poisoned, random
from test_conv_bn_act import (
    EVERY,
    assert_no_bit_changes,
    assert_only_within,
    double,
    fenced,
    framed,
    inputs,
    only,
    same_non_finite,
    whole,
    with_threads,
)
from torch import nn

import shelfkern
from shelfkern import native, ops
from shelfkern.engine import plan as p
from shelfkern.engine.cpu import algorithms, winograd
from shelfkern.engine.cpu.algorithm import Context
from shelfkern.engine.problem import Packed
from shelfkern.nn import shelfnet18_lw
from shelfkern.normalisation import Normalisation
from shelfkern.ops import conv_bn_act_reference, deconv_add_reference
from shelfkern.ops._conv_winograd import (
    as_winograd,
    can_pay,
    conv_winograd_native,
    keeps_transformed,
    pack_winograd,
    pays,
    shared_block_winograd_native,
    weight_transform,
)


class Algorithm(NamedTuple):
    """What `pack_winograd` takes, or else `as_winograd`, and where its tiles and windows are."""

    tile: int
    stride: int = 1
    transposed: bool = False
    untransformed: bool = False
    product: torch.dtype = torch.float32

    @property
    def dtypes(self):
        """Of activations."""
        return DTYPES if self.product is torch.float32 else [torch.bfloat16]

    def pack(self, weight):
        if not self.untransformed:
            return pack_winograd(weight, *self[:3], self.product)
        kernels = weight.transpose(0, 1) if self.transposed else weight
        dtype = torch.bfloat16 if self.product is torch.int16 else torch.float32
        return as_winograd(ops.pack_conv(kernels, padding=1, dtype=dtype), *self[:3], weight)

    def reference(self, x, w, scale, shift, residual, skip, slope):
        if not self.transposed:
            return conv_bn_act_reference(x, w, scale, shift, residual, skip, self.stride, 1, slope)
        zeros = torch.zeros((), dtype=x.dtype)
        deconvolved = deconv_add_reference(x, w, zeros.expand(w.shape[1]), zeros)
        identity = torch.eye(w.shape[1], dtype=x.dtype)[:, :, None, None]
        return conv_bn_act_reference(deconvolved, identity, scale, shift, residual, skip, slope=slope)

    def out_sizes(self, *sizes):
        return [2 * size if self.transposed else (size - 1) // self.stride + 1 for size in sizes]

    @property
    def outputs(self):
        """Of a tile, in each dimension."""
        return 2 * self.tile if self.transposed else self.tile

    def window(self, tile):
        """First and last input of the window of a tile, in each dimension."""
        if self.transposed:
            return tile * 4, tile * 4 + 4
        return tile * self.tile * self.stride - 1, (tile * self.tile + self.tile - 1) * self.stride + 1


TRANSFORMED = [Algorithm(2), Algorithm(4), Algorithm(4, 2), Algorithm(4, 2, True)]
IDS = ["2x2", "4x4", "stride2", "transposed"]
WHOLE = [algorithm._replace(product=torch.int16) for algorithm in TRANSFORMED[1:]]


def with_untransformed(algorithms):
    return [*algorithms, *(algorithm._replace(untransformed=True) for algorithm in algorithms)]


ALGORITHMS = with_untransformed(TRANSFORMED)
ALL = [*ALGORITHMS, *with_untransformed(WHOLE)]


def name(algorithm):
    kind = "-int16" if algorithm.product is torch.int16 else ""
    form = "-untransformed" if algorithm.untransformed else ""
    return IDS[[one[:3] for one in TRANSFORMED].index(algorithm[:3])] + kind + form


every_float_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=name)
every_algorithm = pytest.mark.parametrize("algorithm", ALL, ids=name)
EVERY_DTYPE = [(algorithm, dtype) for algorithm in ALL for dtype in algorithm.dtypes]
every_algorithm_and_dtype = pytest.mark.parametrize(
    "algorithm, dtype", EVERY_DTYPE, ids=lambda value: name(value) if isinstance(value, Algorithm) else None
)
# n, c, h, w, k
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 40, 6, 10, 64),
    (3, 17, 7, 5, 19),
    (2, 33, 13, 11, 70),
    (1, 64, 4, 4, 64),
    (1, 600, 3, 5, 17),
    (1, 3, 2, 300, 5),
    (1, 5, 131, 3, 33),
    # Several blocks of tiles, and groups of panels, the last with one channel.
    (2, 24, 40, 50, 129),
    # Weights that are read once by blocks of many tiles.
    (1, 384, 20, 44, 352),
    # Two waves.
    (1, 40, 100, 110, 20),
]


def arguments(n, c, h, w, k, dtype=None, algorithm=ALGORITHMS[0]):
    """x, w, scale, shift, residual, skip; of the first dtype that the algorithm takes unless it is given."""
    dtype = dtype or algorithm.dtypes[0]
    x, weight, scale, shift, *_ = inputs(n, c, h, w, k, (3, 3), 1, 1, dtype)
    maps = [random(n, k, *algorithm.out_sizes(h, w), seed=seed, dtype=dtype) for seed in (4, 5)]
    return [x, weight.transpose(0, 1) if algorithm.transposed else weight, scale, shift, *maps]


def run(args, algorithm, slope=0.25):
    """The kernel into poisoned memory."""
    x, weight, scale, shift, residual, skip = args
    k = weight.shape[1 if algorithm.transposed else 0]
    out = nhwc(poisoned((x.shape[0], k, *algorithm.out_sizes(*x.shape[2:])), x.dtype))
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    residual, skip = (None if t is None else nhwc(t) for t in (residual, skip))
    conv_winograd_native(nhwc(x), algorithm.pack(weight), scale, shift, residual, skip, out, slope)
    return out


def assert_right(result, args, algorithm, slope=0.25):
    """For whole numbers F(2x2) is exact; others, whose weights are not, by far nearer than to another result.

    The smallest difference between results is the slope's 1 / 4.
    """
    truth = algorithm.reference(*double(args), slope)
    if algorithm.tile == 2:
        assert torch.equal(result, truth.to(result.dtype))
        return
    assert ((result.double() - truth).abs() <= allowed(truth, result.dtype, algorithm)).all()


def allowed(truth, dtype, algorithm):
    """How far results are from those of whole numbers at most."""
    rounding = 0 if dtype is torch.float32 else 2.0**-8 * truth.abs()
    return rounding + (
        0.02 if algorithm.product is torch.float32 else 0.02 + 2.0**-9 * root_mean_square(truth)
    )


def root_mean_square(t):
    return t.double().square().mean().sqrt()


@pytest.mark.parametrize("algorithm", TRANSFORMED, ids=name)
def test_weights_are_transformed_once_in_float64(algorithm):
    weight, g = random(18, 5, 3, 3), weight_transform(*algorithm[:3])
    given = weight.transpose(0, 1) if algorithm.transposed else weight
    packed = algorithm.pack(given.requires_grad_())
    assert (packed.tile, packed.stride, packed.transposed, packed.chunk) == (*algorithm[:3], 0)
    assert packed.data.shape == (2, (algorithm.tile + 2) ** 2, 5, 16) and not packed.data.requires_grad
    expected = torch.einsum("ir,kcrs,js->ijkc", g, weight.detach().double(), g).flatten(0, 1)
    for k in range(18):
        assert torch.equal(packed.data[k // 16, :, :, k % 16], expected[:, k].float()), k
    assert not packed.data[1, :, :, 2:].any()


@pytest.mark.parametrize("algorithm", WHOLE, ids=name)
@pytest.mark.parametrize("channels", [1, 5, 64, 131])
def test_whole_weights_are_as_fine_as_their_sums_allow(channels, algorithm):
    weight, g = random(18, channels, 3, 3), weight_transform(*algorithm[:3])
    weight[7] = 0
    weight[:, channels // 2] *= float(channels != 5)
    packed = algorithm.pack(weight.transpose(0, 1) if algorithm.transposed else weight)
    assert packed.product is torch.int16 and packed.data.dtype is torch.int16
    assert packed.data.shape == (2, 36, (channels + 1) // 2, 16, 2) and packed.units.shape == (2, 36, 16)
    whole = packed.data.transpose(3, 2).flatten(3).double()
    expected = torch.einsum("ir,kcrs,js->kijc", g, weight.double(), g).flatten(1, 2)
    for k in range(18):
        units = packed.units[k // 16, :, k % 16, None].double() * packed.levels.double()
        codes = whole[k // 16, :, k % 16]
        assert ((codes[:, :channels] * units - expected[k]).abs() <= 0.501 * units).all()
        assert not codes[:, channels:].any()
    sums = whole.abs().cumsum(-1)
    sums[..., 64:] -= sums[..., :-64].clone()
    # The largest of a tile's values is 2^14 - 1.
    assert sums.max() * (2**14 - 1) < 2**31 and whole.abs().max() < 2**15
    assert sums[0, :, :7].amax(-1).min() > 2**14


@pytest.mark.parametrize("algorithm", WHOLE, ids=name)
def test_weights_of_bfloat16_have_the_same_units_transformed_or_not(algorithm):
    weight = random(18, 70, 3, 3).bfloat16()
    if algorithm.transposed:
        weight = weight.transpose(0, 1)
    transformed, taps = (algorithm._replace(untransformed=form).pack(weight) for form in (False, True))
    assert torch.equal(taps.units, transformed.units) and torch.equal(taps.levels, transformed.levels)
    # Others are rounded first.
    rounded = algorithm._replace(untransformed=True).pack(weight.float() * 1.0001)
    assert torch.equal(rounded.data, taps.data) and torch.equal(rounded.units, taps.units)


@needs_native
@pytest.mark.parametrize("algorithm", with_untransformed(WHOLE), ids=name)
def test_whole_weights_that_are_not_finite_spoil_only_their_outputs(algorithm):
    args = arguments(1, 40, 12, 12, 40, algorithm=algorithm)
    weight = args[1].transpose(0, 1) if algorithm.transposed else args[1]
    weight[3, 5, 1, 1], weight[20, 0, 0, 2], weight[:, 7] = float("nan"), float("inf"), 0
    result = run(args, algorithm, None)
    finite = result.isfinite().all(3).all(2)[0]
    assert [k for k in range(40) if not finite[k]] == [3, 20]
    weight *= 1e-30
    weight[3, 5, 1, 1], weight[20, 0, 0, 2] = 0, 0
    tiny = (args[0], args[1], None, None, None, None)
    assert_as_exact(
        run(tiny, algorithm, None), algorithm.reference(*double(tiny), None), algorithm.reference(*tiny, None)
    )


def test_what_cannot_be_packed():
    for tile, product in ((2, torch.int16), (4, torch.int8), (4, torch.bfloat16)):
        with pytest.raises(
            ValueError,
            match=f"^conv_winograd: product and tile are {product} and {tile}, they may be torch.float32 and "
            "2 or 4, or torch.int16 and 4$",
        ):
            pack_winograd(torch.zeros(4, 2, 3, 3), tile, product=product)
    for transposed, order in ((False, "(K, C, 3, 3)"), (True, "(C, K, 3, 3)")):
        shapes = (4, 2, 3, 1), (4, 2, 3), (4,)
        for shape, product in itertools.product(shapes, (torch.float32, torch.int16)):
            message = re.escape(f"conv_winograd: w is {shape}, it must be {order}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                pack_winograd(torch.zeros(shape), 4, 2, transposed, product)
    allowed = "they may be 2 or 4, 1 and False; or 4, 2 and either"
    for tile, stride, transposed in ((3, 1, False), (2, 2, False), (4, 3, False), (4, 1, True), (2, 2, True)):
        given = f"tile, stride and transposed are {tile}, {stride} and {transposed}"
        with pytest.raises(ValueError, match=f"^conv_winograd: {given}, {allowed}$"):
            pack_winograd(torch.zeros(4, 2, 3, 3), tile, stride, transposed)
        with pytest.raises(ValueError, match=f"^conv_winograd: {given}, {allowed}$"):
            as_winograd(ops.pack_conv(torch.zeros(4, 2, 3, 3)), tile, stride, transposed)
    with pytest.raises(ValueError, match=r"packed is of kernels of \(1, 1\), they must be \(3, 3\)$"):
        as_winograd(ops.pack_conv(torch.zeros(4, 2, 1, 1)))
    taps = ops.pack_conv(torch.zeros(4, 2, 3, 3), dtype=torch.bfloat16)
    for transposed, expected in ((False, (4, 2, 3, 3)), (True, (2, 4, 3, 3))):
        for shape in (None, (4, 2, 3), (4, 4, 3, 3), (*expected[:2], 1, 1)):
            message = re.escape(f"conv_winograd: w is {shape}, with packed of bfloat16 it must be {expected}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                as_winograd(taps, 4, 2, transposed, None if shape is None else torch.zeros(shape))
    with pytest.raises(ValueError, match=r"packed is torch.int8, it must be float32 or bfloat16$"):
        as_winograd(ops.pack_conv(torch.zeros(4, 2, 3, 3, dtype=torch.int8), dtype=torch.int8))


def test_many_weights_stay_in_the_memory_of_the_direct_kernel():
    weight = random(130, 70, 3, 3)
    for dtype, product in ((torch.float32, torch.float32), (torch.bfloat16, torch.int16)):
        direct = ops.pack_conv(weight, padding=1, dtype=dtype)
        packed = as_winograd(direct, w=weight)
        assert packed.data is direct.data and packed.product is product
    assert keeps_transformed(torch.empty(224, 224, 3, 3)) and keeps_transformed(
        torch.empty(256, 256, 3, 3), 2
    )
    assert not keeps_transformed(torch.empty(256, 256, 3, 3))
    assert keeps_transformed(torch.empty(256, 256, 3, 3), product=torch.int16)


@needs_native
@every_algorithm_and_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, dtype, algorithm):
    args = whole(arguments(*shape, dtype, algorithm))
    for threads in (1, 3):
        assert_right(with_threads(threads, lambda: run(args, algorithm)), args, algorithm)


@needs_native
@every_algorithm
@pytest.mark.parametrize("slope", [0.0, 0.25, None])
@pytest.mark.parametrize("parts", [(), *((name,) for name in EVERY), EVERY[:2], EVERY[2:], EVERY])
def test_every_part_of_the_epilogue(parts, slope, algorithm):
    args = only(whole(arguments(1, 12, 5, 9, 19, algorithm=algorithm)), parts)
    assert_right(run(args, algorithm, slope), args, algorithm, slope)


@needs_native
@given(
    n=st.integers(0, 3), c=st.one_of(st.integers(1, 35), st.sampled_from([64, 65, 129])),
    h=st.integers(1, 11), w=st.integers(1, 30), k=st.integers(1, 70), kind=st.sampled_from(EVERY_DTYPE),
    parts=st.sets(st.sampled_from(EVERY)),
    slope=st.sampled_from([0.0, 0.25, None]), count=st.sampled_from([1, 2, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_isa_writes_all_of_the_output(n, c, h, w, k, kind, parts, slope, count):
    algorithm, dtype = kind
    args = only(whole(arguments(max(n, 1), c, h, w, k, dtype, algorithm)), parts)
    args = [t[:n] if t is not None and t.ndim == 4 and i != 1 else t for i, t in enumerate(args)]
    x, weight, scale, shift, residual, skip = args
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    residual, skip = (None if t is None else framed(t, 9.0)[1] for t in (residual, skip))
    packed, x = algorithm.pack(weight), fenced(x)[1]

    def run(isa):
        storage, out = framed(poisoned((n, k, *algorithm.out_sizes(h, w)), dtype), float("nan"))
        conv_winograd_native(x, packed, scale, shift, residual, skip, out, slope)
        assert_right(out, args, algorithm, slope)
        assert_only_within(storage, out)

    with_threads(count, lambda: each_isa(run))


# The error to that of eager's direct convolution, root mean square, at most: of one channel, and of more.
BOUNDS = dict(zip(TRANSFORMED, [(2.2, 1.7), (7.0, 4.5), (4.0, 2.2), (4.5, 3.2)], strict=True))
# Weights transformed in float32 cost digits, which sums of many products hide.
FEW_CHANNELS, MORE_OF_FEW = 16, 7 / 6


@needs_native
@every_float_algorithm
@pytest.mark.parametrize("channels", [1, 16, 64, 128, 512])
def test_every_isa_is_within_the_error_stated(channels, algorithm):
    signed, weight, *_ = arguments(1, channels, 32, 32, 64, algorithm=algorithm)
    # Both signs, and as after an activation.
    for x in (signed, signed.relu()):
        args = (x, weight, None, None, None, None)
        truth = algorithm.reference(*double(args), None)
        eager = algorithm.reference(*args, None)
        allowed = BOUNDS[algorithm._replace(untransformed=False)][channels > 1] * root_mean_square(
            eager - truth
        )
        if algorithm.untransformed and channels <= FEW_CHANNELS:
            allowed *= MORE_OF_FEW

        def check_error(isa, args=args, truth=truth, allowed=allowed):
            error = run(args, algorithm, None) - truth
            assert root_mean_square(error) <= allowed, isa
            assert error.abs().max() <= 1e-5 * truth.abs().max(), isa

        each_isa(check_error)


# The error of products of int16 to that of eager in bfloat16, root mean square, at most.
BOUND_OF_WHOLE = 1.4


@needs_native
@pytest.mark.parametrize("algorithm", with_untransformed(WHOLE), ids=name)
@pytest.mark.parametrize("channels", [1, 16, 64, 128, 512])
def test_every_isa_is_within_the_error_stated_in_whole_numbers(channels, algorithm):
    signed, weight, *_ = arguments(1, channels, 32, 32, 64, algorithm=algorithm)
    # Channels of many sizes, whose weights are not or are made for it.
    sizes = random(channels, 1, 1, seed=9).exp()
    made = weight / sizes.square()[:, None] if algorithm.transposed else weight / sizes.square()
    for x, filters in (
        (signed, weight),
        (signed.relu(), weight),
        ((signed.relu() * sizes).bfloat16(), weight),
        ((signed.relu() * sizes.square()).bfloat16(), made.bfloat16()),
    ):
        args = (x, filters, None, None, None, None)
        truth = algorithm.reference(*double(args), None)
        limit = BOUND_OF_WHOLE * root_mean_square(algorithm.reference(*args, None) - truth)

        def check_error(isa, args=args, truth=truth, limit=limit):
            error = run(args, algorithm, None) - truth
            assert root_mean_square(error) <= limit, isa
            assert error.abs().max() <= 2.0**-7 * truth.abs().max(), isa

        each_isa(check_error)


@needs_native
@pytest.mark.parametrize("algorithm", with_untransformed(WHOLE[:1]), ids=name)
@pytest.mark.parametrize("channels", [64, 100, 128])
def test_every_isa_sums_what_is_largest(channels, algorithm):
    """Each image makes one frequency as large as it can be in all channels, where the weights are alike."""
    rows = [(-1, 1, 1, -1, 1, 1), (1, -1, -1, 1, 1, 1), (1, 1, -1, -1, 1, 1), (1, 1, 1, 1, 1, -1)]
    windows = torch.tensor(rows, dtype=torch.bfloat16)
    x = torch.zeros(16, channels, 12, 12, dtype=torch.bfloat16)
    x[:, :, 3:9, 3:9] = torch.einsum("ih,jw->ijhw", windows, windows).reshape(16, 1, 6, 6)
    for taps in torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 0, 0]]):
        weight = taps.outer(taps).expand(20, channels, 3, 3).bfloat16().contiguous()
        args = (x, weight, None, None, None, None)
        truth = algorithm.reference(*double(args), None)

        def check(isa, args=args, truth=truth):
            assert ((run(args, algorithm, None) - truth).abs() <= 2.0**-7 * truth.abs().max()).all(), isa

        each_isa(check)


@needs_native
@every_algorithm
@pytest.mark.parametrize("shape", [(1, 64, 17, 19, 40), (2, 130, 9, 9, 33)])
def test_bfloat16_is_as_exact_as_eager(shape, algorithm):
    args = arguments(*shape, torch.bfloat16, algorithm)
    assert_as_exact(
        run(args, algorithm, 0.01), algorithm.reference(*double(args), 0.01), algorithm.reference(*args, 0.01)
    )


@needs_native
@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_the_tiles_whose_windows_hold_it(value, algorithm):
    args = whole(arguments(1, 20, 15, 18, 18, algorithm=algorithm))
    finite = algorithm.reference(*double(args), None)
    for y, x in ((0, 0), (5, 7), (7, 8), (14, 17), (11, 4)):
        spoilt = args[0].clone()
        spoilt[0, 19, y, x] = value
        result = run((spoilt, *args[1:]), algorithm, None)
        truth = algorithm.reference(*double((spoilt, *args[1:])), None)
        assert not result[~truth.isfinite()].isfinite().any()
        windows = [algorithm.window(torch.arange(size) // algorithm.outputs) for size in result.shape[2:]]
        rows, columns = ((first <= i) & (i <= last) for (first, last), i in zip(windows, (y, x), strict=True))
        beyond = ~(rows[:, None] & columns[None, :]).expand_as(result)
        near = (result - finite).abs() <= allowed(finite, result.dtype, algorithm)
        assert beyond.any() and near[beyond].all()


@needs_native
@every_algorithm
@pytest.mark.parametrize("slope", [0.0, 0.25, None])
def test_nan_and_inf_of_residual_and_skip_go_where_torch_sends_them(slope, algorithm):
    args = arguments(1, 13, 11, 16, 18, algorithm=algorithm)
    residual, skip = args[4:]
    residual[0, 17, 4, 4], residual[0, 3, 4, 0] = float("nan"), -float("inf")
    skip[0, 0, 4, 6], skip[0, 17, 5, 3], skip[0, 2, 1, 7] = float("nan"), float("inf"), -float("inf")
    truth = algorithm.reference(*double(args), slope)
    same_non_finite(run(args, algorithm, slope), truth)


@needs_native
@every_algorithm_and_dtype
@pytest.mark.parametrize("shape", [(2, 20, 23, 60, 100), (1, 200, 9, 9, 150)])
def test_threads_and_repeats_change_no_bit(shape, dtype, algorithm):
    args = arguments(*shape, dtype, algorithm)
    assert_no_bit_changes(lambda: run(args, algorithm))


@needs_native
@every_algorithm
def test_an_image_has_the_same_bits_alone_and_in_a_batch(algorithm):
    args = arguments(3, 40, 11, 13, 50, algorithm=algorithm)
    together = run(args, algorithm)
    for i in range(3):
        alone = [t[i : i + 1] if t.ndim == 4 and t is not args[1] else t for t in args]
        assert torch.equal(run(alone, algorithm), together[i : i + 1])


@pytest.fixture
def calls(monkeypatch):
    """The names of the convolutions that are called."""
    made = []
    for name in ("winograd", "conv_bn_act"):
        kernel = getattr(native.module, name)
        counted = lambda *args, name=name, kernel=kernel: (made.append(name), kernel(*args))  # noqa: E731
        monkeypatch.setattr(native.module, name, counted)
    return made


def test_what_can_pay():
    assert can_pay(torch.zeros(32, 32, 3, 3), 1, 1) and can_pay(torch.zeros(64, 64, 3, 3), 2, 1)
    for shape, stride, padding in (
        ((32, 32, 3, 3), 1, 0), ((32, 31, 3, 3), 1, 1), ((31, 32, 3, 3), 1, 1), ((32, 32, 1, 1), 1, 1),
        ((32, 32, 3, 1), 1, 1), ((64, 64, 3, 3), 2, 0), ((64, 64, 3, 3), 3, 1), ((63, 64, 3, 3), 2, 1),
        ((64, 63, 3, 3), 2, 1), ((64, 64, 1, 1), 2, 1),
    ):  # fmt: skip
        assert not can_pay(torch.zeros(shape), stride, padding)
    assert pays((1, 4, 8, 8)) and pays((2, 4, 4, 4)) and pays((1, 4, 2, 64))
    for n, h, w in ((1, 4, 4), (1, 5, 5), (1, 1, 640), (0, 8, 8)):
        assert not pays((n, 4, h, w))
    assert pays((1, 4, 8, 8), 2) and pays((4, 4, 4, 4), 2) and pays((1, 4, 3, 64), 2)
    for n, h, w in ((1, 4, 8), (1, 2, 640), (1, 10, 10), (0, 8, 8)):
        assert not pays((n, 4, h, w), 2)
    assert pays((1, 4, 4, 4), 2, True) and pays((1, 4, 3, 64), 2, True)
    for n, h, w in ((1, 3, 4), (1, 5, 5), (0, 8, 8)):
        assert not pays((n, 4, h, w), 2, True)


def chosen(step, size):
    """What runs a step in the engine where nothing was measured."""
    context = Context(torch.float32, Normalisation(), theirs=False)
    return algorithms.algorithms(step, size, context, Packed())[0].prepare()


@needs_native
@pytest.mark.parametrize(
    "channels, size, name", [(32, 12, "winograd"), (32, 5, "conv_bn_act"), (31, 12, "conv_bn_act")]
)
def test_the_engine_takes_it_where_it_pays(channels, size, name, calls):
    args = arguments(1, channels, size, size, channels)
    x, weight, scale, shift, residual, skip = args
    values = [p.Value(i, channels, 1) for i in range(4)]
    step = p.Conv(
        "conv", tuple(values[:3]), values[3], weight, scale, shift, 1, p.Activation(0.25), True, True
    )
    out = nhwc(poisoned(tuple(x.shape), x.dtype))
    inputs = [nhwc(t) for t in (x, residual, skip)]
    run = chosen(step, (1, size, size))
    assert run(inputs, [out], torch.empty(0)) is None
    assert calls == [name]
    truth = conv_bn_act_reference(*double(args), padding=1, slope=0.25)
    eager = conv_bn_act_reference(*args, padding=1, slope=0.25)
    assert root_mean_square(out - truth) <= BOUNDS[ALGORITHMS[1]][1] * root_mean_square(eager - truth)


@needs_native
@pytest.mark.parametrize("size, name", [(16, "winograd"), (10, "conv_bn_act")])
def test_the_engine_takes_it_for_stride_2_where_it_pays(size, name, calls):
    algorithm = ALGORITHMS[2]
    args = arguments(1, 64, size, size, 64, algorithm=algorithm)
    x, weight, scale, shift, residual, skip = args
    values = p.Value(0, 64, 1), *(p.Value(i, 64, 2) for i in (1, 2, 3))
    step = p.Conv("conv", values[:3], values[3], weight, scale, shift, 2, p.Activation(0.25), True, True)
    out = nhwc(poisoned(tuple(skip.shape), x.dtype))
    chosen(step, (1, size, size))([nhwc(t) for t in (x, residual, skip)], [out], torch.empty(0))
    assert calls == [name]
    truth, eager = algorithm.reference(*double(args), 0.25), algorithm.reference(*args, 0.25)
    assert root_mean_square(out - truth) <= BOUNDS[algorithm][1] * root_mean_square(eager - truth)


@needs_native
@pytest.mark.parametrize("size, names", [(8, ["winograd"]), (5, ["conv_bn_act"] * 4)])
def test_the_engine_takes_it_for_transposed_convolutions_where_it_pays(size, names, calls):
    algorithm = ALGORITHMS[3]
    x, weight, _, bias, _, skip = arguments(1, 64, size, size, 64, algorithm=algorithm)
    values = p.Value(0, 64, 2), *(p.Value(i, 64, 1) for i in (1, 2))
    step = p.DeconvAdd("deconv", values[:2], values[2], weight, bias)
    out = nhwc(poisoned(tuple(skip.shape), x.dtype))
    chosen(step, (1, 2 * size, 2 * size))([nhwc(x), nhwc(skip)], [out], torch.empty(0))
    assert calls == names
    truth, eager = (
        deconv_add_reference(*args) for args in (double((x, weight, bias, skip)), (x, weight, bias, skip))
    )
    assert root_mean_square(out - truth) <= BOUNDS[algorithm][1] * root_mean_square(eager - truth)


@needs_native
@pytest.mark.parametrize("skip", [False, True])
def test_the_engine_transforms_the_weights_of_a_shared_block_once(skip, calls, monkeypatch):
    x, weight, *norms = arguments(1, 40, 12, 12, 40)
    norms = [*norms[:2], random(40, seed=7), random(40, seed=8)]
    packed = []
    monkeypatch.setattr(winograd, "pack_winograd", lambda w, *a: packed.append(w) or pack_winograd(w, *a))
    values = [p.Value(i, 40, 1) for i in range(3)]
    step = p.SharedBlockStep(
        "block", values[:1], values[1], weight, *norms, p.Activation(0.01), values[2], skip
    )
    hidden, out = (nhwc(poisoned(tuple(x.shape), x.dtype)) for _ in range(2))
    chosen(step, (1, 12, 12))([nhwc(x)], [out], hidden.permute(0, 2, 3, 1).reshape(-1).view(torch.uint8))
    assert calls == ["winograd", "winograd"] and len(packed) == 1
    truth = ops.shared_block_reference(*double((x, weight, *norms)), 0.01, skip)
    eager = ops.shared_block_reference(x, weight, *norms, 0.01, skip)
    assert root_mean_square(out - truth) <= BOUNDS[ALGORITHMS[1]][1] * root_mean_square(eager - truth)


@needs_native
def test_the_engine_keeps_many_weights_once_for_both_kernels(calls):
    x, weight, scale, shift, *_ = arguments(1, 256, 8, 12, 256)
    values = [p.Value(i, 256, 1) for i in range(2)]
    step = p.Conv("conv", tuple(values[:1]), values[1], weight, scale, shift, 1, p.Activation(0.25))
    packed, context = Packed(), Context(torch.float32, Normalisation(), theirs=False)
    found = {a.name: a for a in algorithms.algorithms(step, (1, 8, 12), context, packed)}
    truth = conv_bn_act_reference(*double((x, weight, scale, shift)), padding=1, slope=0.25)
    eager = conv_bn_act_reference(x, weight, scale, shift, padding=1, slope=0.25)
    for name in ("native winograd 4x4", "native direct"):
        out = nhwc(poisoned(tuple(x.shape), x.dtype))
        found[name].prepare()([nhwc(x)], [out], torch.empty(0))
        assert root_mean_square(out - truth) <= BOUNDS[Algorithm(4)][1] * root_mean_square(eager - truth)
    assert calls == ["winograd", "conv_bn_act"]
    made = []
    for form in ("direct", "native winograd 4x4"):
        packed.get(form, lambda form=form: made.append(form))
    assert made == ["native winograd 4x4"]


@needs_native
def test_the_engine_keeps_many_weights_of_a_transposed_convolution_untransformed(calls):
    algorithm = Algorithm(4, 2, True)
    x, weight, _, bias, _, skip = arguments(1, 260, 8, 8, 260, algorithm=algorithm)
    values = [p.Value(0, 260, 2), p.Value(1, 260, 1), p.Value(2, 260, 1)]
    step = p.DeconvAdd("deconv", tuple(values[:2]), values[2], weight, bias)
    packed, context = Packed(), Context(torch.float32, Normalisation(), theirs=False)
    found = {a.name: a for a in algorithms.algorithms(step, (1, 16, 16), context, packed)}
    out = nhwc(poisoned(tuple(skip.shape), x.dtype))
    found["native winograd 4x4"].prepare()([nhwc(x), nhwc(skip)], [out], torch.empty(0))
    args = (x, weight, None, bias, None, skip)
    truth, eager = algorithm.reference(*double(args), None), algorithm.reference(*args, None)
    assert root_mean_square(out - truth) <= BOUNDS[algorithm][1] * root_mean_square(eager - truth)
    made = []
    packed.get("native winograd 4x4", lambda: made.append("transformed"))
    assert calls == ["winograd"] and made


def block_arguments(n, c, h, w, dtype=torch.float32, product=torch.float32):
    """x in a fence of NaN, packed weights, and scale and shift of both convolutions."""
    packed = pack_winograd(random(c, c, 3, 3, seed=1) / (9 * c) ** 0.5, product=product)
    affine = [random(c, seed=seed) for seed in (2, 3, 4, 5)]
    return fenced(random(max(n, 1), c, h, w, dtype=dtype)[:n])[1], packed, *affine


def one_after_the_other(x, packed, scale1, shift1, scale2, shift2, slope, skip):
    hidden, out = (nhwc(poisoned(tuple(x.shape), x.dtype)) for _ in range(2))
    conv_winograd_native(x, packed, scale1, shift1, None, None, hidden, slope)
    conv_winograd_native(hidden, packed, scale2, shift2, x, x if skip else None, out, 0.0)
    return out


def in_strips(*args):
    """The kernel with `hidden` and `out` in poisoned memory, and that memory."""
    *tensors, slope, skip = args
    x = tensors[0]
    (between, hidden), (storage, out) = (fenced(poisoned(tuple(x.shape), x.dtype)) for _ in range(2))
    shared_block_winograd_native(*tensors, hidden, out, slope, skip)
    return out, ((between, hidden), (storage, out))


KINDS = [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16, torch.int16)]
every_kind = pytest.mark.parametrize("dtype, product", KINDS)
BLOCKS = [
    (0, 33, 9, 9),
    (1, 1, 1, 1),
    (3, 32, 1, 5),
    (1, 40, 7, 13),
    (3, 17, 9, 6),
    # Rows of more tiles than a block, and blocks of several rows.
    (1, 64, 18, 101),
    (2, 36, 61, 3),
    # Two groups of panels.
    (1, 100, 31, 30),
]


@needs_native
@every_kind
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", BLOCKS)
def test_every_isa_makes_strips_bit_for_bit_as_one_convolution_after_the_other(shape, skip, dtype, product):
    args = block_arguments(*shape, dtype, product)

    def check(isa):
        for slope in (0.0, 0.25, None):
            expected = one_after_the_other(*args, slope, skip)
            for threads in (1, 2, 3, 8):
                result, memory = with_threads(threads, lambda slope=slope: in_strips(*args, slope, skip))
                assert torch.equal(result, expected), (isa, slope, threads)
                for storage, view in memory:
                    assert_only_within(storage, view)

    each_isa(check)


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_strips_have_the_same_values_that_are_not_finite(value):
    x, *others = block_arguments(2, 34, 21, 30)
    x[0, 3, 9, 9], x[1, 33, 20, 0] = value, value
    expected = one_after_the_other(x, *others, 0.25, True)
    for threads in (1, 3):
        result, _ = with_threads(threads, lambda: in_strips(x, *others, 0.25, True))
        same_non_finite(result, expected)
        assert torch.equal(result.nan_to_num(), expected.nan_to_num()) and result[0].isfinite().any()


@needs_native
@pytest.mark.parametrize("skip", [False, True])
@every_kind
def test_the_engine_has_strips_for_measuring_to_choose(skip, dtype, product):
    if not native.has_product(product):
        pytest.skip(f"{native.module.isa()} has no products of {product}")
    x, packed, *norms = block_arguments(1, 40, 12, 20, dtype, product)
    weight = random(40, 40, 3, 3, seed=1) / (9 * 40) ** 0.5
    values = [p.Value(i, 40, 1) for i in range(3)]
    step = p.SharedBlockStep(
        "block", values[:1], values[1], weight, *norms, p.Activation(0.01), values[2], skip
    )
    context = Context(dtype, Normalisation(), theirs=False)
    found = {a.name: a for a in algorithms.algorithms(step, (1, 12, 20), context, Packed())}
    names, whole = list(found), "native winograd 4x4" + " int16" * (product is torch.int16)
    assert names.index(f"{whole} strips") == names.index(whole) + 1
    strips = found[f"{whole} strips"]
    out = nhwc(poisoned(tuple(x.shape), dtype))
    assert strips.scratch >= x.numel() * x.itemsize
    scratch = torch.full((x.numel() * x.itemsize,), 255, dtype=torch.uint8)
    strips.prepare()([x], [out], scratch)
    assert torch.equal(out, one_after_the_other(x, packed, *norms, 0.01, skip))
    many = dataclasses.replace(step, weight=torch.zeros(256, 256, 3, 3))
    assert "native winograd 4x4 strips" not in [
        a.name for a in algorithms.algorithms(many, (1, 12, 20), context, Packed())
    ]


def network(seed):
    """A real network, and batch norms as trained ones have them."""
    torch.manual_seed(seed)
    model = shelfnet18_lw(num_classes=19).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@needs_native
@torch.no_grad()
def test_a_whole_network_is_exact(calls):
    errors, allowed = [], []
    for seed in range(3):
        model, x = network(seed), random(2, 3, 128, 192, seed=seed)
        result, truth = (
            shelfkern.accelerate(model, backend="native")(x),
            copy.deepcopy(model).double()(x.double()),
        )
        # Eager in the layout that the engine has, in which it sums thousands of products one by one.
        eager = model.to(memory_format=torch.channels_last)(nhwc(x))
        errors.append((result - truth) / truth.std())
        allowed.append((eager - truth) / truth.std())
    assert calls.count("winograd") >= 3 * 30
    assert torch.cat(errors).abs().max() <= 1e-4
    assert root_mean_square(torch.cat(errors)) <= 2 * root_mean_square(torch.cat(allowed))
