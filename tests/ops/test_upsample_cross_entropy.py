from __future__ import annotations

import functools
import math
import subprocess
import sys
import textwrap

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    CUDA_DTYPES,
    DTYPES,
    TRITON,
    assert_as_exact,
    each_isa,
    layouts,
    moved,
    needs_native,
    needs_triton,
    nhwc,
    random,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shelfkern import ops
from shelfkern.ops import Ohem
from shelfkern.ops import upsample_cross_entropy as op
from shelfkern.ops.upsample_cross_entropy import Problem, upsample_cross_entropy_native

KERNELS = [pytest.param("native", marks=needs_native), TRITON]

# n, classes, h, w -> full size, crop
CASES = [
    ((2, 19, 8, 9), (64, 72), (61, 70)),
    ((1, 2, 5, 7), (10, 14), (10, 14)),
    ((2, 11, 3, 4), (48, 64), (45, 60)),
    ((1, 5, 6, 7), (6, 7), (6, 7)),
    ((1, 3, 12, 40), (5, 23), (5, 20)),
    ((1, 4, 1, 1), (3, 5), (3, 5)),
    ((1, 3, 1, 6), (70, 1), (66, 1)),
    ((1, 171, 2, 3), (8, 12), (8, 11)),
]
OPTIONS = {
    "plain": dict(),
    "weighted": dict(weight=True),
    "smooth": dict(label_smoothing=0.1),
    "weighted and smooth": dict(weight=True, label_smoothing=0.3),
    # Scores of random classes: of two, about 0.6 of the pixels have a loss above ln 2; of many, nearly all.
    "many hard": dict(ohem=Ohem(0.7, 1 / 16)),
    "few hard": dict(ohem=Ohem(0.001, 0.3)),
    "all kept": dict(ohem=Ohem(0.001, 1.0), weight=True, label_smoothing=0.1),
}


def labels(n, classes, crop, ignore=255, part=0.2, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(classes)
    target = torch.randint(0, classes, (n, *crop), generator=generator)
    return target.masked_fill(torch.rand(target.shape, generator=generator) < part, ignore).to(dtype)


def options_of(name, classes):
    options = dict(OPTIONS[name])
    if options.get("weight"):
        options["weight"] = random(classes, seed=3).abs() + 0.1
    return options


def loss_and_gradient(loss, scores, factor=1.0):
    scores = scores.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    result = loss(scores)
    (gradient,) = torch.autograd.grad(result, scores, torch.full_like(result, factor))
    return result.detach().cpu(), gradient.cpu()


def check(result, scores, truth_of, dtype=None):
    """A loss and its gradient against float64 and eager, as `parity` has it."""
    exact = loss_and_gradient(truth_of, scores.double())
    eager = loss_and_gradient(truth_of, scores)
    assert result[0].dtype is torch.float32 and result[1].dtype is scores.dtype
    # A mean of many is exact in eager by luck: that of its rounded coordinates and logarithms.
    coordinate = torch.finfo(torch.float32).eps * max(scores.shape[2:])
    eps = max(4 * coordinate, torch.finfo(torch.float32).eps * 4)
    assert_as_exact(result[0], exact[0], eager[0], eps * float(exact[0].abs()))
    largest = float(exact[1].abs().max())
    assert_as_exact(result[1], exact[1], eager[1], (eps + torch.finfo(scores.dtype).eps) * largest)


def call(scores, target, size, backend, **options):
    scores, target, weight = moved(backend, scores, target, options.pop("weight", None))
    loss = functools.partial(op, target=target, size=size, weight=weight, backend=backend, **options)
    return loss_and_gradient(loss, scores)


def is_cross_entropy_of_the_resize(shape, size, crop, name, backend, dtype):
    align_corners = len(name) % 2 == 0
    scores = (2 * random(*shape)).to(dtype)
    target = labels(shape[0], shape[1], crop, dtype=torch.int64 if align_corners else torch.uint8)
    options = dict(options_of(name, shape[1]), align_corners=align_corners)
    truth = functools.partial(op, target=target, size=size, backend="reference", **options)
    check(call(scores, target, size, backend, **options), scores, truth)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape, size, crop", CASES)
def test_is_cross_entropy_of_the_resize(shape, size, crop, name, dtype):
    is_cross_entropy_of_the_resize(shape, size, crop, name, "native", dtype)


# Few pixels, for the interpreter; more classes, columns and pixels than a program takes.
TRITON_CASES = [
    *(((1, 3, 2, 3), (6, 10), (5, 9), name) for name in OPTIONS),
    ((1, 18, 2, 2), (3, 5), (3, 4), "all kept"),
    ((2, 2, 1, 35), (2, 140), (2, 135), "plain"),
    ((1, 3, 5, 6), (3, 4), (3, 3), "weighted and smooth"),
]


@needs_triton
@pytest.mark.parametrize("case", range(len(TRITON_CASES)))
def test_triton_is_cross_entropy_of_the_resize(case):
    is_cross_entropy_of_the_resize(*TRITON_CASES[case], "triton", CUDA_DTYPES[case % 3])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_torch(name, align_corners):
    scores, target = random(2, 5, 4, 6).double(), labels(2, 5, (15, 22), dtype=torch.int64)
    options = options_of(name, 5)
    ohem = options.pop("ohem", None)
    if "weight" in options:
        options["weight"] = options["weight"].double()
    full = F.interpolate(scores, (16, 24), mode="bilinear", align_corners=align_corners)[..., :15, :22]
    expected = F.cross_entropy(full, target, **options, ignore_index=255)
    if ohem is not None:
        losses = F.cross_entropy(full, target, **options, ignore_index=255, reduction="none").flatten()
        losses, least = losses.sort(descending=True).values, int(target.numel() * ohem.min_kept)
        hard = losses > -math.log(ohem.threshold)
        expected = losses[hard].mean() if hard.sum() > least else losses[:least].mean()
    found = op(
        scores, target, (16, 24), align_corners=align_corners, backend="reference", ohem=ohem, **options
    )
    assert torch.allclose(found, expected, rtol=1e-12)
    assert found.dtype is torch.float64


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    scores, target = random(1, 3, 3, 4).double().requires_grad_(), labels(1, 3, (5, 7))
    loss = functools.partial(op, target=target, size=(6, 8), **options_of(name, 3))
    torch.autograd.gradcheck(loss, scores)


@needs_native
@given(
    n=st.integers(0, 2), c=st.integers(1, 20), h=st.integers(1, 12), w=st.integers(1, 24),
    height=st.integers(1, 80), width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    align_corners=st.booleans(), dtype=st.sampled_from(DTYPES), name=st.sampled_from(list(OPTIONS)),
    part=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_isa_and_any_threads(n, c, h, w, height, width, keep, align_corners, dtype, name, part):
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))
    scores, target = random(n, c, h, w, dtype=dtype), labels(n, c, crop, part=part)
    options = dict(options_of(name, c), align_corners=align_corners)
    if n == 0 or bool((target == 255).all()):
        return
    truth = functools.partial(op, target=target, size=(height, width), backend="reference", **options)

    def run(isa):
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(call(scores, target, (height, width), "native", **options))
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        check(results[0], scores, truth)

    each_isa(run)


@needs_native
def test_every_part_of_the_gradient_is_written():
    # Downsized in height and cropped in width: some scores are not read.
    scores, target = nhwc(random(1, 3, 9, 7)), labels(1, 3, (3, 50))
    gradients = [torch.full(scores.shape, value) for value in (float("nan"), 0.0)]
    for gradient in gradients:
        upsample_cross_entropy_native(Problem(scores, target, (4, 60), True, 255, None, 0.0, None), gradient)
    assert torch.equal(*gradients) and (gradients[0] == 0).any()


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_all_ignored(backend):
    scores, target = random(1, 3, 3, 4), torch.full((1, 6, 8), 255, dtype=torch.uint8)
    loss, gradient = call(scores, target, (6, 8), backend)
    assert loss.isnan() and torch.equal(gradient, torch.zeros_like(scores))
    loss, gradient = call(scores, target, (6, 8), backend, label_smoothing=0.1)
    assert loss.isnan() and torch.equal(gradient, torch.zeros_like(scores))
    loss, gradient = call(scores, target, (6, 8), backend, ohem=Ohem())
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(scores))


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("ignore", [-1, 0, 2, 300])
def test_any_number_may_be_ignored(ignore, backend):
    scores, target = random(1, 3, 3, 4), labels(1, 3, (6, 8), ignore, dtype=torch.int64)
    options = dict(ignore_index=ignore)
    truth = functools.partial(op, target=target, size=(6, 8), backend="reference", **options)
    check(call(scores, target, (6, 8), backend, **options), scores, truth)


@pytest.mark.parametrize("backend", KERNELS)
def test_fewer_labels_than_pixels_to_keep(backend):
    scores, target = random(1, 3, 3, 4), labels(1, 3, (6, 8), part=0.9)
    loss, _ = call(scores, target, (6, 8), backend, ohem=Ohem(0.001, 0.5))
    # Ignored pixels are among the 24 kept, with no loss.
    labelled = int((target != 255).sum())
    assert 0 < labelled < 24
    mean, _ = call(scores, target, (6, 8), backend)
    assert loss.item() == pytest.approx(mean.item() * labelled / 24, rel=1e-6)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_equal_losses_share_what_is_kept(backend):
    scores, target = torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8)
    loss, gradient = call(scores, target, (4, 4), backend, ohem=Ohem(0.3, 0.25))
    assert loss.item() == pytest.approx(math.log(2))
    # As if all were kept: 16 pixels, each a quarter of four.
    _, mean = call(scores, target, (4, 4), backend)
    assert torch.allclose(gradient, mean) and gradient.abs().min() > 0


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend):
    scores, target = random(2, 3, 2, 3), labels(2, 3, (3, 6))
    expected = call(scores, target, (4, 6), backend)
    strided = target.transpose(1, 2).contiguous().transpose(1, 2)
    for name, layout in layouts(scores):
        found = call(layout, strided, (4, 6), backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    expanded = scores[:1, :1].expand(2, 3, 2, 3)
    found, expected = (call(s, target, (4, 6), backend) for s in (expanded, expanded.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_factor_scales_the_gradient(backend):
    scores, target = random(1, 3, 3, 4), labels(1, 3, (6, 8))
    (scores, target) = moved(backend, scores, target)
    loss = functools.partial(op, target=target, size=(6, 8), backend=backend)
    one, many = (loss_and_gradient(loss, scores, factor)[1] for factor in (1.0, 4.0))
    assert torch.equal(one * 4, many)


@pytest.mark.parametrize("backend", KERNELS)
def test_without_gradient_the_loss_is_the_same(backend):
    scores, target = moved(backend, random(1, 3, 3, 4), labels(1, 3, (6, 8)))
    for ohem in (None, Ohem()):
        recorded = op(scores.clone().requires_grad_(), target, (6, 8), ohem=ohem, backend=backend)
        loss = op(scores, target, (6, 8), ohem=ohem, backend=backend)
        assert torch.equal(loss, recorded.detach()) and not loss.requires_grad


@pytest.mark.parametrize("backend", KERNELS)
def test_no_second_derivative(backend):
    scores, target = moved(backend, random(1, 3, 3, 4), labels(1, 3, (6, 8)))
    scores.requires_grad_()
    loss = op(scores, target, (6, 8), backend=backend)
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="the kernels have no second derivative, backend='reference' has"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="an input requires grad"):
        op(scores, target, (6, 8), weight=scores.new_ones(3, requires_grad=True), backend=backend)


@needs_native
def test_a_label_that_is_no_class_is_named():
    for dtype, label in ((torch.uint8, 7), (torch.int64, -3), (torch.int64, 2**40)):
        target = labels(2, 3, (60, 50), dtype=dtype)
        target[1, 40, 30:33] = label
        for backend in ("native", "reference"):
            for ohem in (None, Ohem()):
                with pytest.raises(
                    ValueError, match=f"target has the label {label}, it may be from 0 to 2 or"
                ):
                    op(random(2, 3, 8, 8), target, (64, 64), ohem=ohem, backend=backend)


@needs_triton
def test_a_label_that_is_no_class_shows_on_a_gpu():
    scores, target = moved("triton", random(1, 3, 3, 4), torch.full((1, 6, 8), 7))
    for ohem in (None, Ohem()):
        assert op(scores, target, (6, 8), ohem=ohem, backend="triton").isnan()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(scores=torch.zeros(3, 4, 5)), ValueError, "scores is"),
        (dict(scores=torch.zeros(1, 0, 3, 4)), ValueError, "scores is .* a class"),
        (dict(target=torch.zeros(1, 6, 8)), TypeError, "target is torch.float32"),
        (dict(target=torch.zeros(6, 8, dtype=torch.uint8)), ValueError, r"target is \(6, 8\)"),
        (dict(target=torch.zeros(2, 6, 8, dtype=torch.uint8)), ValueError, r"target is \(2, 6, 8\)"),
        (dict(target=torch.zeros(1, 7, 8, dtype=torch.uint8)), ValueError, "target has 7 x 8 pixels"),
        (dict(size=(0, 8)), ValueError, r"size is \(0, 8\)"),
        (dict(size=36), TypeError, "size is 36, it must be a tuple of integers"),
        (dict(size=(36.0, 32.0)), TypeError, r"size is \(36.0, 32.0\), it must be a tuple of integers"),
        (dict(ohem=(0.7, 0.1)), TypeError, r"ohem is \(0.7, 0.1\), it must be an Ohem or None"),
        (dict(weight=torch.zeros(4)), ValueError, r"weight is \(4,\)"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(scores=torch.zeros(1, 3, 3, 4), target=torch.zeros(1, 6, 8, dtype=torch.uint8))
    with pytest.raises(error, match=f"^upsample_cross_entropy: {message}"):
        op(**{**arguments, "size": (6, 8), **change})


def test_ohem_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="threshold is 0"):
        Ohem(0)
    with pytest.raises(ValueError, match="min_kept is 2"):
        Ohem(0.7, 2)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    scores, target = moved(backend, random(1, 3, 2, 2), labels(1, 3, (3, 4)))
    weight = scores.new_ones(3)
    for limits, gradient in (([], True), ([0.7, 0.1], True), ([], False)):
        arguments = ([4, 4], True, 255, weight, 0.1, limits, backend, gradient)
        inputs = (scores.clone().requires_grad_(gradient), target, *arguments)
        torch.library.opcheck(torch.ops.shelfkern.upsample_cross_entropy.default, inputs)


@pytest.mark.parametrize("backend", KERNELS)
def test_compile(backend):
    scores, target = moved(backend, random(1, 3, 2, 3), labels(1, 3, (4, 6)))

    def loss(scores):
        return op(scores * 2, target, (4, 6), ohem=Ohem(), backend=backend)

    expected = loss_and_gradient(loss, scores)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = loss_and_gradient(compiled, scores)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_native
def test_autocast():
    x, target = random(1, 8, 4, 5), labels(1, 3, (15, 20))
    head = torch.nn.Conv2d(8, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(x)
        loss = op(scores, target, (16, 20), backend="native")
    assert scores.dtype is torch.bfloat16 and loss.dtype is torch.float32
    loss.backward()
    found = head.weight.grad.clone()
    head.weight.grad = None
    op(head(x), target, (16, 20), backend="native").backward()
    assert torch.allclose(found, head.weight.grad, rtol=0.05, atol=1e-3)


class Largest(TorchDispatchMode):
    """The most bytes that a result within it has."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("backend", KERNELS)
def test_no_tensor_of_the_full_size(backend):
    scores, target = moved(backend, nhwc(random(1, 16, 2, 3)), labels(1, 16, (8, 12)))
    problem = Problem(scores, target, (8, 12), True, 255, None, 0.0, Ohem())
    run = getattr(sys.modules[Problem.__module__], f"upsample_cross_entropy_{backend}")
    with Largest() as largest:
        run(problem, torch.empty_like(scores, memory_format=torch.contiguous_format))
    # A float32 a pixel, in the interpreter's copies of memory too; not one a class.
    assert largest.bytes <= 8 * 12 * 8
    with Largest() as largest:
        ops.upsample_cross_entropy_reference(scores, target, (8, 12))
    assert largest.bytes >= 16 * 8 * 12 * 4


@needs_native
def test_memory_beyond_torch():
    code = """
    import re, torch
    from shelfkern import ops
    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
    scores = torch.randn(1, 64, 32, 32, requires_grad=True)
    target = torch.zeros(1, 1024, 1024, dtype=torch.uint8)
    ops.upsample_cross_entropy(scores, target[:, :64], (1024, 1024), backend="native").backward()
    before = peak()
    ops.upsample_cross_entropy(scores, target, (1024, 1024), backend="native").backward()
    print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Full-size scores would take 256 MiB.
    assert grown < 16
