from __future__ import annotations

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
    nhwc,
    poisoned,
    random,
)

from shelfkern import native, ops
from shelfkern.ops import attention_gate_reference
from shelfkern.ops.attention_gate import attention_gate_cuda, pixel_slices

SHAPES = [
    (1, 64, 8, 16, 64),
    (2, 128, 4, 4, 32),
    (3, 19, 5, 7, 3),
    (1, 1, 1, 1, 1),
    (1, 13, 1, 300, 5),
    (0, 8, 3, 3, 8),
]


def arguments(n, c, h, w, k, dtype=torch.float32):
    x = random(n, c, h, w, dtype=dtype) + 0.5
    return x, random(k, c, seed=1), random(k, seed=2), random(k, seed=3)


def check(result, *args):
    exact = attention_gate_reference(*(t.double() for t in args))
    # The sigmoid's argument has errors of a few roundings of |w| @ |mean|: a gate is below 1.
    assert_as_exact(result, exact, attention_gate_reference(*args), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, dtype, backend):
    args = arguments(*shape, dtype)
    result = ops.attention_gate(*args, backend=backend)
    assert result.dtype is torch.float32 and result.shape == (shape[0], shape[4])
    check(result, *args)


def test_large_maps_keep_their_mean():
    # A float32 running sum over a million pixels would lose three digits.
    x = torch.full((1, 3, 1024, 1024), 0.1)
    args = x, torch.eye(3), torch.full((3,), 10.0), torch.full((3,), -1.0)
    expected = torch.sigmoid(10 * x[0, 0, 0, 0].double() - 1)
    assert (ops.attention_gate(*args).double() - expected).abs().max() < 1e-6


@needs_native
@given(
    n=st.integers(0, 3), c=st.integers(1, 70), h=st.integers(1, 40), w=st.integers(1, 20),
    k=st.integers(1, 40), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_isa_and_number_of_threads(n, c, h, w, k, dtype, threads):
    x, weight, scale, shift = arguments(n, c, h, w, k, dtype)
    x = nhwc(x)

    def run(isa):
        results = []
        for count in (1, threads):
            out = poisoned((n, k), torch.float32)
            native.module.attention_gate(
                x.data_ptr(), weight.data_ptr(), scale.data_ptr(), shift.data_ptr(), out.data_ptr(),
                native.DTYPE_CODES[dtype], n, h * w, c, k, count, 1.0, 0.0,
            )  # fmt: skip
            results.append(out)
        assert torch.equal(*results)
        check(results[0], x, weight, scale, shift)

    each_isa(run)


@needs_native
def test_any_strides():
    x, weight, scale, shift = arguments(2, 12, 3, 5, 7)
    expected = ops.attention_gate(x, weight, scale, shift)
    for name, x_layout in layouts(x):
        result = ops.attention_gate(
            x_layout, weight.T.contiguous().T, torch.stack([scale, shift], 1)[:, 0], shift, backend="native"
        )
        assert torch.equal(result, expected), name
    halves = (t.bfloat16() for t in (weight, scale, shift))
    assert ops.attention_gate(x.bfloat16(), *halves, backend="native").isfinite().all()


def test_gradient():
    args = [t.double().requires_grad_() for t in arguments(2, 3, 2, 3, 4)]
    torch.autograd.gradcheck(ops.attention_gate, args)


@needs_native
def test_native_refuses_to_lose_a_gradient():
    for needing in range(4):
        args = [t.requires_grad_(i == needing) for i, t in enumerate(arguments(1, 3, 2, 2, 2))]
        assert ops.attention_gate(*args).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.attention_gate(*args, backend="native")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(1, 3)), ValueError, "x is"),
        (dict(w=torch.zeros(4, 2)), ValueError, r"w is \(4, 2\).*needs \(K, 3\)"),
        (dict(w=torch.zeros(4, 3, device="meta")), ValueError, "w is on meta"),
        (dict(scale=torch.zeros(3)), ValueError, r"scale is \(3,\)"),
        (dict(scale=torch.zeros(4, device="meta")), ValueError, "scale is on meta"),
        (dict(shift=torch.zeros(4, 1)), ValueError, r"shift is \(4, 1\)"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(
        x=torch.zeros(1, 3, 2, 2), w=torch.zeros(4, 3), scale=torch.zeros(4), shift=torch.zeros(4)
    )
    with pytest.raises(error, match=f"^attention_gate: {message}"):
        ops.attention_gate(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 2, 2, 4), (1, 1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(torch.ops.shelfkern.attention_gate.default, (*arguments(*shape), "native"))


@needs_native
def test_compile_and_export():
    args = arguments(2, 8, 3, 4, 5)
    expected = ops.attention_gate(*args)
    compiled = torch.compile(lambda *args: ops.attention_gate(*args) * 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), expected)

    class Gate(torch.nn.Module):
        def forward(self, *args):
            return ops.attention_gate(*args)

    program = torch.export.export(Gate(), args)
    assert "shelfkern.attention_gate" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


# The CUDA kernels. Channels of whole 16-byte loads and not, of one block and several, more than are summed
# at a time; pixels for one step of a block and for several.
CUDA_SHAPES = [
    *SHAPES,
    (1, 64, 16, 32, 64),
    (2, 65, 3, 11, 13),
    (1, 7, 13, 17, 65),
    (1, 264, 2, 3, 9),
    (1, 259, 1, 1, 3),
    (3, 128, 1, 1, 1),
]


@pytest.fixture
def memory_starts_as_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def run_cuda(backend, args, storage=nhwc, seed=0, slices=None):
    """The raw kernels on x in the given storage, into poisoned memory with a fence."""
    if backend == "emulated":
        native.emulation.set_seed(seed)
    x, *parameters = moved(backend, args[0], *args[1:])
    n, k = x.shape[0], parameters[0].shape[0]
    (memory,) = moved(backend, poisoned((n * k + 20,), torch.float32))
    out = memory[10:-10].view(n, k)
    attention_gate_cuda(storage(x), *parameters, out, backend, slices)
    assert memory[:10].isnan().all() and memory[-10:].isnan().all()
    return out.cpu()


@pytest.mark.usefixtures("memory_starts_as_nan")
@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_is_the_reference(shape, dtype, backend):
    args = arguments(*shape, dtype)
    for slices in (None, 1, 3):
        check(run_cuda(backend, args, slices=slices), *args)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("c", [65, 128])
def test_cuda_repeats_bit_for_bit(c, backend):
    args = arguments(2, c, 9, 14, 10, torch.bfloat16)
    first = run_cuda(backend, args, slices=11)
    for seed in range(1, 4):
        assert torch.equal(run_cuda(backend, args, seed=seed, slices=11), first)


def window(x):
    """x inside larger rows, images and pixels, with NaN around it."""
    n, c, h, w = x.shape
    memory = torch.full((n + 1, h + 2, w + 1, c + 24), torch.nan, dtype=x.dtype, device=x.device)
    return memory[1:, 1:-1, 1:, 8:-16].permute(0, 3, 1, 2).copy_(x)


def unaligned(x):
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].as_strided(x.shape, nhwc(x).stride(), 1).copy_(x)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("c", [13, 16])
@pytest.mark.parametrize("storage", [window, unaligned])
def test_cuda_takes_windows_and_unaligned_memory(storage, c, dtype, backend):
    args = arguments(2, c, 5, 9, 6, dtype)
    check(run_cuda(backend, args, storage), *args)


@needs_emulator
def test_cuda_takes_images_far_apart():
    args = arguments(3, 8, 2, 3, 5, torch.float16)
    with far_apart(args[0].shape, torch.float16) as x:
        check(run_cuda("emulated", args, lambda values: x.copy_(values)), *args)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_keeps_the_mean_of_a_large_map(backend):
    # 2048 equal numbers for a thread: a running float32 sum of them would be off by 1e-5 of its value.
    args = torch.full((1, 1, 128, 128), 0.1), torch.ones(1, 1), torch.full((1,), 10.0), torch.full((1,), -1.0)
    result = run_cuda(backend, args, slices=1)
    assert abs(result.item() - torch.sigmoid(10 * args[0][0, 0, 0, 0].double() - 1).item()) < 3e-7


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cuda_keeps_what_is_not_finite(value, backend):
    x, weight, scale, shift = arguments(2, 8, 7, 9, 4)
    x[0, 3, 5, 2] = value
    args = x, weight, scale.abs(), shift
    torch.testing.assert_close(
        run_cuda(backend, args), attention_gate_reference(*args), equal_nan=True, rtol=1e-6, atol=1e-6
    )


@needs_emulator
def test_cuda_refuses_more_pixels_than_it_can_count():
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)
    with pytest.raises(RuntimeError, match=r"^attention_gate: x has 2147483648 pixels an image, it may"):
        run_cuda("emulated", (x, *arguments(1, 1, 1, 1, 1)[1:]), storage=lambda x: x)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_public_op(backend):
    args = arguments(2, 12, 3, 5, 7, torch.bfloat16)
    for _, x in layouts(args[0]):
        x, *parameters = moved(backend, x, *args[1:])
        check(ops.attention_gate(x, *parameters, backend=backend).cpu(), *args)
    assert ops.attention_gate(x[:0], *parameters, backend=backend).shape == (0, 7)


@needs_emulator
def test_cuda_reads_every_pixel_once():
    native.emulation.reset_statistics()
    run_cuda("emulated", arguments(1, 64, 16, 32, 64, torch.bfloat16))
    counts = native.emulation.statistics()
    assert counts["launches"] == 2
    # x once; sums of 16 slices, written and then read by the 8 blocks of 8 outputs.
    assert counts["global_bytes_read"] == 64 * 16 * 32 * 2 + 8 * 16 * 64 * 4
    assert counts["global_bytes_written"] == 16 * 64 * 4 + 64 * 4


@pytest.mark.parametrize(
    "shape, slices",
    [
        ((1, 64, 64, 128), 132),  # one block a multiprocessor
        ((1, 128, 32, 64), 64),
        ((1, 512, 8, 8), 2),  # 32 pixels for each
        ((8, 512, 64, 64), 2),
        ((64, 512, 64, 64), 1),  # more images than multiprocessors
        ((0, 64, 8, 8), 2),
        ((1, 64, 1, 1), 1),
    ],
)
def test_slices_fill_the_gpu(shape, slices):
    assert pixel_slices(torch.empty(shape, dtype=torch.bfloat16)) == slices
