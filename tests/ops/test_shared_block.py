from __future__ import annotations

import contextlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    BACKENDS,
    CUDA_BACKENDS,
    CUDA_DTYPES,
    DTYPES,
    assert_as_exact,
    each_isa,
    far_apart,
    layouts,
    moved,
    needs_emulator,
    needs_native,
    needs_triton,
    needs_triton_on_a_gpu,
    nhwc,
    poisoned,
    random,
)
from test_conv_bn_act import (
    SMALL,
    SPLIT,
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
from shelfkern.ops import _backends as backends
from shelfkern.ops import _conv_triton as conv
from shelfkern.ops import conv_bn_act_reference, pack_conv, shared_block_native, shared_block_reference
from shelfkern.ops.shared_block import (
    CUDA_TILE_ROWS,
    cuda_shared_bytes,
    pack_block,
    shared_block_cuda,
    shared_block_triton,
    tile_rows,
)

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


def check(result, args, backend="reference", **options):
    """Compares with eager on the device of the backend's kernels, or for "reference" on the CPU."""
    assert result.dtype is args[0].dtype
    exact = shared_block_reference(*double(args), **options)
    # Where eager is exact by luck, one rounding of the largest value.
    floor = torch.finfo(result.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    eager = shared_block_reference(*moved(backend, *args), **options).cpu()
    assert_as_exact(result, exact, eager, floor)


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


# The CUDA kernel. Tiles of 16 columns, and of 4 to 12 rows: less than one, just one, and several with
# rests; channels of 64 and 128, of whole packs and not.
CUDA_SHAPES = [
    (1, 64, 9, 17),
    (2, 64, 15, 20),
    (1, 128, 5, 16),
    (1, 128, 9, 18),
    (2, 17, 5, 7),
    (1, 72, 3, 40),
    (3, 3, 4, 1),
    (1, 1, 1, 1),
]


def cuda_rows(c):
    return CUDA_TILE_ROWS[64 if c <= 64 else 128]


def run_cuda(backend, args, slope=0.01, skip=True, seed=0, storage=nhwc, **options):
    """The raw kernel into poisoned memory that is fenced, on inputs in the given storage."""
    if backend == "emulated":
        native.emulation.set_seed(seed)
    frame, out = fenced(poisoned(args[0].shape, args[0].dtype))
    x, out, *parameters = moved(backend, storage(args[0]), out, *args[1:])
    shared_block_cuda(x, pack_block(*parameters, x.dtype), out, slope, skip, backend, **options)
    if backend == "emulated":
        assert_only_within(frame, out)
    return out.cpu()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_is_the_reference(shape, dtype, backend):
    args = inputs(*shape, dtype)
    for rows in cuda_rows(shape[1]):
        check(run_cuda(backend, args, rows=rows), args, slope=0.01, skip=True)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("slope", SLOPES)
def test_cuda_every_slope(slope, skip, backend):
    args = inputs(1, 19, 5, 8, torch.float16)
    check(run_cuda(backend, args, slope, skip), args, slope=slope, skip=skip)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_rounds_whole_numbers_twice(shape, dtype, backend):
    # Every sum is exact: no wrong fragment, border or tap goes unseen.
    args = whole_inputs(*shape, dtype=dtype)
    result = run_cuda(backend, args, 0.25, blocks=2, seed=1)
    assert torch.equal(result, stepwise(*args, 0.25, True))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("c", [64, 128])
def test_cuda_repeats_bit_for_bit(c, backend):
    args = inputs(1, c, 9, 18, torch.bfloat16)
    first = run_cuda(backend, args, rows=8)
    for blocks, rows in ((1, 8), (3, 8), (5, 4), (None, None)):
        assert torch.equal(run_cuda(backend, args, seed=7, rows=rows, blocks=blocks), first)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("c", [16, 19, 80])
def test_cuda_takes_windows_and_unaligned_memory(c, backend):
    args = inputs(2, c, 5, 9, torch.float16)
    expected = run_cuda(backend, args)

    def unaligned(x):
        return torch.cat([torch.zeros(1, dtype=x.dtype), nhwc(x).permute(0, 2, 3, 1).flatten()])[
            1:
        ].as_strided(x.shape, nhwc(x).stride())

    for storage in (unaligned, lambda x: framed(x, float("nan"))[1]):
        assert torch.equal(run_cuda(backend, args, storage=storage), expected)


@needs_emulator
def test_cuda_takes_images_far_apart():
    args = inputs(2, 16, 3, 5, torch.float16)
    with far_apart(args[0].shape, torch.float16) as x, far_apart(args[0].shape, torch.float16) as out:
        x.copy_(args[0])
        shared_block_cuda(x, pack_block(*args[1:], x.dtype), out, 0.01, True, "emulated")
        check(out, args, slope=0.01, skip=True)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cuda_keeps_what_is_not_finite(value, backend):
    args = whole_inputs(1, 9, 6, 20, dtype=torch.float16)
    args[0][0, 3, 2, 15] = value
    same_non_finite(run_cuda_unfenced(backend, args), stepwise(*args, 0.25, True))


def run_cuda_unfenced(backend, args):
    x, *parameters = moved(backend, nhwc(args[0]), *args[1:])
    out = torch.empty_like(x)
    shared_block_cuda(x, pack_block(*parameters, x.dtype), out, 0.25, True, backend)
    return out.cpu()


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_public_op(backend):
    args = inputs(2, 24, 5, 7, torch.bfloat16)
    for name, x in layouts(args[0]):
        x, *parameters = moved(backend, x, *args[1:])
        result = ops.shared_block(x, *parameters, slope=0.01, skip=True, backend=backend).cpu()
        check(result, args, slope=0.01, skip=True), name
    assert ops.shared_block(x[:0], *parameters, backend=backend).shape == (0, 24, 5, 7)


@needs_emulator
@pytest.mark.parametrize("change, message", [
    (dict(dtype=torch.float32), "x is torch.float32, the emulated kernel takes bfloat16 and float16"),
    (dict(c=129), "x has 129 channels, the emulated kernel takes 1 to 128"),
])  # fmt: skip
def test_cuda_says_why_not(change, message):
    args = inputs(1, change.get("c", 8), 3, 3, change.get("dtype", torch.float16))
    with pytest.raises(
        RuntimeError, match=f"^shared_block: backend is 'emulated', which cannot run: {message}$"
    ):
        ops.shared_block(*args, backend="emulated")


@needs_emulator
@pytest.mark.parametrize("c", [64, 128])
def test_cuda_reads_shared_memory_without_bank_conflicts(c):
    native.emulation.reset_statistics()
    run_cuda("emulated", inputs(1, c, 9, 17, torch.float16), rows=4)
    counts = native.emulation.statistics()
    assert counts["launches"] == 1 and counts["bank_conflicts"] == 0
    # Six tiles, of 6 x 18 and 4 x 16 pixels: 7 and 4 rows of matrices, and none for what nobody reads.
    assert counts["mma"] == 6 * (7 + 4) * (c // 8) * (c // 16) * 9
    assert counts["global_bytes_written"] == 9 * 17 * c * 2


@needs_emulator
@pytest.mark.parametrize("c, rows", [(64, 12), (64, 8), (64, 4), (65, 8), (128, 4)])
def test_cuda_shared_memory(c, rows):
    native.emulation.reset_statistics()
    run_cuda("emulated", inputs(1, c, 3, 3, torch.float16), rows=rows)
    assert native.emulation.statistics()["shared_bytes"] == cuda_shared_bytes(c, rows) <= 163 * 1024


@needs_emulator
def test_tiles_fit_a_smaller_gpu(monkeypatch):
    assert tile_rows((8, 64, 256, 512), 132, cuda_shared_bytes(64, 8)) == 8
    monkeypatch.setattr(backends, "shared_bytes", lambda x: 99 * 1024)
    message = "the emulated kernel needs 108032 bytes of shared memory, x's GPU has fewer for a block"
    x = torch.zeros(1, 64, 3, 3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=message):
        ops.shared_block(x, *inputs(1, 64, 3, 3, torch.float16)[1:], backend="emulated")


def test_tiles_are_large_unless_that_leaves_multiprocessors_idle():
    assert tile_rows((1, 64, 128, 128), 132) == 8  # 128 tiles in one wave
    assert tile_rows((8, 64, 256, 512), 132) == 12
    assert tile_rows((1, 64, 64, 64), 132) == 4
    assert tile_rows((1, 128, 64, 64), 132) == 4
    assert tile_rows((8, 128, 128, 256), 132) == 8


# The Triton kernels: two launches, with what lies between in memory. Windows with NaN around them are read,
# and poisoned ones written.
def run_triton(args, slope=0.25, skip=True, config=None, **options):
    """The raw kernels on a reference's arguments."""
    x, (weight, *affine) = windows(args[0])[0], moved("triton", *args[1:])
    packed = walled(conv.pack_weight(weight, x.dtype, conv.default_precision(x.dtype)))
    affine = [walled(t.float()) for t in affine]
    with written(x.shape, x.dtype) as hidden, written(x.shape, x.dtype) as out:
        shared_block_triton(x, packed, *affine, hidden, out, slope, skip, config, **options)
    return out.cpu()


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 24, 6, 10), (3, 17, 5, 7), (1, 17, 1, 9), (1, 1, 1, 1), (1, 130, 4, 3)]
)
def test_triton_is_the_reference(shape, dtype):
    args, options = inputs(*shape, dtype), dict(slope=0.01, skip=True)
    check(run_triton(args, **options), args, "triton", **options)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", conv.CONFIGS)
def test_triton_rounds_whole_numbers_twice(config, dtype):
    args = whole_inputs(2, 19, 5, 7, dtype=dtype)
    assert torch.equal(run_triton(args, config=config), stepwise(*args, 0.25, True))


@needs_triton
@pytest.mark.parametrize("config", conv.SMALL_CONFIGS)
def test_triton_is_exact_on_whole_numbers(config):
    args = whole_inputs(2, 19, 5, 7)
    result = run_triton(args, config=config, precision="ieee")
    assert torch.equal(result, stepwise(*args, 0.25, True))


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.25, None])
def test_triton_every_slope(slope, skip, config):
    args = whole_inputs(1, 19, 5, 8, dtype=torch.float16)
    assert torch.equal(run_triton(args, slope, skip, config), stepwise(*args, slope, skip))


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_triton_repeats_bit_for_bit(config):
    args = inputs(1, 40, 4, 5, torch.bfloat16)
    first = run_triton(args, config=config)
    assert all(torch.equal(run_triton(args, config=config), first) for _ in range(2))


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_triton_keeps_what_is_not_finite(value, dtype):
    args = whole_inputs(1, 9, 6, 20, dtype=dtype)
    args[0][0, 3, 2, 15] = value
    same_non_finite(run_triton(args, config=SMALL), stepwise(*args, 0.25, True))


@needs_triton
def test_triton_takes_images_far_apart():
    args = whole_inputs(2, 9, 3, 4, dtype=torch.float16)
    device = moved("triton", args[0])[0].device
    with contextlib.ExitStack() as stack:
        x, hidden, out = (
            stack.enter_context(far_apart(args[0].shape, torch.float16, device)) for _ in range(3)
        )
        weight, *affine = moved(
            "triton", conv.pack_weight(args[1], x.dtype), *map(torch.Tensor.float, args[2:])
        )
        shared_block_triton(x.copy_(args[0]), weight, *affine, hidden, out, 0.25, True, SMALL)
        assert torch.equal(out.cpu(), stepwise(*args, 0.25, True))


@needs_triton
@given(
    n=st.integers(1, 3), c=st.one_of(st.integers(1, 35), st.sampled_from([64, 65])), h=st.integers(1, 6),
    w=st.integers(1, 20), slope=st.sampled_from([0.0, 0.25, None]), skip=st.booleans(),
    dtype=st.sampled_from(CUDA_DTYPES), config=st.sampled_from([None, SMALL, SPLIT]),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
def test_triton_on_what_hypothesis_draws(n, c, h, w, slope, skip, dtype, config):
    args = whole_inputs(n, c, h, w, dtype=dtype)
    # Where the hidden sums need more bits than TF32 has.
    result = run_triton(args, slope, skip, config, precision="ieee")
    assert torch.equal(result, stepwise(*args, slope, skip))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_public_op(dtype):
    args = whole_inputs(2, 12, 3, 5, dtype=dtype)
    expected, options = stepwise(*args, 0.25, True), dict(slope=0.25, skip=True, backend="triton")
    for name, x in layouts(args[0]):
        result = ops.shared_block(*moved("triton", x, *args[1:]), **options)
        assert torch.equal(result.cpu(), expected), name
        assert result.is_contiguous(memory_format=torch.channels_last)
    x, *rest = moved("triton", *args)
    for part in (x[:1, :, :1, :1], x[:, :1, :, :1]):
        expanded = part.expand(2, 12, 3, 5)
        expected = stepwise(expanded.cpu(), *args[1:], 0.25, True)
        assert torch.equal(ops.shared_block(expanded, *rest, **options).cpu(), expected)
    for none in (x[:0], x[:, :, :0]):
        assert ops.shared_block(none, *rest, **options).shape == none.shape
    with torch.autocast(x.device.type, dtype):
        result = ops.shared_block(x, *map(torch.Tensor.float, rest), **options)
    assert torch.equal(result.cpu(), stepwise(*args, 0.25, True))


@needs_triton
def test_triton_refuses_to_lose_a_gradient():
    for needing in range(6):
        args = moved("triton", *inputs(1, 2, 2, 3))
        args[needing].requires_grad_()
        with pytest.raises(RuntimeError, match="requires grad, and the triton kernel has no gradient"):
            ops.shared_block(*args, backend="triton")
        with torch.no_grad():
            ops.shared_block(*args, backend="triton")


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2)])
def test_triton_opcheck(shape):
    args = moved("triton", *inputs(*shape))
    torch.library.opcheck(torch.ops.shelfkern.shared_block.default, (*args, 0.01, True, "triton"))


@needs_triton
def test_triton_compile_and_export():
    args = tuple(moved("triton", *inputs(2, 8, 5, 4)))
    expected = ops.shared_block(*args, skip=True, backend="triton")
    compiled = torch.compile(
        lambda *args: ops.shared_block(*args, skip=True, backend="triton") * 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(*args), expected)

    class Block(nn.Module):
        def forward(self, *args):
            return ops.shared_block(*args, skip=True, backend="triton")

    program = torch.export.export(Block(), args)
    assert "shelfkern.shared_block" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


@needs_triton_on_a_gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 128, 128), (1, 128, 64, 64), (2, 256, 32, 32), (1, 512, 16, 16)])
def test_triton_is_as_exact_as_cudnn(shape, dtype, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", precision)
    n, c, h, w = shape
    args, options = inputs(*shape, dtype), dict(slope=0.01, skip=True)
    for config in conv.configurations(conv.Problem(n * h * w, c, 9, c, dtype), precision, 132):
        check(run_triton(args, **options, config=config), args, "triton", **options)


@needs_triton_on_a_gpu
@pytest.mark.parametrize("config", [None, SPLIT])
def test_triton_launches_that_overlap_change_no_bit(config):
    args = inputs(2, 64, 32, 32, torch.float16)
    expected = run_triton(args, config=config)
    assert all(torch.equal(run_triton(args, config=config, overlap=True), expected) for _ in range(20))
