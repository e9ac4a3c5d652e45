from __future__ import annotations

import contextlib
import functools

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
from test_conv_bn_act import same_non_finite, windows

from shelfkern import native, ops
from shelfkern.ops.upsample_bilinear import upsample_bilinear_backward_triton, upsample_bilinear_triton

# n, classes, h, w -> full size, crop
CASES = [
    ((1, 19, 8, 16), (64, 128), (64, 128)),
    ((2, 11, 12, 10), (96, 80), (90, 77)),
    ((1, 5, 7, 9), (14, 18), (13, 18)),
    ((3, 4, 1, 1), (5, 9), (5, 9)),
    ((1, 3, 1, 8), (16, 1), (16, 1)),
    ((1, 3, 6, 1), (1, 40), (1, 33)),
    ((1, 2, 20, 30), (7, 11), (7, 11)),
    ((1, 2, 5, 40), (5, 40), (4, 39)),
    ((1, 2, 3, 4), (11, 301), (11, 301)),
    ((0, 3, 4, 4), (8, 8), (8, 8)),
]


def truth(scores, size, crop, align_corners):
    full = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=align_corners)
    return full[:, :, : crop[0], : crop[1]]


def check(result, scores, size, crop, align_corners):
    assert result.dtype is scores.dtype
    # Where eager is exact by luck: a source coordinate rounded in float32, and the result once.
    coordinate = torch.finfo(torch.float32).eps * max(scores.shape[2:])
    largest = float(scores.abs().max()) if scores.numel() else 0.0
    floor = (torch.finfo(scores.dtype).eps + 4 * coordinate) * largest
    args = size, crop, align_corners
    assert_as_exact(result, truth(scores.double(), *args), truth(scores, *args), floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape, size, crop", CASES)
def test_is_interpolate(shape, size, crop, align_corners, dtype, backend):
    scores = random(*shape, dtype=dtype)
    result = ops.upsample_bilinear(scores, size, crop, align_corners, backend=backend)
    check(result, scores, size, crop, align_corners)


sizes = st.integers(1, 40)


@needs_native
@given(
    n=st.integers(0, 2), c=st.integers(1, 20), h=st.integers(1, 12), w=st.integers(1, 24), height=sizes,
    width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)), align_corners=st.booleans(),
    dtype=st.sampled_from(DTYPES), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_isa_writes_all_of_the_output(n, c, h, w, height, width, keep, align_corners, dtype, threads):
    scores = nhwc(random(n, c, h, w, dtype=dtype))
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))

    def run(isa):
        out = poisoned((n, c, *crop), dtype)
        native.module.upsample_bilinear(
            scores.data_ptr(), out.data_ptr(), native.DTYPE_CODES[dtype], n, h, w, c, height, width, *crop,
            align_corners, threads,
        )  # fmt: skip
        check(out, scores, (height, width), crop, align_corners)

    each_isa(run)


@needs_native
def test_any_strides():
    scores = random(2, 5, 6, 7)
    expected = ops.upsample_bilinear(scores, (24, 30))
    for name, layout in layouts(scores):
        result = ops.upsample_bilinear(layout, (24, 30), backend="native")
        assert torch.equal(result, expected) and result.is_contiguous(), name
    expanded = scores[:1, :1].expand(2, 5, 6, 7)
    assert torch.equal(
        ops.upsample_bilinear(expanded, (24, 30), backend="native"),
        ops.upsample_bilinear(expanded.contiguous(), (24, 30), backend="native"),
    )


def test_a_crop_is_the_corner_of_the_whole():
    scores = random(1, 4, 6, 9)
    for backend in ("auto", "reference"):
        whole = ops.upsample_bilinear(scores, (48, 72), backend=backend)
        part = ops.upsample_bilinear(scores, (48, 72), (41, 37), backend=backend)
        assert torch.equal(part, whole[:, :, :41, :37])


def gradient_of_truth(gradient, shape, size, align_corners):
    """What autograd gives of torch's own resize, for the gradient of its crop."""
    scores = gradient.new_zeros(shape, requires_grad=True)
    truth(scores, size, gradient.shape[2:], align_corners).backward(gradient)
    return scores.grad


def check_gradient(result, gradient, shape, size, align_corners):
    assert result.dtype is gradient.dtype
    args = shape, size, align_corners
    exact = gradient_of_truth(gradient.double(), *args)
    # Where eager is exact by luck, as in check: weights hang on coordinates rounded in float32.
    coordinate = torch.finfo(torch.float32).eps * max(shape[2:])
    reached = gradient_of_truth(gradient.double().abs(), *args)
    largest = float(reached.max()) if reached.numel() else 0.0
    floor = (torch.finfo(gradient.dtype).eps + 4 * coordinate) * largest
    assert_as_exact(result, exact, gradient_of_truth(gradient, *args), floor)


def test_gradcheck():
    scores = random(1, 2, 3, 4).double().requires_grad_()
    for align_corners in (True, False):
        options = dict(size=(6, 8), crop=(5, 7), align_corners=align_corners)
        resize = functools.partial(ops.upsample_bilinear, **options)
        torch.autograd.gradcheck(resize, scores)
        torch.autograd.gradgradcheck(resize, scores)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape, size, crop", CASES)
def test_gradient(shape, size, crop, align_corners, dtype):
    scores = random(*shape, dtype=dtype).requires_grad_()
    gradient = random(*shape[:2], *crop, dtype=dtype, seed=1)
    for _, layout in layouts(gradient):
        result = ops.upsample_bilinear(scores, size, crop, align_corners, backend="native")
        (found,) = torch.autograd.grad(result, scores, layout)
        check_gradient(found, gradient, shape, size, align_corners)


@needs_native
@given(
    n=st.integers(0, 2), c=st.integers(1, 5), h=st.integers(1, 40), w=st.integers(1, 24), height=sizes,
    width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)), align_corners=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_every_isa_and_any_threads_make_the_same_gradient(
    n, c, h, w, height, width, keep, align_corners, dtype
):
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))
    gradient = random(n, c, *crop, dtype=dtype)

    def run(isa):
        results = []
        for threads in (1, 3):
            results.append(poisoned((n, c, h, w), dtype))
            native.module.upsample_bilinear_backward(
                gradient.data_ptr(), results[-1].data_ptr(), native.DTYPE_CODES[dtype], n, h, w, c, height,
                width, *crop, align_corners, threads,
            )  # fmt: skip
        check_gradient(results[0], gradient, (n, c, h, w), (height, width), align_corners)
        assert torch.equal(*results)

    each_isa(run)


@needs_native
def test_gradient_of_the_gradient_is_the_resize():
    scores, gradient = random(1, 3, 4, 5).requires_grad_(), random(1, 3, 9, 11).requires_grad_()
    result = ops.upsample_bilinear(scores, (10, 12), (9, 11), backend="native")
    (first,) = torch.autograd.grad(result, scores, gradient, create_graph=True)
    (second,) = torch.autograd.grad(first, gradient, torch.ones_like(first))
    assert torch.equal(second, ops.upsample_bilinear(torch.ones_like(scores), (10, 12), (9, 11)))


@needs_native
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradient_that_is_not_finite_stays_where_it_belongs(align_corners):
    gradient = random(1, 1, 16, 20)
    gradient[0, 0, 8, 9] = float("inf")
    result = poisoned((1, 1, 4, 5), torch.float32)
    native.module.upsample_bilinear_backward(
        gradient.data_ptr(), result.data_ptr(), 0, 1, 4, 5, 1, 16, 20, 16, 20, align_corners, 1
    )
    same_non_finite(result, gradient_of_truth(gradient, (1, 1, 4, 5), (16, 20), align_corners))


@needs_native
def test_gradient_in_a_compiled_graph():
    scores, expected = random(2, 4, 3, 4).requires_grad_(), random(2, 4, 3, 4).requires_grad_()

    def loss(scores):
        return ops.upsample_bilinear(scores, (24, 32), (23, 32), backend="native").square().sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(scores).backward()
    loss(expected).backward()
    assert torch.equal(scores.grad, expected.grad)


@pytest.mark.parametrize("op", [ops.upsample_bilinear, ops.upsample_argmax])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(scores=torch.zeros(2, 3, 4)), ValueError, "scores is"),
        (dict(scores=torch.zeros(1, 2, 3, 4, dtype=torch.uint8)), TypeError, "scores is torch.uint8"),
        (dict(size=(8,)), ValueError, "size is"),
        (dict(size=36), TypeError, "size is 36, it must be a tuple of integers"),
        (dict(size=(8.0, 8)), TypeError, r"size is \(8.0, 8\), it must be a tuple of integers"),
        (dict(crop=(8, "8")), TypeError, r"crop is \(8, '8'\), it must be a tuple of integers"),
        (dict(size=(0, 8)), ValueError, r"size is \(0, 8\)"),
        (dict(crop=(9, 8)), ValueError, r"crop is \(9, 8\)"),
        (dict(crop=(0, 8)), ValueError, r"crop is \(0, 8\)"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(op, change, error, message):
    arguments = dict(scores=torch.zeros(1, 2, 3, 4), size=(8, 8), crop=None)
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2), (1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(
        torch.ops.shelfkern.upsample_bilinear.default,
        (random(*shape).requires_grad_(), [16, 24], [15, 20], True, "native"),
    )
    torch.library.opcheck(
        torch.ops.shelfkern.upsample_bilinear_backward.default,
        (random(*shape[:2], 15, 20).requires_grad_(), [16, 24], list(shape[2:]), True, "native"),
    )


@needs_native
def test_compile_and_export():
    scores = random(2, 8, 3, 4)
    expected = ops.upsample_bilinear(scores, (24, 32), (23, 32))

    def resize(scores):
        return ops.upsample_bilinear(scores, (scores.shape[2] * 8, scores.shape[3] * 8), (23, 32))

    compiled = torch.compile(resize, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(scores), expected)

    class Resize(torch.nn.Module):
        def forward(self, scores):
            return resize(scores)

    program = torch.export.export(Resize(), (scores,))
    assert "shelfkern.upsample_bilinear" in str(program.graph)
    assert torch.equal(program.module()(scores), expected)


# The Triton kernel. Every run reads a window with NaN around it and writes into poisoned memory.
@contextlib.contextmanager
def written(shape, dtype):
    """Poisoned contiguous memory to write into; nothing before or after it may change."""
    count = torch.Size(shape).numel()
    fence = moved("triton", poisoned((count + 1024,), dtype))[0]
    out = fence[512 : 512 + count].view(shape)
    yield out
    result = out.clone()
    out.fill_(float("nan"))
    assert fence.isnan().all()
    out.copy_(result)


def run_triton(scores, size, crop, align_corners, **options):
    """The raw kernel on a reference's arguments."""
    with written((*scores.shape[:2], *crop), scores.dtype) as out:
        upsample_bilinear_triton(windows(scores)[0], size, out, align_corners, **options)
    return out.cpu()


# More classes than a program takes, rows of more than one program, and a batch of 3.
TRITON_CASES = [*CASES, ((1, 67, 3, 4), (6, 40), (5, 39)), ((3, 2, 4, 5), (7, 600), (7, 599))]


@needs_triton
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape, size, crop", TRITON_CASES)
def test_triton_is_interpolate(shape, size, crop, align_corners, dtype):
    # Rows that a program of the interpreter makes one after another: few of them.
    crop = min(crop[0], 12), crop[1]
    scores = random(*shape, dtype=dtype)
    check(run_triton(scores, size, crop, align_corners), scores, size, crop, align_corners)


@needs_triton
@given(
    n=st.integers(0, 3), c=st.integers(1, 40), h=st.integers(1, 9), w=st.integers(1, 24),
    height=st.integers(1, 20), width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    align_corners=st.booleans(), dtype=st.sampled_from(CUDA_DTYPES),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_triton_on_what_hypothesis_draws(n, c, h, w, height, width, keep, align_corners, dtype):
    scores, size = random(n, c, h, w, dtype=dtype), (height, width)
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))
    check(run_triton(scores, size, crop, align_corners), scores, size, crop, align_corners)


@needs_triton
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(11, 13), (6, 7), (6, 20), (3, 4)])
def test_triton_keeps_what_is_not_finite(size, align_corners):
    scores = random(1, 4, 6, 7)
    scores[0, 0, 2, 3], scores[0, 1, 0, 0], scores[0, 2, 5, 6] = float("nan"), float("inf"), -float("inf")
    result = run_triton(scores, size, size, align_corners)
    same_non_finite(result, truth(scores, size, size, align_corners))


@needs_triton
def test_triton_that_keeps_the_size_changes_no_bit():
    scores = random(2, 5, 6, 7)
    for align_corners in (True, False):
        assert torch.equal(run_triton(scores, (6, 7), (6, 7), align_corners), scores)


@needs_triton
def test_triton_takes_images_far_apart():
    scores, size = random(2, 5, 3, 4, dtype=torch.float16), (6, 9)
    with far_apart(scores.shape, scores.dtype, moved("triton", scores)[0].device) as far:
        with written((2, 5, *size), scores.dtype) as out:
            upsample_bilinear_triton(far.copy_(scores), size, out, True)
        check(out.cpu(), scores, size, size, True)


@needs_triton
def test_triton_public_op():
    scores = random(2, 5, 6, 7)
    options = dict(size=(10, 30), crop=(9, 28), backend="triton")
    expected = run_triton(scores, (10, 30), (9, 28), True)
    for name, layout in layouts(scores):
        result = ops.upsample_bilinear(*moved("triton", layout), **options)
        assert torch.equal(result.cpu(), expected) and result.is_contiguous(), name
    scores = moved("triton", scores)[0]
    for part in (scores[:1, :1], scores[:, :, :1, :1]):
        expanded = part.expand(2, 5, 6, 7)
        expected = ops.upsample_bilinear(expanded.contiguous(), **options)
        assert torch.equal(ops.upsample_bilinear(expanded, **options), expected)
    assert ops.upsample_bilinear(scores[:, :0], **options).shape == (2, 0, 9, 28)
    with pytest.raises(RuntimeError, match="scores has no pixels"):
        ops.upsample_bilinear(scores[:, :, :0], **options)


def run_triton_backward(gradient, shape, size, align_corners):
    with written(shape, gradient.dtype) as out:
        inside = moved("triton", poisoned((gradient.numel() + 1024,), gradient.dtype))[0]
        window = inside[512 : 512 + gradient.numel()].view(gradient.shape).copy_(gradient)
        upsample_bilinear_backward_triton(window, size, out, align_corners)
    return out.cpu()


@needs_triton
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_triton_gradient(case, align_corners):
    dtype = CUDA_DTYPES[case % 3]
    shape, size, crop = [*CASES[1:], ((1, 2, 3, 40), (7, 600), (7, 599))][case]
    # A program of the interpreter makes a row of a class: few of them.
    shape = shape[0], min(shape[1], 2), min(shape[2], 6), shape[3]
    gradient = random(*shape[:2], *crop, dtype=dtype)
    check_gradient(
        run_triton_backward(gradient, shape, size, align_corners), gradient, shape, size, align_corners
    )


@needs_triton
@given(
    n=st.integers(0, 2), c=st.integers(1, 3), h=st.integers(1, 9), w=st.integers(1, 40),
    height=st.integers(1, 40), width=st.integers(1, 300), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    align_corners=st.booleans(), dtype=st.sampled_from(CUDA_DTYPES),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_triton_gradient_of_what_hypothesis_draws(n, c, h, w, height, width, keep, align_corners, dtype):
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))
    gradient, shape, size = random(n, c, *crop, dtype=dtype), (n, c, h, w), (height, width)
    check_gradient(
        run_triton_backward(gradient, shape, size, align_corners), gradient, shape, size, align_corners
    )


@needs_triton
def test_triton_has_a_gradient_and_the_gradient_one():
    scores = moved("triton", random(1, 2, 3, 4))[0].requires_grad_()
    gradient = moved("triton", random(1, 2, 5, 7, seed=1))[0].requires_grad_()
    result = ops.upsample_bilinear(scores, (6, 8), (5, 7), backend="triton")
    (first,) = torch.autograd.grad(result, scores, gradient, create_graph=True)
    check_gradient(first.detach().cpu(), gradient.detach().cpu(), (1, 2, 3, 4), (6, 8), True)
    (second,) = torch.autograd.grad(first, gradient, torch.ones_like(first))
    assert torch.equal(
        second, ops.upsample_bilinear(torch.ones_like(scores), (6, 8), (5, 7), backend="triton")
    )


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2)])
def test_triton_opcheck(shape):
    scores = moved("triton", random(*shape))[0]
    torch.library.opcheck(
        torch.ops.shelfkern.upsample_bilinear.default, (scores, [6, 24], [5, 20], True, "triton")
    )


@needs_triton
def test_triton_compile_and_export():
    scores = moved("triton", random(2, 8, 3, 4))[0]

    def resize(scores):
        size = scores.shape[2] * 2, scores.shape[3] * 8
        return ops.upsample_bilinear(scores, size, (5, 32), backend="triton")

    expected = resize(scores)
    assert torch.equal(
        torch.compile(resize, fullgraph=True, dynamic=True, backend="aot_eager")(scores), expected
    )

    class Resize(torch.nn.Module):
        def forward(self, scores):
            return resize(scores)

    program = torch.export.export(Resize(), (scores,))
    assert "shelfkern.upsample_bilinear" in str(program.graph)
    assert torch.equal(program.module()(scores), expected)


@needs_triton_on_a_gpu
def test_triton_waits_for_the_kernel_that_makes_its_scores():
    make, size = moved("triton", nhwc(random(4, 19, 64, 128)))[0], (512, 1024)
    expected = run_triton(make.cpu() * 2, size, size, True)
    for _ in range(10):
        scores = torch.full_like(make, float("nan"))
        torch.mul(make, 2, out=scores)
        out = torch.full((4, 19, *size), float("nan"), device=make.device)
        upsample_bilinear_triton(scores, size, out, True, overlap=True)
        assert torch.equal(out.cpu(), expected)
