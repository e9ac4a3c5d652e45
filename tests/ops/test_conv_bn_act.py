from __future__ import annotations

import contextlib
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from parity import (
    BACKENDS,
    CUDA_DTYPES,
    DTYPES,
    EVERY,
    assert_as_exact,
    each_isa,
    far_apart,
    layouts,
    moved,
    needs_native,
    needs_triton,
    needs_triton_on_a_gpu,
    nhwc,
    poisoned,
    random,
)
from torch import nn

from shelfkern import native, ops
from shelfkern.ops import _conv_triton as conv
from shelfkern.ops import conv_bn_act_native, conv_bn_act_reference, pack_conv
from shelfkern.ops.conv_bn_act import conv_bn_act_triton, out_shape

# n, c, h, w, k, kernel, stride, padding
SHAPES = [
    (1, 40, 6, 10, 64, (3, 3), 1, 1),
    (2, 33, 5, 7, 17, (3, 3), 2, 1),
    (1, 3, 17, 33, 20, (7, 7), 2, 3),
    (2, 17, 9, 4, 3, (1, 1), 1, 0),
    (1, 40, 7, 9, 33, (1, 1), 2, 0),
    (1, 257, 4, 3, 1, (1, 1), 1, 0),
    (1, 1, 1, 1, 1, (3, 3), 1, 1),
    (2, 1, 9, 12, 17, (2, 5), 1, 2),
    (1, 5, 8, 8, 6, (3, 1), 3, 0),
]
# Sums of hundreds and thousands of products; from 128 input channels more than one chunk of weights.
LONG = [
    (1, 64, 16, 16, 64, (3, 3), 1, 1),
    (1, 128, 16, 16, 64, (3, 3), 1, 1),
    (1, 300, 3, 5, 17, (3, 3), 1, 1),
    (1, 512, 8, 8, 64, (3, 3), 1, 1),
    (1, 2048, 8, 8, 64, (1, 1), 1, 0),
]
# Rows so long that a strip is some, or one, or less than one of them.
WIDE = [
    (1, 3, 40, 1500, 17, (3, 3), 1, 1),
    (1, 40, 9, 500, 3, (3, 3), 2, 1),
    (1, 130, 3, 450, 18, (3, 3), 1, 1),
    (2, 16, 12, 900, 5, (7, 7), 2, 3),
    (1, 50, 5, 1200, 33, (1, 1), 2, 0),
]
SLOPES = [0.0, 0.01, None]
# Of the activations, and of what the native kernels multiply, whatever instructions there are for it.
DTYPES_AND_PRODUCTS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def inputs(n, c, h, w, k, kernel, stride, padding, dtype=torch.float32):
    """x, w, scale, shift, residual, skip."""
    weight = random(k, c, *kernel, seed=1) / (c * kernel[0] * kernel[1]) ** 0.5
    out = (n, k, (h + 2 * padding - kernel[0]) // stride + 1, (w + 2 * padding - kernel[1]) // stride + 1)
    per_channel = random(k, seed=2, dtype=dtype), random(k, seed=3, dtype=dtype)
    maps = random(*out, seed=4, dtype=dtype), random(*out, seed=5, dtype=dtype)
    return random(n, c, h, w, dtype=dtype), weight.to(dtype), *per_channel, *maps


def whole(tensors):
    """Tensors like these of whole numbers from -4 to 4, none 0: float32 sums are exact in any order."""
    scaled = [t.float() * (4 / t.float().abs().max()) for t in tensors]
    return [
        t.round().where(t.abs() > 0.5, 1.0).to(like.dtype) for t, like in zip(scaled, tensors, strict=True)
    ]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def only(tensors, parts):
    """Those after x and w that `parts` names, None for the rest."""
    rest = [t if name in parts else None for name, t in zip(EVERY, tensors[2:], strict=True)]
    return [*tensors[:2], *rest]


def check(result, args, backend="reference", **options):
    """Compares with eager on the device of the backend's kernels."""
    assert result.dtype is args[0].dtype
    exact = conv_bn_act_reference(*double(args), **options)
    # Where eager is exact by luck, one rounding of the largest value.
    floor = torch.finfo(result.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    eager = conv_bn_act_reference(*moved(backend, *args), **options).cpu()
    assert_as_exact(result, exact, eager, floor)


def framed(t, fill):
    """A larger NHWC tensor of `fill`, and within it a view equal to t."""
    n, c, h, w = t.shape
    frame = torch.full((n + 2, h + 2, w + 2, c + 3), fill, dtype=t.dtype, device=t.device)
    view = frame[1:-1, 1:-1, 1:-1, 1:-2].permute(0, 3, 1, 2)
    view.copy_(t)
    return frame, view


def fenced(t):
    """Dense NHWC storage with NaN before and after, and t in it."""
    n, c, h, w = t.shape
    fence = 500
    storage = poisoned((t.numel() + 2 * fence,), t.dtype).to(t.device)
    view = storage[fence:-fence].view(n, h, w, c).permute(0, 3, 1, 2)
    view.copy_(t)
    return storage, view


def assert_only_within(storage, view):
    """All of the view is written, and of the poisoned storage around it nothing."""
    assert not view.isnan().any()
    assert (~storage.isnan()).sum() == view.numel()


def same_non_finite(result, truth):
    assert truth.isnan().any() or truth.isinf().any()
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.isposinf(), truth.isposinf())
    assert torch.equal(result.isneginf(), truth.isneginf())


def with_threads(count, run):
    """run() with torch set to this number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return run()
    finally:
        torch.set_num_threads(before)


def assert_no_bit_changes(run):
    """run() gives the same with 1, 2 and 5 threads and again."""
    first = with_threads(1, run)
    for count in (2, 5, 5, 1):
        assert torch.equal(with_threads(count, run), first), f"{count} threads"


def test_the_reference_is_the_module():
    convolution, norm = nn.Conv2d(3, 5, 3, 2, 1, bias=False).double(), nn.BatchNorm2d(5).double().eval()
    for i, t in enumerate((norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var)):
        t.copy_(random(5, seed=i).abs())
    x, residual, skip = random(2, 3, 7, 6).double(), random(2, 5, 4, 3).double(), random(2, 5, 4, 3).double()
    expected = nn.LeakyReLU(0.01)(norm(convolution(x)) + residual) + skip
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    result = conv_bn_act_reference(x, convolution.weight, scale, shift, residual, skip, 2, 1, 0.01)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, dtype, backend):
    options = dict(stride=shape[6], padding=shape[7], slope=0.01)
    args = inputs(*shape, dtype)
    result = ops.conv_bn_act(*args, **options, backend=backend)
    check(result, args, **options)
    assert backend == "reference" or result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("parts", [(), *((name,) for name in EVERY), EVERY[:2], EVERY[:3], EVERY[2:], EVERY])
def test_every_part_of_the_epilogue(parts, slope, dtype, backend):
    args = only(inputs(1, 12, 5, 8, 19, (3, 3), 1, 1, dtype), parts)
    check(ops.conv_bn_act(*args, padding=1, slope=slope, backend=backend), args, padding=1, slope=slope)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("parts", [(), EVERY[:2], EVERY[:3], EVERY])
@pytest.mark.parametrize("channels", [48, 64])
def test_every_part_of_the_epilogue_in_registers_on_every_isa(channels, parts, slope, dtype):
    args = only(inputs(1, 12, 2, 23, channels, (1, 1), 1, 0, dtype), parts)
    run = ops.conv_bn_act
    each_isa(lambda isa: check(run(*args, slope=slope, backend="native"), args, slope=slope))


@needs_native
@pytest.mark.parametrize("shape", SHAPES + LONG + WIDE)
def test_whole_numbers_are_exact(shape):
    options = dict(stride=shape[6], padding=shape[7], slope=0.25)
    args = whole(inputs(*shape))
    expected = conv_bn_act_reference(*double(args), **options).float()
    assert torch.equal(ops.conv_bn_act(*args, **options, backend="native"), expected)


@needs_native
@pytest.mark.parametrize("shape", LONG + WIDE)
def test_bfloat16_is_rounded_once(shape):
    options = dict(stride=shape[6], padding=shape[7], slope=0.25)
    args = whole(inputs(*shape, torch.bfloat16))
    expected = conv_bn_act_reference(*double(args), **options).bfloat16()
    assert torch.equal(ops.conv_bn_act(*args, **options, backend="native"), expected)


@needs_native
@given(
    n=st.integers(1, 2), c=st.one_of(st.integers(1, 35), st.sampled_from([128, 129, 257])),
    h=st.integers(1, 9), w=st.integers(1, 30), k=st.integers(1, 70),
    kernel=st.sampled_from([(1, 1), (3, 3), (7, 7), (1, 2), (2, 1)]), stride=st.integers(1, 3),
    padding=st.integers(0, 3), parts=st.sets(st.sampled_from(EVERY)),
    dtypes=st.sampled_from(DTYPES_AND_PRODUCTS), slope=st.sampled_from([0.0, 0.25, None]),
    count=st.sampled_from([1, 2, 5]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_isa_writes_all_of_the_output(
    n, c, h, w, k, kernel, stride, padding, parts, dtypes, slope, count
):
    dtype, product = dtypes
    assume(h + 2 * padding >= kernel[0] and w + 2 * padding >= kernel[1])
    args = only(whole(inputs(n, c, h, w, k, kernel, stride, padding, dtype)), parts)
    expected = conv_bn_act_reference(*double(args), stride, padding, slope).to(dtype)
    x, weight, scale, shift, residual, skip = args
    scale, shift = (None if t is None else t.float() for t in (scale, shift))
    residual, skip = (None if t is None else framed(t, 9.0)[1] for t in (residual, skip))
    packed, x = pack_conv(weight, stride, padding, dtype=product), fenced(x)[1]

    def run(isa):
        storage, out = framed(poisoned(expected.shape, dtype), float("nan"))
        conv_bn_act_native(x, packed, scale, shift, residual, skip, out, slope)
        assert torch.equal(out, expected), isa
        assert_only_within(storage, out)

    with_threads(count, lambda: each_isa(run))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*LONG, (1, 33, 6, 50, 40, (3, 3), 1, 1), (1, 3, 9, 70, 17, (7, 7), 1, 3)])
def test_every_isa_is_as_exact(shape, dtype):
    args, options = inputs(*shape, dtype), dict(padding=shape[7])
    each_isa(lambda isa: check(ops.conv_bn_act(*args, **options, backend="native"), args, **options))


@needs_native
def test_words_of_packed_weights():
    weight = random(18, 5, 3, 2)
    floats = pack_conv(weight, terms=12)
    assert (floats.chunk, floats.data.shape) == (2, (2, 5 * 6 * 16)) and floats.sums is None
    pairs, codes = pack_conv(weight, terms=12, dtype=torch.bfloat16), whole([weight])[0].to(torch.int8)
    quads = pack_conv(codes, terms=12, dtype=torch.int8)
    assert (pairs.chunk, quads.chunk) == (2, 2)
    for packed, source in ((pairs, weight.bfloat16()), (quads, codes)):
        words = packed.data.view(2, -1, 4 // packed.data.itemsize)
        for k, c, r, s in ((0, 0, 0, 0), (17, 4, 2, 1), (3, 3, 1, 0), (15, 4, 0, 1)):
            word, element = divmod(c, words.shape[2])
            chunk, within = divmod(word, 2)
            width = min(2, -(-5 // words.shape[2]) - 2 * chunk)
            at = ((2 * chunk * 6 + (2 * r + s) * width) + within) * 16 + k % 16
            assert words[k // 16, at, element] == source[k, c, r, s]
        assert not words.view(2, -1, 16, words.shape[2])[1, :, 2:].any()
    assert torch.equal(quads.sums[:18], codes.sum((1, 2, 3)).int()) and len(quads.sums) == 32


@needs_native
@pytest.mark.parametrize("shape", [*LONG, (1, 33, 6, 50, 40, (3, 3), 1, 1)])
def test_products_of_bfloat16_on_every_isa_are_as_exact(shape):
    args, options = inputs(*shape, torch.bfloat16), dict(padding=shape[7])
    x, weight, scale, shift, residual, skip = args
    packed = pack_conv(weight, padding=shape[7], dtype=torch.bfloat16)
    scale, shift, residual, skip = scale.float(), shift.float(), nhwc(residual), nhwc(skip)

    def run(isa):
        out = nhwc(poisoned(residual.shape, torch.bfloat16))
        conv_bn_act_native(nhwc(x), packed, scale, shift, residual, skip, out, 0.0)
        check(out, args, **options)

    each_isa(run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_batch_of_none(kernel, backend):
    args = inputs(0, 3, 5, 7, 17, kernel, 2, 1)
    result = ops.conv_bn_act(*args, stride=2, padding=1, backend=backend)
    assert result.shape == args[4].shape and result.dtype is torch.float32


@needs_native
def test_any_strides():
    x, weight, scale, shift, residual, skip = inputs(2, 12, 3, 5, 7, (3, 3), 1, 1)
    expected = ops.conv_bn_act(x, weight, scale, shift, residual, skip, padding=1)
    maps = zip(layouts(x), layouts(residual), reversed(list(layouts(skip))), strict=True)
    vectors = torch.stack([scale, shift], 1)
    for (name, x_layout), (_, residual_layout), (_, skip_layout) in maps:
        args = x_layout, weight.transpose(0, 3).contiguous().transpose(0, 3), *vectors.unbind(1)
        result = ops.conv_bn_act(*args, residual_layout, skip_layout, padding=1, backend="native")
        assert torch.equal(result, expected), name
        assert result.is_contiguous(memory_format=torch.channels_last)
    expanded = x[:1, :, :1, :1].expand(2, 12, 3, 5)
    assert torch.equal(
        ops.conv_bn_act(expanded, weight, padding=1, backend="native"),
        ops.conv_bn_act(expanded.contiguous(), weight, padding=1, backend="native"),
    )


@needs_native
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_one_pixel_and_one_column_in_every_layout(kernel):
    # A dimension of size 1 may have any stride: channels_last and contiguous look alike.
    for shape in ((2, 5, 1, 1), (1, 5, 4, 1), (1, 1, 3, 4)):
        n, c, h, w = shape
        args = whole(inputs(n, c, h, w, 3, kernel, 1, kernel[0] // 2))
        expected = conv_bn_act_reference(*args, padding=kernel[0] // 2)
        for name, x in layouts(args[0]):
            result = ops.conv_bn_act(x, *args[1:], padding=kernel[0] // 2, backend="native")
            assert torch.equal(result, expected), name


@needs_native
def test_parameters_stay_float32_beside_bfloat16():
    x, weight, scale, shift, _, _ = inputs(1, 8, 4, 4, 5, (1, 1), 1, 0)
    result = ops.conv_bn_act(x.bfloat16(), weight, scale, shift, backend="native")
    assert result.dtype is torch.bfloat16
    truth = conv_bn_act_reference(*double([x.bfloat16(), weight, scale, shift]))
    # Half a unit in the last place of bfloat16, and what float32 sums lose.
    assert ((result.double() - truth).abs() <= truth.abs() * 2.0**-8 + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_nan_and_inf_go_where_torch_sends_them(slope, dtype, backend):
    x, weight, scale, shift, residual, skip = inputs(1, 130, 9, 12, 18, (3, 3), 1, 1, dtype)
    x[0, 0, 1, 1], x[0, 129, 1, 6], x[0, 64, 7, 10] = float("nan"), float("inf"), -float("inf")
    residual[0, 17, 4, 4], residual[0, 3, 4, 0] = float("nan"), -float("inf")
    skip[0, 0, 4, 6], skip[0, 17, 5, 3], skip[0, 2, 1, 7] = float("nan"), float("inf"), -float("inf")
    args, options = (x, weight, scale, shift, residual, skip), dict(padding=1, slope=slope)
    result = ops.conv_bn_act(*args, **options, backend=backend)
    same_non_finite(result, conv_bn_act_reference(*double(args), **options))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 20, 23, 40, 100, (3, 3), 1, 1), (1, 200, 2, 3, 150, (1, 1), 1, 0)])
def test_threads_and_repeats_change_no_bit(shape, dtype):
    args = inputs(*shape, dtype)
    assert_no_bit_changes(lambda: ops.conv_bn_act(*args, padding=shape[7], backend="native"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    args = inputs(1, 5, 3, 4, 6, (3, 3), 1, 1, dtype)
    assert torch.equal(ops.conv_bn_act(*args, padding=1), conv_bn_act_reference(*args, padding=1))
    if native.why_not is None:
        with pytest.raises(RuntimeError, match=f"conv_bn_act: .*{dtype}"):
            ops.conv_bn_act(*args, padding=1, backend="native")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient(backend):
    args = [t.double().requires_grad_() for t in inputs(1, 2, 4, 3, 2, (3, 3), 2, 1)]
    options = dict(stride=2, padding=1, slope=0.01, backend=backend)
    torch.autograd.gradcheck(lambda *args: ops.conv_bn_act(*args, **options), args)
    x, weight = random(1, 2, 3, 3).requires_grad_(), random(4, 2, 1, 1)
    assert ops.conv_bn_act(x, weight, backend=backend).requires_grad


@needs_native
def test_native_refuses_to_lose_a_gradient():
    for needing in range(6):
        args = [t.requires_grad_(i == needing) for i, t in enumerate(inputs(1, 2, 2, 3, 4, (3, 3), 1, 1))]
        assert ops.conv_bn_act(*args, padding=1).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.conv_bn_act(*args, padding=1, backend="native")
        with torch.no_grad():
            ops.conv_bn_act(*args, padding=1, backend="native")


VALID = dict(
    x=torch.zeros(1, 2, 4, 3),
    w=torch.zeros(5, 2, 3, 3),
    scale=torch.zeros(5),
    shift=torch.zeros(5),
    residual=torch.zeros(1, 5, 4, 3),
    skip=torch.zeros(1, 5, 4, 3),
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, "x is NoneType"),
        (dict(x=torch.zeros(2, 4, 3)), ValueError, r"x is \(2, 4, 3\)"),
        (dict(x=torch.zeros(1, 2, 4, 3, dtype=torch.int64)), TypeError, "x is torch.int64"),
        (dict(w=torch.zeros(5, 2, 7, 3)), ValueError, r"x is \(1, 2, 4, 3\), too small for w"),
        (dict(w=torch.zeros(5, 3, 3, 3)), ValueError, r"w is \(5, 3, 3, 3\).*needs \(K, 2, kernel"),
        (dict(w=torch.zeros(5, 2, 3)), ValueError, r"w is \(5, 2, 3\)"),
        (dict(w=None), TypeError, "w is NoneType"),
        (dict(w=torch.zeros(5, 2, 3, 3, device="meta")), ValueError, "w is on meta"),
        (dict(scale=torch.zeros(5, device="meta")), ValueError, "scale is on meta"),
        (dict(shift=torch.zeros(5, device="meta")), ValueError, "shift is on meta"),
        (dict(scale=torch.zeros(4)), ValueError, r"scale is \(4,\).*needs \(5,\)"),
        (dict(scale=1.0), TypeError, "scale is float"),
        (dict(shift=torch.zeros(5, 1)), ValueError, r"shift is \(5, 1\).*needs \(5,\)"),
        (dict(residual=torch.zeros(1, 5, 4, 4)), ValueError, r"residual is .*needs \(1, 5, 4, 3\)"),
        (dict(residual=torch.zeros(1, 5, 4, 3).half()), TypeError, "residual is torch.float16"),
        (dict(residual=torch.zeros(1, 5, 4, 3, device="meta")), ValueError, "residual is on meta"),
        (dict(skip=torch.zeros(2, 5, 4, 3)), ValueError, r"skip is .*needs \(1, 5, 4, 3\)"),
        (dict(skip=torch.zeros(1, 5, 4, 3).double()), TypeError, "skip is torch.float64"),
        (dict(skip=torch.zeros(1, 5, 4, 3, device="meta")), ValueError, "skip is on meta"),
        (dict(stride=0), ValueError, "stride is 0"),
        (dict(padding=-1), ValueError, "stride is 1 and padding -1"),
        (dict(slope=1.5), ValueError, "slope is 1.5"),
        (dict(slope=-0.01), ValueError, "slope is -0.01"),
        (dict(slope=float("nan")), ValueError, "slope is nan"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message, backend):
    with pytest.raises(error, match=f"^conv_bn_act: {message}"):
        ops.conv_bn_act(**{**VALID, "padding": 1, "backend": backend, **change})


@needs_native
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5, 4, (3, 3), 2, 1), (0, 3, 2, 2, 5, (1, 1), 1, 0), (1, 1, 1, 1, 1, (1, 1), 1, 0)]
)
@pytest.mark.parametrize("parts", [(), EVERY])
def test_opcheck(shape, parts):
    args = only(inputs(*shape), parts)
    torch.library.opcheck(torch.ops.shelfkern.conv_bn_act.default, (*args, *shape[6:8], 0.01, "native"))


@needs_native
def test_compile_and_export():
    args = inputs(2, 8, 5, 4, 6, (3, 3), 2, 1)
    options = dict(stride=2, padding=1, slope=None)
    expected = ops.conv_bn_act(*args, **options)
    compiled = torch.compile(
        lambda *args: ops.conv_bn_act(*args, **options) * 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), expected)

    class Convolution(nn.Module):
        def forward(self, *args):
            return ops.conv_bn_act(*args, **options)

    program = torch.export.export(Convolution(), args)
    assert "shelfkern.conv_bn_act" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


# The Triton kernel. Every run reads windows with NaN around them and writes into a poisoned window.
SMALL = conv.Config(64, 64, 64, 4, 3)
SPLIT = dataclasses.replace(SMALL, split=2)


def windows(*tensors):
    """On the kernels' device, windows equal to these of larger NHWC tensors of NaN; None for None."""
    return [None if t is None else framed(t, float("nan"))[1] for t in moved("triton", *tensors)]


def walled(t):
    """t, dense, with NaN before and after it."""
    storage = poisoned((t.numel() + 1024,), t.dtype).to(t.device)
    return storage[512:-512].view(t.shape).copy_(t)


@contextlib.contextmanager
def written(shape, dtype):
    """A poisoned window to write into; nothing around it may change."""
    frame, out = framed(moved("triton", poisoned(shape, dtype))[0], float("nan"))
    yield out
    result = out.clone()
    out.fill_(float("nan"))
    assert frame.isnan().all()
    out.copy_(result)


def run_triton(args, stride=1, padding=0, slope=0.25, config=None, **options):
    """The raw kernel on a reference's arguments."""
    x, residual, skip = windows(args[0], *args[4:])
    weight, *affine = moved("triton", *args[1:4])
    scale, shift = (None if t is None else walled(t.float()) for t in affine)
    precision = conv.default_precision(x.dtype)
    packed, kernel = walled(conv.pack_weight(weight, x.dtype, precision)), tuple(weight.shape[2:])
    with written(out_shape(x, weight, stride, padding), x.dtype) as out:
        after = (scale, shift, residual, skip, out)
        conv_bn_act_triton(x, packed, *after, kernel, stride, padding, slope, config, **options)
    return out.cpu()


def rounded_once(args, stride=1, padding=0, slope=0.25):
    """The exact result in the dtype of x."""
    options = dict(stride=stride, padding=padding, slope=slope)
    return conv_bn_act_reference(*double(args), **options).to(args[0].dtype)


@pytest.fixture
def parts(monkeypatch):
    """The workspaces of split sums, which start as NaN and have NaN around them."""
    taken = []

    def poisoned_workspace(config, pixels, channels, like):
        if config.split == 1:
            return None
        frame = poisoned((config.split * pixels * channels + 1024,), torch.float32).to(like.device)
        taken.append((frame, frame[512:-512].view(config.split, pixels, channels)))
        return taken[-1][1]

    monkeypatch.setattr(conv, "workspace", poisoned_workspace)
    return taken


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (3, 64, 4, 6, 64, (3, 3), 1, 1), (1, 300, 3, 5, 17, (3, 3), 1, 1)]
)
def test_triton_is_the_reference(shape, dtype):
    args, options = inputs(*shape, dtype), dict(stride=shape[6], padding=shape[7], slope=0.01)
    check(run_triton(args, **options), args, "triton", **options)


@needs_triton
@pytest.mark.parametrize(
    "swapped, dtype", [(False, torch.float32), (False, torch.bfloat16), (True, torch.float16)]
)
@pytest.mark.parametrize("config", conv.CONFIGS + conv.SMALL_CONFIGS)
def test_triton_rounds_whole_numbers_once(config, swapped, dtype, parts):
    # Every sum is exact: no wrong tap, border, channel or part goes unseen.
    args = whole(inputs(2, 19, 5, 4, 67, (3, 3), 2, 1, dtype))
    config = dataclasses.replace(config, swap=config.swap != swapped)
    assert torch.equal(run_triton(args, 2, 1, config=config), rounded_once(args, 2, 1))
    assert len(parts) == (config.split > 1)
    for frame, part in parts:
        assert_only_within(frame, part)


@needs_triton
@pytest.mark.parametrize("swap, dtype", [(False, torch.float32), (True, torch.float16)])
@pytest.mark.parametrize("split", [2, 3, 8, 10])
def test_triton_every_split(split, swap, dtype, parts):
    # 10 steps of 9 taps, and 9 of which the last parts of 8 and 10 get none; both write zeros for them.
    for shape in ((1, 70, 3, 5, 5, (1, 5), 1, 2), (1, 20, 3, 4, 3, (3, 3), 1, 1)):
        args, config = whole(inputs(*shape, dtype)), dataclasses.replace(SMALL, split=split, swap=swap)
        expected = rounded_once(args, padding=shape[7])
        assert torch.equal(run_triton(args, padding=shape[7], config=config), expected)
    for frame, part in parts:
        assert_only_within(frame, part)


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT, conv.CONFIGS[-1]])
def test_triton_repeats_bit_for_bit(config, parts):
    args = inputs(1, 70, 4, 5, 20, (3, 3), 1, 1, torch.float16)
    first = run_triton(args, padding=1, config=config)
    assert all(torch.equal(run_triton(args, padding=1, config=config), first) for _ in range(2))
    check(first, args, "triton", padding=1, slope=0.25)


@needs_triton
def test_triton_tiles_of_many_rows_and_columns():
    # 10 rows of tiles and 3 columns: one group of 8 rows, and a rest of 2.
    args = whole(inputs(1, 3, 24, 25, 130, (1, 1), 1, 0, torch.float16))
    assert torch.equal(run_triton(args, config=SMALL), rounded_once(args))


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("present", [(), *((name,) for name in EVERY), EVERY[:2], EVERY[2:], EVERY])
def test_triton_every_part_of_the_epilogue(present, slope, config):
    args = only(whole(inputs(1, 12, 5, 4, 19, (2, 1), 1, 0, torch.bfloat16)), present)
    assert torch.equal(run_triton(args, slope=slope, config=config), rounded_once(args, slope=slope))


@needs_triton
@pytest.mark.parametrize("slope", SLOPES)
def test_triton_every_slope(slope):
    args = inputs(1, 12, 5, 8, 19, (3, 3), 1, 1, torch.float16)
    check(run_triton(args, padding=1, slope=slope), args, "triton", padding=1, slope=slope)


@needs_triton
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (2, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_triton_every_stride_and_padding(stride, kernel):
    for padding in {0, 1, kernel[0] // 2, 3}:
        args = whole(inputs(1, 5, 8, 9, 6, kernel, stride, padding))
        result = run_triton(args, stride, padding, config=SMALL)
        assert torch.equal(result, rounded_once(args, stride, padding)), padding


@needs_triton
@pytest.mark.parametrize(
    "config, dtype", [(SMALL, torch.float16), (SMALL, torch.bfloat16), (SPLIT, torch.float32)]
)
@pytest.mark.parametrize("slope", [0.0, 0.25, None])
def test_triton_keeps_what_is_not_finite(slope, dtype, config):
    x, weight, scale, shift, residual, skip = whole(inputs(1, 33, 7, 9, 18, (3, 3), 1, 1, dtype))
    x[0, 0, 1, 1], x[0, 32, 1, 6], x[0, 16, 5, 8] = float("nan"), float("inf"), -float("inf")
    residual[0, 17, 4, 4], residual[0, 3, 4, 0] = float("nan"), -float("inf")
    skip[0, 0, 4, 6], skip[0, 17, 5, 3], skip[0, 2, 1, 7] = float("nan"), float("inf"), -float("inf")
    args, options = (x, weight, scale, shift, residual, skip), dict(padding=1, slope=slope)
    result, expected = run_triton(args, **options, config=config), rounded_once(args, **options)
    same_non_finite(result, expected)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@needs_triton
def test_triton_overflows_as_its_dtype():
    args = [torch.full((1, 16, 1, 1), value, dtype=torch.float16) for value in (128.0, -128.0)]
    weight = torch.full((2, 16, 1, 1), 32.0, dtype=torch.float16)
    for x in args:
        assert torch.equal(run_triton((x, weight, None, None, None, None), slope=None), x[:, :2] * torch.inf)


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_triton_takes_images_far_apart(config):
    x, weight, scale, shift, residual, skip = whole(inputs(2, 9, 3, 4, 5, (3, 3), 1, 1, torch.float16))
    device = moved("triton", x)[0].device
    with contextlib.ExitStack() as stack:
        far = [stack.enter_context(far_apart(t.shape, t.dtype, device)).copy_(t) for t in (x, residual, skip)]
        out = stack.enter_context(far_apart(residual.shape, x.dtype, device)).fill_(float("nan"))
        weight_, scale_, shift_ = moved("triton", conv.pack_weight(weight, x.dtype), scale, shift)
        after = (scale_.float(), shift_.float(), *far[1:], out)
        conv_bn_act_triton(far[0], weight_, *after, (3, 3), 1, 1, 0.25, config)
        args = x, weight, scale, shift, residual, skip
        assert torch.equal(out.cpu(), rounded_once(args, padding=1))


@needs_triton
def test_triton_takes_rows_far_apart():
    # Two rows below the first tap is more than 2^31 elements away.
    x, weight, *_ = whole(inputs(1, 8, 3, 5, 4, (3, 3), 1, 1, torch.float16))
    with far_apart((3, 8, 1, 5), x.dtype, moved("triton", x)[0].device, 2**30 + 16) as images:
        rows = images.permute(2, 1, 0, 3).copy_(x)
        out = nhwc(poisoned((1, 4, 3, 5), x.dtype).to(rows.device))
        packed = moved("triton", conv.pack_weight(weight, x.dtype))[0]
        conv_bn_act_triton(rows, packed, None, None, None, None, out, (3, 3), 1, 1, None)
        assert torch.equal(out.cpu(), rounded_once((x, weight), padding=1, slope=None))


@needs_triton
@given(
    n=st.integers(1, 3), c=st.one_of(st.integers(1, 35), st.sampled_from([64, 65, 129])),
    h=st.integers(1, 7), w=st.integers(1, 20), k=st.integers(1, 70),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 2), (2, 1)]), stride=st.integers(1, 3),
    padding=st.integers(0, 2), present=st.sets(st.sampled_from(EVERY)), dtype=st.sampled_from(CUDA_DTYPES),
    slope=st.sampled_from([0.0, 0.25, None]), config=st.sampled_from([None, SMALL, SPLIT]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_triton_on_what_hypothesis_draws(
    n, c, h, w, k, kernel, stride, padding, present, dtype, slope, config
):
    assume(h + 2 * padding >= kernel[0] and w + 2 * padding >= kernel[1])
    args = only(whole(inputs(n, c, h, w, k, kernel, stride, padding, dtype)), present)
    result = run_triton(args, stride, padding, slope, config)
    assert torch.equal(result, rounded_once(args, stride, padding, slope))


@needs_triton
def test_triton_public_op():
    # Whole numbers: exact in TF32 too, which is what float32 may be multiplied in on a GPU.
    args = whole(inputs(2, 12, 3, 5, 7, (3, 3), 1, 1))
    expected, options = rounded_once(args, padding=1), dict(padding=1, slope=0.25, backend="triton")
    maps = zip(layouts(args[0]), layouts(args[4]), reversed(list(layouts(args[5]))), strict=True)
    for (name, x), (_, residual), (_, skip) in maps:
        result = ops.conv_bn_act(*moved("triton", x, *args[1:4], residual, skip), **options)
        assert torch.equal(result.cpu(), expected), name
        assert result.is_contiguous(memory_format=torch.channels_last)
    x, weight = moved("triton", *args[:2])
    for part in (x[:1, :, :1, :1], x[:, :1, :, :1], x[:1, :, :, :1]):
        expanded = part.expand(2, 12, 3, 5)
        expected = rounded_once((expanded.cpu(), args[1]), padding=1)
        assert torch.equal(ops.conv_bn_act(expanded, weight, **options).cpu(), expected)
    assert ops.conv_bn_act(x[:0], weight, **options).shape == (0, 7, 3, 5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_under_autocast(dtype):
    x, weight, scale, shift, *_ = whole(inputs(1, 8, 4, 4, 5, (3, 3), 1, 1))
    args = moved("triton", x.to(dtype), weight, scale, shift)
    with torch.autocast(args[0].device.type, dtype):
        result = ops.conv_bn_act(*args, padding=1, slope=0.25, backend="triton")
    assert torch.equal(result.cpu(), rounded_once((x.to(dtype), weight, scale, shift), padding=1))


@needs_triton
def test_triton_refuses_to_lose_a_gradient():
    for needing in range(6):
        args = moved("triton", *inputs(1, 2, 2, 3, 4, (1, 1), 1, 0))
        args[needing].requires_grad_()
        with pytest.raises(RuntimeError, match="requires grad, and the triton kernel has no gradient"):
            ops.conv_bn_act(*args, backend="triton")
        with torch.no_grad():
            ops.conv_bn_act(*args, backend="triton")


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 4, (3, 3), 2, 1), (0, 3, 2, 2, 5, (1, 1), 1, 0)])
@pytest.mark.parametrize("present", [(), EVERY])
def test_triton_opcheck(shape, present):
    args = moved("triton", *only(inputs(*shape), present))
    torch.library.opcheck(torch.ops.shelfkern.conv_bn_act.default, (*args, *shape[6:8], 0.01, "triton"))


@needs_triton
def test_triton_compile_and_export():
    args = tuple(moved("triton", *inputs(2, 8, 5, 4, 6, (3, 3), 2, 1)))
    options = dict(stride=2, padding=1, slope=None, backend="triton")
    expected = ops.conv_bn_act(*args, **options)
    compiled = torch.compile(
        lambda *args: ops.conv_bn_act(*args, **options) * 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), expected)

    class Convolution(nn.Module):
        def forward(self, *args):
            return ops.conv_bn_act(*args, **options)

    program = torch.export.export(Convolution(), args)
    assert "shelfkern.conv_bn_act" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


@needs_triton_on_a_gpu
def test_eight_warps_and_a_flattened_loop():
    # One loop over taps and blocks of channels, pipelined and of 8 warps, once read a stale stage.
    config = next(c for c in conv.CONFIGS if c.warps == 8)
    for seed in range(30):
        torch.manual_seed(seed)
        x, weight = torch.randn(2, 256, 17, 19).half(), (torch.randn(256, 256, 3, 3) / 48).half()
        args = x, weight, None, None, None, None
        check(run_triton(args, padding=1, config=config), args, "triton", padding=1, slope=0.25)


# The network's layers at 512 x 512 and 1024 x 1024.
NETWORK = [
    (1, 64, 128, 128, 64, (3, 3), 1, 1),
    (2, 64, 128, 256, 128, (3, 3), 2, 1),
    (1, 256, 32, 64, 256, (3, 3), 1, 1),
    (1, 512, 16, 16, 512, (3, 3), 1, 1),
    (1, 1024, 32, 32, 256, (1, 1), 1, 0),
]


@needs_triton_on_a_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", NETWORK)
def test_triton_is_as_exact_as_cudnn(shape, dtype, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
    args, options = inputs(*shape, dtype), dict(stride=shape[6], padding=shape[7], slope=0.01)
    pixels = args[4].numel() // shape[4]
    problem = conv.Problem(pixels, shape[4], shape[5][0] * shape[5][1], shape[1], dtype)
    for config in conv.configurations(problem, precision, 132):
        check(run_triton(args, **options, config=config), args, "triton", **options)


def chain(x, weight, outs, overlap):
    """Convolutions that each read what the one before wrote."""
    for out in outs:
        after = (None, None, x, None, out)
        conv_bn_act_triton(x, weight, *after, (3, 3), 1, 1, 0.0, SPLIT, overlap=overlap)
        x = out
    return x


def gpu_chain():
    """Inputs of `chain`, on the GPU, and memory for 20 results."""
    x, weight, *_ = inputs(1, 64, 32, 32, 64, (3, 3), 1, 1, torch.float16)
    x, packed = moved("triton", nhwc(x), conv.pack_weight(weight / 4, x.dtype))
    return x, packed, [torch.full_like(x, float("nan")) for _ in range(20)]


@needs_triton_on_a_gpu
def test_triton_launches_that_overlap_change_no_bit():
    x, weight, outs = gpu_chain()
    expected = chain(x, weight, outs, False).clone()
    assert expected.isfinite().all()
    for _ in range(10):
        for out in outs:
            out.fill_(float("nan"))
        assert torch.equal(chain(x, weight, outs, True), expected)


@needs_triton_on_a_gpu
def test_triton_runs_on_the_current_stream():
    x, weight, outs = gpu_chain()
    expected = chain(x, weight, outs, True).clone()
    streams, own = [torch.cuda.Stream() for _ in range(3)], [gpu_chain()[2] for _ in range(3)]
    torch.cuda.synchronize()
    for stream, results in zip(streams, own, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = x * 1
            chain(late, weight, results, True)
    torch.cuda.synchronize()
    assert all(torch.equal(results[-1], expected) for results in own)


@needs_triton_on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_triton_runs_on_the_tensors_device():
    args = whole(inputs(1, 12, 5, 4, 7, (3, 3), 1, 1))
    with torch.cuda.device(0):
        result = ops.conv_bn_act(*(t.to("cuda:1") for t in args), padding=1, slope=0.25, backend="triton")
    assert result.device.index == 1 and torch.equal(result.cpu(), rounded_once(args, padding=1))
