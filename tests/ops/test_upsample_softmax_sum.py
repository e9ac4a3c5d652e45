from __future__ import annotations

import hypothesis.strategies as st
import numpy
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
    random,
)
from test_upsample_bilinear import CASES

from shelfkern import native, ops

VARIANTS = [dict(), dict(mirror=True), dict(exp=True), dict(mirror=True, exp=True, align_corners=False)]


def added(scores, size, crop, mirror=False, exp=False, align_corners=True):
    """What is added to out, in eager torch."""
    full = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=align_corners)
    full = full.flip(3) if mirror else full
    part = full[:, :, : crop[0], : crop[1]]
    return part.exp() if exp else part.softmax(1)


def fenced(out, pad=(1, 2, 3)):
    """A copy of out as a window of a larger tensor of NaN, and that tensor's other elements."""
    n, c, h, w = out.shape
    frame = torch.full((n + pad[0], c + pad[1], h + pad[2], w + 5), float("nan"), device=out.device)
    inside = torch.zeros_like(frame, dtype=torch.bool)
    corner = [slice(p, None) for p in pad] + [slice(2, 2 + w)]
    inside[tuple(corner)] = True
    window = frame[tuple(corner)]
    window.copy_(out)
    return window, lambda: frame[~inside]


def check(out, before, scores, size, **variant):
    args = size, out.shape[2:]
    truth = before.double() + added(scores.double(), *args, **variant)
    eager = before + added(scores.float(), *args, **variant)
    # Where eager is exact by luck: a source coordinate rounded in float32, then the sum once.
    eps = torch.finfo(torch.float32).eps
    moved = 4 * max(scores.shape[2:]) * float(scores.abs().max()) if scores.numel() else 0.0
    assert_as_exact(out, truth, eager, (1 + moved) * eps * float(truth.abs().max()) if truth.numel() else 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, size, crop", CASES)
def test_adds_to_out(shape, size, crop, variant, dtype, backend):
    scores, before = random(*shape, dtype=dtype), random(*shape[:2], *crop, seed=1)
    out, fence = fenced(before)
    assert ops.upsample_softmax_sum(scores, size, out, **variant, backend=backend) is None
    check(out, before, scores, size, **variant)
    assert fence().isnan().all()


def test_scales_and_mirror_images_give_the_labels_of_full_size_scores():
    size, out = (48, 64), torch.zeros(1, 7, 48, 64)
    whole = torch.zeros(1, 7, 48, 64, dtype=torch.float64)
    for h, w in [(4, 6), (6, 8), (9, 12)]:
        for mirror in (False, True):
            scores = random(1, 7, h, w, seed=h + mirror)
            ops.upsample_softmax_sum(scores, size, out, mirror=mirror)
            whole += added(scores.double(), size, size, mirror)
    torch.testing.assert_close(out.double(), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.sum(1), torch.full((1, 48, 64), 6.0), rtol=0, atol=1e-5)


def test_float64_stays_float64():
    scores = random(1, 3, 4, 5).double()
    out = torch.zeros(1, 3, 8, 10, dtype=torch.float64)
    ops.upsample_softmax_sum(scores, (8, 10), out)
    assert torch.equal(out, added(scores, (8, 10), (8, 10)))
    scores, out = random(1, 3, 4, 5, dtype=torch.float16), torch.zeros(1, 3, 8, 10)
    ops.upsample_softmax_sum(scores, (8, 10), out)
    assert torch.equal(out, added(scores.float(), (8, 10), (8, 10)))


@needs_native
@given(
    n=st.integers(0, 2), c=st.integers(1, 25), h=st.integers(1, 12), w=st.integers(1, 24),
    height=st.integers(1, 30), width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mirror=st.booleans(), exp=st.booleans(), align_corners=st.booleans(), dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_isa(n, c, h, w, height, width, keep, mirror, exp, align_corners, dtype, threads):
    scores = nhwc(random(n, c, h, w, dtype=dtype))
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))
    before = random(n, c, *crop, seed=1)
    variant = dict(mirror=mirror, exp=exp, align_corners=align_corners)

    def run(isa):
        out, fence = fenced(before)
        native.module.upsample_softmax_sum(
            scores.data_ptr(), out.data_ptr(), native.DTYPE_CODES[dtype], n, h, w, c, height, width, *crop,
            align_corners, threads, mirror, exp, *out.stride()[:3],
        )  # fmt: skip
        check(out, before, scores, (height, width), **variant)
        assert fence().isnan().all()

    each_isa(run)


def exponentials(x):
    """exp of every number of a 1-D tensor, by the op."""
    out = torch.zeros(1, 1, 1, len(x))
    # At its own size every number is resized to itself.
    ops.upsample_softmax_sum(x.view(out.shape), (1, len(x)), out, exp=True, backend="native")
    return out.flatten()


@needs_native
def test_exp_is_good_to_the_last_bit_but_one_on_every_isa():
    """Every 4096th float, and all around the ends of the range, in units in the last place."""
    bits = numpy.arange(0, 1 << 32, 4096, dtype=numpy.uint32).view(numpy.float32)
    ends = [numpy.linspace(end - 1e-3, end + 1e-3, 1000) for end in (-103.97208, -87.33654, 0.0, 88.72284)]
    x = numpy.concatenate([bits[numpy.isfinite(bits)], *ends]).astype(numpy.float32)
    with numpy.errstate(over="ignore"):
        exact = numpy.exp(x.astype(numpy.float64))
        infinite = numpy.isinf(exact.astype(numpy.float32))
    exponent = numpy.frexp(exact)[1]
    ulp = numpy.ldexp(1.0, numpy.maximum(exponent - 24, -149))

    def run(isa):
        found = exponentials(torch.from_numpy(x)).numpy()
        assert (numpy.isinf(found) == infinite).all() and (found >= 0).all()
        errors = numpy.abs(found.astype(numpy.float64)[~infinite] - exact[~infinite]) / ulp[~infinite]
        assert errors.max() < 1.1

    each_isa(run)


@needs_native
def test_exp_of_what_is_no_number_on_every_isa():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])

    def run(isa):
        # Of a pixel each: beside an infinity the weight 0 would give NaN, as it does in torch.
        found = torch.cat([exponentials(number) for number in x.split(1)])
        torch.testing.assert_close(found, added(x.view(5, 1, 1, 1), (1, 1), (1, 1), exp=True).flatten(),
                                   rtol=0, atol=0, equal_nan=True)  # fmt: skip

    each_isa(run)


def hostile():
    """Scores with infinities of both signs, alone and in all classes, and NaN."""
    scores = random(1, 3, 4, 5)
    scores[0, 0, 0, 0] = float("inf")
    scores[0, 1, 1, 3:] = -float("inf")
    scores[0, 1, 2, 3:] = -float("inf")
    scores[0, :, 3, 0] = -float("inf")
    scores[0, 2, 3, 4] = float("nan")
    return scores


@needs_native
@pytest.mark.parametrize("size", [(4, 5), (4, 9), (11, 5), (13, 17), (3, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinities_and_nan_as_in_torch_on_every_isa(variant, size):
    scores = hostile()

    def run(isa):
        out = torch.zeros(1, 3, *size)
        ops.upsample_softmax_sum(scores, size, out, **variant, backend="native")
        expected = added(scores, size, size, **variant)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6, equal_nan=True)

    each_isa(run)


# Beside small CASES: strips of several columns, few warps for many classes, and classes that do not fit
# in shared memory.
CUDA_CASES = [
    *CASES[2:],
    ((2, 21, 5, 6), (17, 140), (16, 131)),
    ((1, 200, 2, 70), (2, 70), (2, 67)),
    ((1, 400, 2, 70), (2, 70), (2, 67)),
]


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape, size, crop", CUDA_CASES)
def test_cuda_kernel(shape, size, crop, variant, dtype, backend):
    scores, before = random(*shape, dtype=dtype), random(*shape[:2], *crop, seed=1)
    given, start = moved(backend, scores, before)
    out, fence = fenced(start)
    ops.upsample_softmax_sum(given, size, out, **variant, backend=backend)
    check(out.cpu(), before, scores, size, **variant)
    assert fence().isnan().all()


@needs_emulator
@pytest.mark.parametrize("seed", range(3))
def test_cuda_kernel_in_any_order_of_threads(seed):
    scores, before = random(2, 13, 7, 9, seed=seed), random(2, 13, 5, 70, seed=seed + 1)
    native.emulation.set_seed(seed)
    out = before.clone()
    ops.upsample_softmax_sum(scores, (20, 70), out, backend="emulated")
    check(out, before, scores, (20, 70))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("size", [(13, 17), (11, 9), (3, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinities_and_nan_in_the_cuda_kernel(variant, size, backend):
    scores, out = moved(backend, hostile(), torch.zeros(1, 3, *size))
    ops.upsample_softmax_sum(scores, size, out, **variant, backend=backend)
    expected = added(hostile(), size, size, **variant)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("start", [0, 3])
def test_cuda_kernel_on_windows(start, backend):
    n, c, h, w = 2, 7, 4, 5
    scores = random(n, c, h, w)
    frame = torch.full((n, h + 2, w + 3, c + start + 2), float("nan")).permute(0, 3, 1, 2)
    frame[:, start : start + c, 1:-1, 2:-1] = scores
    frame, out = moved(backend, frame, torch.zeros(n, c, 16, 20))
    ops.upsample_softmax_sum(frame[:, start : start + c, 1:-1, 2:-1], (16, 20), out, backend=backend)
    check(out.cpu(), torch.zeros(n, c, 16, 20), scores, (16, 20))


@needs_emulator
def test_cuda_kernel_on_images_far_apart():
    scores, before = random(3, 1, 3, 2), random(3, 1, 9, 8, seed=1)
    with far_apart(scores.shape, scores.dtype) as far, far_apart(before.shape, before.dtype) as out:
        ops.upsample_softmax_sum(far.copy_(scores), (9, 8), out.copy_(before), exp=True, backend="emulated")
        check(out.clone(), before, scores, (9, 8), exp=True)


@needs_native
def test_any_strides_of_scores():
    scores = random(2, 5, 6, 7)
    expected = torch.zeros(2, 5, 24, 30)
    ops.upsample_softmax_sum(scores, (24, 30), expected, backend="native")
    for name, layout in layouts(scores):
        out = torch.zeros(2, 5, 24, 30)
        ops.upsample_softmax_sum(layout, (24, 30), out, backend="native")
        assert torch.equal(out, expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_order_of_images_classes_and_rows(backend):
    scores, expected = random(2, 3, 4, 5), torch.zeros(2, 3, 8, 10)
    ops.upsample_softmax_sum(scores, (9, 10), expected, backend=backend)
    for order in [(1, 0, 2, 3), (2, 1, 0, 3), (0, 2, 1, 3)]:
        out = expected.permute(order).contiguous().zero_().permute(order)
        ops.upsample_softmax_sum(scores, (9, 10), out, backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_be_the_memory_of_the_scores(backend):
    whole = random(1, 1, 9, 12)
    expected = whole.clone()
    ops.upsample_softmax_sum(whole.clone(), (9, 12), expected, mirror=True, exp=True, backend=backend)
    ops.upsample_softmax_sum(whole, (9, 12), whole, mirror=True, exp=True, backend=backend)
    assert torch.equal(whole, expected)


def test_gradient():
    scores, before = random(1, 3, 3, 4).double().requires_grad_(), random(1, 3, 5, 7).double()

    def add(scores, before, exp):
        out = before.clone()
        ops.upsample_softmax_sum(scores, (6, 8), out, mirror=True, exp=exp)
        return out

    for exp in (False, True):
        torch.autograd.gradcheck(add, (scores, before.requires_grad_(), exp))


@needs_native
def test_native_refuses_to_lose_a_gradient():
    scores = random(1, 2, 3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="grad"):
        ops.upsample_softmax_sum(scores, (6, 8), torch.zeros(1, 2, 6, 8), backend="native")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(scores=torch.zeros(2, 3, 4)), ValueError, "scores is"),
        (dict(scores=torch.zeros(1, 2, 3, 4, dtype=torch.uint8)), TypeError, "scores is torch.uint8"),
        (dict(size=(0, 8)), ValueError, r"size is \(0, 8\)"),
        (dict(out=None), TypeError, "out is NoneType"),
        (dict(out=torch.zeros(1, 2, 8)), ValueError, "out is"),
        (dict(out=torch.zeros(1, 3, 8, 8)), ValueError, r"out is \(1, 3, 8, 8\), scores of"),
        (dict(out=torch.zeros(1, 2, 9, 8)), ValueError, r"out is \(1, 2, 9, 8\), .* 1 to 8 rows"),
        (dict(out=torch.zeros(1, 2, 8, 0)), ValueError, r"out is \(1, 2, 8, 0\)"),
        (dict(out=torch.zeros(1, 2, 8, 8).bfloat16()), TypeError, "out is torch.bfloat16, .* torch.float32"),
        (dict(out=torch.zeros(1, 2, 8, 8).double()), TypeError, "out is torch.float64, .* torch.float32"),
        (dict(out=torch.zeros(1, 2, 8, 8).mT), ValueError, "out has stride 8 between columns"),
        (dict(out=torch.zeros(1, 2, 8, 16)[..., ::2]), ValueError, "out has stride 2 between columns"),
        (dict(out=torch.zeros(1, 1, 8, 8).expand(1, 2, 8, 8)), ValueError, "out has strides"),
        (dict(out=torch.zeros(99).as_strided((1, 2, 8, 8), (0, 32, 4, 1))), ValueError, "out has strides"),
        (dict(out=torch.zeros(1, 2, 8, 8, device="meta")), ValueError, "out is on meta"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(scores=torch.zeros(1, 2, 3, 4), size=(8, 8), out=torch.zeros(1, 2, 8, 8))
    with pytest.raises(error, match=f"^upsample_softmax_sum: {message}"):
        ops.upsample_softmax_sum(**{**arguments, **change})
    assert (arguments["out"] == 0).all()


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2), (1, 1, 1, 1)])
def test_opcheck(shape):
    out = torch.zeros(*shape[:2], 15, 20)
    torch.library.opcheck(
        torch.ops.shelfkern.upsample_softmax_sum.default,
        (random(*shape), [16, 24], out, True, False, True, "native"),
    )


@needs_native
def test_compile_and_export():
    scores, expected = random(2, 8, 3, 4), torch.ones(2, 8, 23, 32)
    ops.upsample_softmax_sum(scores, (24, 32), expected)

    def total(scores):
        out = scores.new_ones(2, 8, 23, 32)
        ops.upsample_softmax_sum(scores, (24, 32), out)
        return out

    assert torch.equal(torch.compile(total, fullgraph=True, backend="aot_eager")(scores), expected)

    class Total(torch.nn.Module):
        def forward(self, scores):
            return total(scores)

    program = torch.export.export(Total(), (scores,))
    assert "shelfkern.upsample_softmax_sum" in str(program.graph)
    assert torch.equal(program.module()(scores), expected)
