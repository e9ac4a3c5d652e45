from __future__ import annotations

import contextlib
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    BACKENDS,
    CUDA_DTYPES,
    DTYPES,
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
from test_conv_bn_act import (
    SMALL,
    assert_no_bit_changes,
    assert_only_within,
    double,
    fenced,
    framed,
    same_non_finite,
    walled,
    whole,
    windows,
    with_threads,
    written,
)
from torch import nn

from shelfkern import native, ops
from shelfkern.ops import _conv_triton as conv
from shelfkern.ops import deconv_add_native, deconv_add_reference, pack_deconv
from shelfkern.ops.deconv_add import deconv_add_triton, pack_deconv_triton

# n, c, h, w, k
SHAPES = [
    (1, 8, 6, 10, 32),
    (2, 9, 5, 7, 17),
    (2, 17, 1, 9, 3),
    (1, 3, 4, 1, 33),
    (1, 1, 1, 1, 1),
    (1, 5, 12, 80, 5),
]
LONG = [(1, 256, 8, 8, 64), (1, 1024, 4, 6, 33)]
MIDDLE = [(2, 17, 5, 7, 33), (2, 33, 5, 7, 17), (1, 64, 6, 10, 32), (1, 128, 8, 8, 64)]
WIDE = [(1, 3, 9, 2000, 17), (1, 33, 5, 900, 4), (2, 130, 2, 500, 18)]


def inputs(n, c, h, w, k, dtype=torch.float32):
    """x, w, bias, skip."""
    weight = random(c, k, 3, 3, seed=1) / (4 * c) ** 0.5
    per_pixel = random(n, k, 2 * h, 2 * w, seed=3, dtype=dtype)
    return random(n, c, h, w, dtype=dtype), weight.to(dtype), random(k, seed=2, dtype=dtype), per_pixel


def check(result, args, backend="reference"):
    """Compares with eager on the device of the backend's kernels."""
    assert result.dtype is args[0].dtype
    exact = deconv_add_reference(*double(args))
    # Where eager is exact by luck, one rounding of the largest value.
    floor = torch.finfo(result.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert_as_exact(result, exact, deconv_add_reference(*moved(backend, *args)).cpu(), floor)


def test_the_reference_is_the_module():
    module = nn.ConvTranspose2d(3, 5, 3, 2, 1, output_padding=1).double()
    x, skip = random(2, 3, 4, 3).double(), random(2, 5, 8, 6).double()
    result = deconv_add_reference(x, module.weight, module.bias, skip)
    torch.testing.assert_close(result, module(x) + skip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, dtype, backend):
    args = inputs(*shape, dtype)
    result = ops.deconv_add(*args, backend=backend)
    check(result, args)
    assert backend == "reference" or result.is_contiguous(memory_format=torch.channels_last)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + MIDDLE + LONG + WIDE)
def test_whole_numbers_are_rounded_once(shape, dtype):
    args = whole(inputs(*shape, dtype))
    expected = deconv_add_reference(*double(args)).to(dtype)
    assert torch.equal(ops.deconv_add(*args, backend="native"), expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LONG)
def test_every_isa_is_as_exact(shape, dtype):
    args = inputs(*shape, dtype)
    each_isa(lambda isa: check(ops.deconv_add(*args, backend="native"), args))


@needs_native
def test_sums_of_some_hundred_products_on_every_isa():
    for shape in MIDDLE:
        args = inputs(*shape)
        each_isa(lambda isa, args=args: check(ops.deconv_add(*args, backend="native"), args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    result = ops.deconv_add(*inputs(0, 3, 4, 5, 17), backend=backend)
    assert result.shape == (0, 17, 8, 10) and result.dtype is torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 0, 4, 2), (1, 3, 4, 0, 2), (0, 3, 0, 0, 2)])
def test_images_of_nothing(shape):
    args = inputs(*shape)
    assert ops.deconv_add(*args).shape == args[3].shape


@needs_native
@given(
    n=st.integers(1, 2), c=st.one_of(st.integers(1, 40), st.sampled_from([128, 129, 257])),
    h=st.integers(1, 6), w=st.integers(1, 30), k=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2, 5]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_isa_writes_all_of_the_output(n, c, h, w, k, dtype, count):
    x, weight, bias, skip = whole(inputs(n, c, h, w, k, dtype))
    expected = deconv_add_reference(*double([x, weight, bias, skip])).to(dtype)
    x, skip = fenced(x)[1], framed(skip, 9.0)[1]
    packed = pack_deconv(weight)

    def run(isa):
        storage, out = framed(poisoned(expected.shape, dtype), float("nan"))
        deconv_add_native(x, packed, bias.float(), skip, out)
        assert torch.equal(out, expected), isa
        assert_only_within(storage, out)

    with_threads(count, lambda: each_isa(run))


@needs_native
def test_any_strides():
    x, weight, bias, skip = inputs(2, 12, 3, 5, 7)
    expected = ops.deconv_add(x, weight, bias, skip)
    weight, bias = weight.transpose(0, 3).contiguous().transpose(0, 3), torch.stack([bias, bias], 1)[:, 0]
    for name, x_layout in layouts(x):
        for _, skip_layout in layouts(skip):
            result = ops.deconv_add(x_layout, weight, bias, skip_layout, backend="native")
            assert torch.equal(result, expected), name
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_go_where_torch_sends_them(dtype, backend):
    args = inputs(1, 130, 6, 9, 18, dtype)
    x, skip = args[0], args[3]
    x[0, 0, 0, 0], x[0, 129, 3, 4], x[0, 5, 5, 8] = float("nan"), float("inf"), -float("inf")
    skip[0, 17, 11, 0], skip[0, 1, 11, 17], skip[0, 0, 6, 8] = float("nan"), float("inf"), -float("inf")
    result = ops.deconv_add(*args, backend=backend)
    same_non_finite(result, deconv_add_reference(*double(args)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 20, 23, 40, 18), (1, 200, 2, 3, 150)])
def test_threads_and_repeats_change_no_bit(shape, dtype):
    args = inputs(*shape, dtype)
    assert_no_bit_changes(lambda: ops.deconv_add(*args, backend="native"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    args = inputs(1, 5, 3, 4, 6, dtype)
    assert torch.equal(ops.deconv_add(*args), deconv_add_reference(*args))
    if native.why_not is None:
        with pytest.raises(RuntimeError, match=f"deconv_add: .*{dtype}"):
            ops.deconv_add(*args, backend="native")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient(backend):
    args = [t.double().requires_grad_() for t in inputs(1, 2, 3, 2, 3)]
    torch.autograd.gradcheck(lambda *args: ops.deconv_add(*args, backend=backend), args)
    x, *rest = inputs(1, 2, 2, 3, 3)
    assert ops.deconv_add(x.requires_grad_(), *rest, backend=backend).requires_grad


@needs_native
def test_native_refuses_to_lose_a_gradient():
    for needing in range(4):
        args = [t.requires_grad_(i == needing) for i, t in enumerate(inputs(1, 2, 2, 3, 4))]
        assert ops.deconv_add(*args).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.deconv_add(*args, backend="native")
        with torch.no_grad():
            ops.deconv_add(*args, backend="native")


VALID = dict(
    x=torch.zeros(1, 2, 4, 3), w=torch.zeros(2, 5, 3, 3), bias=torch.zeros(5), skip=torch.zeros(1, 5, 8, 6)
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, "x is NoneType"),
        (dict(x=torch.zeros(2, 4, 3)), ValueError, r"x is \(2, 4, 3\)"),
        (dict(x=torch.zeros(1, 2, 4, 3, dtype=torch.int32)), TypeError, "x is torch.int32"),
        (dict(w=torch.zeros(3, 5, 3, 3)), ValueError, r"w is \(3, 5, 3, 3\).*needs \(2, K, 3, 3\)"),
        (dict(w=torch.zeros(2, 5, 3, 2)), ValueError, r"w is \(2, 5, 3, 2\).*needs \(2, K, 3, 3\)"),
        (dict(w=torch.zeros(2, 5, 3)), ValueError, r"w is \(2, 5, 3\)"),
        (dict(w=None), TypeError, "w is NoneType"),
        (dict(w=torch.zeros(2, 5, 3, 3, device="meta")), ValueError, "w is on meta"),
        (dict(bias=torch.zeros(5, device="meta")), ValueError, "bias is on meta"),
        (dict(bias=None), TypeError, "bias is NoneType"),
        (dict(bias=torch.zeros(2)), ValueError, r"bias is \(2,\).*needs \(5,\)"),
        (dict(skip=None), TypeError, "skip is NoneType"),
        (dict(skip=torch.zeros(1, 5, 7, 6)), ValueError, r"skip is \(1, 5, 7, 6\).*needs \(1, 5, 8, 6\)"),
        (dict(skip=torch.zeros(1, 5, 8, 6).bfloat16()), TypeError, "skip is torch.bfloat16"),
        (dict(skip=torch.zeros(1, 5, 8, 6, device="meta")), ValueError, "skip is on meta"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message, backend):
    with pytest.raises(error, match=f"^deconv_add: {message}"):
        ops.deconv_add(**{**VALID, "backend": backend, **change})


@needs_native
@pytest.mark.parametrize("op", ["conv_bn_act", "deconv_add"])
def test_is_off_where_its_kernel_is(op, monkeypatch):
    args = inputs(1, 3, 4, 5, 6)
    monkeypatch.setitem(native.disabled, ("native", op), "off for a test")
    assert torch.equal(ops.deconv_add(*args), deconv_add_reference(*args))
    with pytest.raises(RuntimeError, match="off for a test"):
        ops.deconv_add(*args, backend="native")


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 2, 2, 5), (1, 1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(torch.ops.shelfkern.deconv_add.default, (*inputs(*shape), "native"))


@needs_native
def test_compile_and_export():
    args = inputs(2, 8, 3, 4, 5)
    expected = ops.deconv_add(*args)
    compiled = torch.compile(lambda *args: ops.deconv_add(*args) * 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), expected)

    class Merge(nn.Module):
        def forward(self, *args):
            return ops.deconv_add(*args)

    program = torch.export.export(Merge(), args)
    assert "shelfkern.deconv_add" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


# The Triton kernel. Every run reads windows with NaN around them and writes into a poisoned window.
TRITON_CONFIGS = [config for config in conv.CONFIGS + conv.SMALL_CONFIGS if config.split == 1]


def run_triton(args, config=None, **options):
    """The raw kernel on a reference's arguments."""
    x, skip = windows(args[0], args[3])
    weight, bias = moved("triton", *args[1:3])
    packed = walled(pack_deconv_triton(weight, x.dtype, conv.default_precision(x.dtype)))
    with written(args[3].shape, x.dtype) as out:
        deconv_add_triton(x, packed, walled(bias.float()), skip, out, config, **options)
    return out.cpu()


def rounded_once(args):
    """The exact result in the dtype of x."""
    return deconv_add_reference(*double(args)).to(args[0].dtype)


def test_triton_packs_output_channels_first():
    weight = random(3, 5, 3, 3)
    packed = pack_deconv_triton(weight, torch.float16)
    assert packed.shape == (5, 9, 3) and packed.is_contiguous()
    assert torch.equal(packed[4, 5], weight[:, 4, 1, 2].half())


def test_triton_configurations_do_not_split():
    for pixels in (1, 10**6):
        for precision in ("ieee", "tf32"):
            problem = conv.Problem(pixels, 64, 9, 64, torch.float32)
            assert conv.best(problem, precision, torch.zeros(1), split=False).split == 1


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 5, 4, 17), (1, 256, 3, 4, 20)])
def test_triton_is_the_reference(shape, dtype):
    args = inputs(*shape, dtype)
    check(run_triton(args), args, "triton")


@needs_triton
@pytest.mark.parametrize(
    "swapped, dtype", [(False, torch.float32), (False, torch.bfloat16), (True, torch.float16)]
)
@pytest.mark.parametrize("config", TRITON_CONFIGS)
def test_triton_rounds_whole_numbers_once(config, swapped, dtype):
    # Every sum is exact: no wrong tap, border, channel or parity goes unseen.
    args = whole(inputs(2, 35, 5, 7, 67, dtype))
    config = dataclasses.replace(config, swap=config.swap != swapped)
    assert torch.equal(run_triton(args, config), rounded_once(args))


@needs_triton
def test_triton_tiles_of_many_rows_and_columns():
    # 10 rows of tiles and 3 columns of every parity.
    args = whole(inputs(1, 3, 24, 25, 130, torch.float16))
    assert torch.equal(run_triton(args, SMALL), rounded_once(args))


@needs_triton
def test_triton_repeats_bit_for_bit():
    args = inputs(1, 70, 4, 5, 20, torch.float16)
    first = run_triton(args)
    assert all(torch.equal(run_triton(args), first) for _ in range(2))


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_triton_keeps_what_is_not_finite(dtype):
    args = whole(inputs(1, 33, 6, 9, 18, dtype))
    x, skip = args[0], args[3]
    x[0, 0, 0, 0], x[0, 32, 3, 4], x[0, 16, 5, 8] = float("nan"), float("inf"), -float("inf")
    skip[0, 17, 11, 0], skip[0, 1, 11, 17], skip[0, 0, 6, 8] = float("nan"), float("inf"), -float("inf")
    # Torch's own sums in float64 multiply no zeros either.
    result, expected = run_triton(args, SMALL), rounded_once(args)
    same_non_finite(result, expected)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@needs_triton
def test_triton_takes_images_far_apart():
    x, weight, bias, skip = args = whole(inputs(2, 9, 2, 3, 5, torch.float16))
    device = moved("triton", x)[0].device
    with contextlib.ExitStack() as stack:
        far_x, far_skip = (
            stack.enter_context(far_apart(t.shape, t.dtype, device)).copy_(t) for t in (x, skip)
        )
        out = stack.enter_context(far_apart(skip.shape, x.dtype, device)).fill_(float("nan"))
        packed, bias = moved("triton", pack_deconv_triton(weight, x.dtype), bias.float())
        deconv_add_triton(far_x, packed, bias, far_skip, out, SMALL)
        assert torch.equal(out.cpu(), rounded_once(args))


@needs_triton
@given(
    n=st.integers(1, 3), c=st.one_of(st.integers(1, 35), st.sampled_from([64, 65, 129])),
    h=st.integers(1, 6), w=st.integers(1, 20), k=st.integers(1, 70), dtype=st.sampled_from(CUDA_DTYPES),
    config=st.sampled_from([None, SMALL, dataclasses.replace(SMALL, swap=True)]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_triton_on_what_hypothesis_draws(n, c, h, w, k, dtype, config):
    args = whole(inputs(n, c, h, w, k, dtype))
    assert torch.equal(run_triton(args, config), rounded_once(args))


@needs_triton
def test_triton_public_op():
    # Whole numbers: exact in TF32 too, which is what float32 may be multiplied in on a GPU.
    args = whole(inputs(2, 12, 3, 5, 7))
    expected = rounded_once(args)
    maps = zip(layouts(args[0]), reversed(list(layouts(args[3]))), strict=True)
    for (name, x), (_, skip) in maps:
        result = ops.deconv_add(*moved("triton", x, *args[1:3], skip), backend="triton")
        assert torch.equal(result.cpu(), expected), name
        assert result.is_contiguous(memory_format=torch.channels_last)
    x, weight, bias, skip = moved("triton", *args)
    for part in (x[:1, :, :1, :1], x[:, :1, :, :1]):
        expanded = part.expand(2, 12, 3, 5)
        expected = rounded_once((expanded.cpu(), *args[1:]))
        assert torch.equal(ops.deconv_add(expanded, weight, bias, skip, backend="triton").cpu(), expected)
    for none in ((0, 3, 4, 5, 17), (1, 3, 0, 4, 2)):
        args = moved("triton", *inputs(*none))
        assert ops.deconv_add(*args, backend="triton").shape == args[3].shape


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_under_autocast(dtype):
    x, weight, bias, skip = whole(inputs(1, 8, 4, 3, 5))
    args = moved("triton", x.to(dtype), weight, bias, skip.to(dtype))
    with torch.autocast(args[0].device.type, dtype):
        result = ops.deconv_add(*args, backend="triton")
    assert torch.equal(result.cpu(), rounded_once((x.to(dtype), weight, bias, skip)))


@needs_triton
def test_triton_refuses_to_lose_a_gradient():
    for needing in range(4):
        args = moved("triton", *inputs(1, 2, 2, 3, 4))
        args[needing].requires_grad_()
        with pytest.raises(RuntimeError, match="requires grad, and the triton kernel has no gradient"):
            ops.deconv_add(*args, backend="triton")
        with torch.no_grad():
            ops.deconv_add(*args, backend="triton")


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 2, 2, 5)])
def test_triton_opcheck(shape):
    args = moved("triton", *inputs(*shape))
    torch.library.opcheck(torch.ops.shelfkern.deconv_add.default, (*args, "triton"))


@needs_triton
def test_triton_compile_and_export():
    args = tuple(moved("triton", *inputs(2, 8, 3, 4, 5)))
    expected = ops.deconv_add(*args, backend="triton")
    compiled = torch.compile(
        lambda *args: ops.deconv_add(*args, backend="triton") * 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), expected)

    class Merge(nn.Module):
        def forward(self, *args):
            return ops.deconv_add(*args, backend="triton")

    program = torch.export.export(Merge(), args)
    assert "shelfkern.deconv_add" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


@needs_triton_on_a_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", [(1, 512, 16, 16, 256), (1, 256, 32, 64, 128), (2, 128, 64, 64, 64)])
def test_triton_is_as_exact_as_cudnn(shape, dtype, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
    n, c, h, w, k = shape
    args = inputs(*shape, dtype)
    for config in conv.configurations(conv.Problem(n * h * w, k, 9, c, dtype), precision, 132):
        if config.split == 1:
            check(run_triton(args, config), args, "triton")


@needs_triton_on_a_gpu
def test_triton_launches_that_overlap_change_no_bit():
    x, weight, bias, skip = whole(inputs(1, 16, 64, 64, 16, torch.float16))
    x, skip, packed, bias = moved(
        "triton", nhwc(x), nhwc(skip), pack_deconv_triton(weight.sign(), x.dtype), bias.float()
    )

    def chain(overlap):
        sums = [torch.full_like(skip, float("nan")) for _ in range(20)]
        for before, out in zip([skip, *sums], sums, strict=False):
            deconv_add_triton(x, packed, bias, before, out, overlap=overlap)
        return sums[-1]

    expected = chain(False)
    assert expected.isfinite().all()
    assert all(torch.equal(chain(True), expected) for _ in range(10))
