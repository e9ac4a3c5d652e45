from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import BACKENDS, DTYPES, assert_as_exact, each_isa, layouts, needs_native, poisoned, random
from test_conv_bn_act import (
    assert_no_bit_changes,
    assert_only_within,
    double,
    fenced,
    same_non_finite,
    whole,
    with_threads,
)
from torch import nn

from shelfkern import native, ops
from shelfkern.ops import conv_bn_act_reference, pack_conv, shared_block_native, shared_block_reference

SHAPES = [(1, 24, 6, 10), (2, 17, 5, 7), (1, 17, 1, 9), (2, 3, 4, 1), (1, 1, 1, 1), (1, 16, 12, 80)]
LONG = [(2, 33, 5, 7), (1, 64, 12, 12), (1, 128, 8, 8), (1, 257, 4, 3), (1, 512, 8, 8)]
WIDE = [(1, 3, 9, 2000), (1, 33, 5, 700), (1, 130, 3, 450)]
SLOPES = [0.0, 0.01, None]


def inputs(n, c, h, w, dtype=torch.float32):
    """x, w, scale1, shift1, scale2, shift2."""
    weight = random(c, c, 3, 3, seed=1) / (9 * c) ** 0.5
    affine = [random(c, seed=seed, dtype=dtype) for seed in (2, 3, 4, 5)]
    return random(n, c, h, w, dtype=dtype), weight.to(dtype), *affine


def whole_inputs(*shape, dtype=torch.float32):
    """Inputs for which every float32 sum is exact, in the second convolution too."""
    x, weight, *affine = whole(inputs(*shape, dtype))
    return x, weight.sign(), *affine


def stepwise(x, w, scale1, shift1, scale2, shift2, slope, skip):
    """The exact block, rounded to x's dtype where the kernels round: after either convolution."""
    exact_x, exact_w = x.double(), w.double()
    h = conv_bn_act_reference(exact_x, exact_w, scale1.double(), shift1.double(), padding=1, slope=slope)
    h, again = h.to(x.dtype).double(), exact_x if skip else None
    args = h, exact_w, scale2.double(), shift2.double(), exact_x, again
    return conv_bn_act_reference(*args, padding=1, slope=0.0).to(x.dtype)


def check(result, args, **options):
    assert result.dtype is args[0].dtype
    exact = shared_block_reference(*double(args), **options)
    # Where eager is exact by luck, one rounding of the largest value.
    floor = torch.finfo(result.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert_as_exact(result, exact, shared_block_reference(*args, **options), floor)


@pytest.mark.parametrize("skip", [False, True])
def test_the_reference_is_the_module(skip):
    convolution = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    norms = [nn.BatchNorm2d(3).double().eval() for _ in range(2)]
    for i, norm in enumerate(norms):
        for j, t in enumerate((norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var)):
            t.copy_(random(3, seed=4 * i + j).abs())
    x = random(2, 3, 5, 4).double()
    h = nn.LeakyReLU(0.01)(norms[0](convolution(x)))
    expected = torch.relu(norms[1](convolution(h)) + x) + (x if skip else 0)
    affine = []
    for norm in norms:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        affine += [scale, norm.bias - norm.running_mean * scale]
    result = shared_block_reference(x, convolution.weight, *affine, slope=0.01, skip=skip)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, skip, dtype, backend):
    args, options = inputs(*shape, dtype), dict(slope=0.01, skip=skip)
    result = ops.shared_block(*args, **options, backend=backend)
    check(result, args, **options)
    assert backend == "reference" or result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_every_slope(slope, dtype, backend):
    args = inputs(1, 19, 5, 8, dtype)
    check(ops.shared_block(*args, slope=slope, backend=backend), args, slope=slope)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("shape", SHAPES + LONG[:-1] + WIDE)
def test_whole_numbers_are_rounded_twice(shape, skip, dtype):
    args = whole_inputs(*shape, dtype=dtype)
    result = ops.shared_block(*args, slope=0.25, skip=skip, backend="native")
    assert torch.equal(result, stepwise(*args, 0.25, skip))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LONG)
def test_every_isa_is_as_exact(shape, dtype):
    args = inputs(*shape, dtype)
    each_isa(lambda isa: check(ops.shared_block(*args, skip=True, backend="native"), args, skip=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    args = inputs(0, 17, 3, 4)
    result = ops.shared_block(*args, skip=True, backend=backend)
    assert result.shape == (0, 17, 3, 4) and result.dtype is torch.float32


@pytest.mark.parametrize("shape", [(1, 3, 0, 4), (1, 3, 4, 0), (0, 3, 0, 0)])
def test_images_of_nothing(shape):
    assert ops.shared_block(*inputs(*shape)).shape == shape


@needs_native
@given(
    n=st.integers(1, 2), c=st.one_of(st.integers(1, 40), st.sampled_from([128, 129])), h=st.integers(1, 6),
    w=st.integers(1, 30), slope=st.sampled_from([0.0, 0.25, None]), skip=st.booleans(),
    dtype=st.sampled_from(DTYPES), count=st.sampled_from([1, 2, 5]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_isa_writes_all_of_the_output(n, c, h, w, slope, skip, dtype, count):
    args = whole_inputs(n, c, h, w, dtype=dtype)
    expected = stepwise(*args, slope, skip)
    x, packed = fenced(args[0])[1], pack_conv(args[1], padding=1)
    affine = [t.float() for t in args[2:]]

    def run(isa):
        (around_hidden, hidden), (around, out) = (fenced(poisoned((n, c, h, w), dtype)) for _ in range(2))
        shared_block_native(x, packed, *affine, hidden, out, slope, skip)
        assert torch.equal(out, expected), isa
        assert_only_within(around, out)
        assert_only_within(around_hidden, hidden)
        assert torch.equal(x, args[0])

    with_threads(count, lambda: each_isa(run))


@needs_native
def test_any_strides():
    x, weight, *affine = inputs(2, 12, 3, 5)
    expected = ops.shared_block(x, weight, *affine, skip=True)
    columns = torch.stack(affine, 1).unbind(1)
    weight = weight.transpose(0, 3).contiguous().transpose(0, 3)
    for name, layout in layouts(x):
        result = ops.shared_block(layout, weight, *columns, skip=True, backend="native")
        assert torch.equal(result, expected), name
        assert result.is_contiguous(memory_format=torch.channels_last)
    expanded = x[:1, :, :1, :1].expand(2, 12, 3, 5)
    assert torch.equal(
        ops.shared_block(expanded, weight, *affine, backend="native"),
        ops.shared_block(expanded.contiguous(), weight, *affine, backend="native"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_nan_and_inf_go_where_torch_sends_them(slope, dtype, backend):
    args = inputs(1, 18, 9, 20, dtype)
    x = args[0]
    x[0, 0, 1, 1], x[0, 17, 1, 9], x[0, 5, 7, 18] = float("nan"), float("inf"), -float("inf")
    result = ops.shared_block(*args, slope=slope, skip=True, backend=backend)
    same_non_finite(result, shared_block_reference(*double(args), slope=slope, skip=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 20, 23, 40), (1, 100, 3, 5)])
def test_threads_and_repeats_change_no_bit(shape, dtype):
    args = inputs(*shape, dtype)
    assert_no_bit_changes(lambda: ops.shared_block(*args, backend="native"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    args = inputs(1, 5, 3, 4, dtype)
    assert torch.equal(ops.shared_block(*args), shared_block_reference(*args))
    if native.why_not is None:
        with pytest.raises(RuntimeError, match=f"shared_block: .*{dtype}"):
            ops.shared_block(*args, backend="native")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient(backend):
    args = [t.double().requires_grad_() for t in inputs(1, 2, 3, 2)]
    torch.autograd.gradcheck(lambda *args: ops.shared_block(*args, slope=0.01, backend=backend), args)
    x, *rest = inputs(1, 2, 2, 3)
    assert ops.shared_block(x.requires_grad_(), *rest, backend=backend).requires_grad


@needs_native
def test_native_refuses_to_lose_a_gradient():
    for needing in range(6):
        args = [t.requires_grad_(i == needing) for i, t in enumerate(inputs(1, 2, 2, 3))]
        assert ops.shared_block(*args).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.shared_block(*args, backend="native")
        with torch.no_grad():
            ops.shared_block(*args, backend="native")


VALID = dict(
    x=torch.zeros(1, 2, 4, 3),
    w=torch.zeros(2, 2, 3, 3),
    scale1=torch.zeros(2),
    shift1=torch.zeros(2),
    scale2=torch.zeros(2),
    shift2=torch.zeros(2),
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=None), TypeError, "x is NoneType"),
        (dict(x=torch.zeros(2, 4, 3)), ValueError, r"x is \(2, 4, 3\)"),
        (dict(x=torch.zeros(1, 2, 4, 3, dtype=torch.uint8)), TypeError, "x is torch.uint8"),
        (dict(w=None), TypeError, "w is NoneType"),
        (dict(w=torch.zeros(3, 2, 3, 3)), ValueError, r"w is \(3, 2, 3, 3\).*needs \(2, 2, 3, 3\)"),
        (dict(w=torch.zeros(2, 2, 1, 1)), ValueError, r"w is \(2, 2, 1, 1\).*needs \(2, 2, 3, 3\)"),
        (dict(scale1=torch.zeros(3)), ValueError, r"scale1 is \(3,\).*needs \(2,\)"),
        (dict(shift1=torch.zeros(2, 1)), ValueError, r"shift1 is \(2, 1\).*needs \(2,\)"),
        (dict(scale2=torch.zeros(())), ValueError, r"scale2 is \(\).*needs \(2,\)"),
        (dict(shift2=None), TypeError, "shift2 is NoneType"),
        (dict(slope=2), ValueError, "slope is 2"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message, backend):
    with pytest.raises(error, match=f"^shared_block: {message}"):
        ops.shared_block(**{**VALID, "backend": backend, **change})


@pytest.mark.parametrize("name", list(VALID)[1:])
def test_refuses_parameters_of_other_devices(name):
    with pytest.raises(ValueError, match=f"^shared_block: {name} is on meta"):
        ops.shared_block(**{**VALID, name: VALID[name].to("meta")})


@needs_native
@pytest.mark.parametrize("op", ["conv_bn_act", "shared_block"])
def test_is_off_where_its_kernel_is(op, monkeypatch):
    args = inputs(1, 3, 4, 5)
    monkeypatch.setitem(native.disabled, ("native", op), "off for a test")
    assert torch.equal(ops.shared_block(*args), shared_block_reference(*args))
    with pytest.raises(RuntimeError, match="off for a test"):
        ops.shared_block(*args, backend="native")


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2), (1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(torch.ops.shelfkern.shared_block.default, (*inputs(*shape), 0.01, True, "native"))


@needs_native
def test_compile_and_export():
    args = inputs(2, 8, 5, 4)
    expected = ops.shared_block(*args, skip=True)
    compiled = torch.compile(
        lambda *args: ops.shared_block(*args, skip=True) * 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), expected)

    class Block(nn.Module):
        def forward(self, *args):
            return ops.shared_block(*args, skip=True)

    program = torch.export.export(Block(), args)
    assert "shelfkern.shared_block" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)
