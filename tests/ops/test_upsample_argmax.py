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
    each_isa,
    far_apart,
    layouts,
    moved,
    needs_emulator,
    needs_native,
    nhwc,
    random,
)
from test_upsample_bilinear import CASES, truth

from shelfkern import native, ops
from shelfkern.ops.upsample_argmax import upsample_argmax_cuda


def check(labels, scores, size, crop, align_corners):
    """A label's exact score is the greatest, up to what eager float32 resizing may be wrong by."""
    args = size, crop, align_corners
    assert labels.dtype is torch.uint8 and labels.shape == (scores.shape[0], *crop)
    if labels.numel() == 0:
        return
    exact, eager = truth(scores.double(), *args), truth(scores.float(), *args)
    assert int(labels.max()) < scores.shape[1]
    lost = exact.amax(1) - exact.gather(1, labels.long()[:, None])[:, 0]
    # Two scores are compared, each within twice eager's error; the floor is a float32 coordinate's rounding.
    floor = 4 * torch.finfo(torch.float32).eps * max(scores.shape[2:]) * float(scores.abs().max())
    assert lost.max() <= 2 * max(2 * float((eager.double() - exact).abs().max()), floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape, size, crop", CASES)
def test_is_the_argmax_of_interpolate(shape, size, crop, align_corners, dtype, backend):
    scores = random(*shape, dtype=dtype)
    labels = ops.upsample_argmax(scores, size, crop, align_corners, backend=backend)
    check(labels, scores, size, crop, align_corners)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smooth_scores_give_the_labels_of_torch(backend):
    # Far from ties every arithmetic gives one answer.
    scores = truth(random(1, 19, 3, 4) * 10, (24, 32), (24, 32), True)
    full = truth(scores.double(), (192, 256), (192, 256), True)
    first, second = full.topk(2, 1).values.unbind(1)
    sure = first - second > 1e-3
    labels = ops.upsample_argmax(scores, (192, 256), backend=backend)
    assert sure.float().mean() > 0.99 and torch.equal(labels[sure], full.argmax(1).to(torch.uint8)[sure])


@pytest.mark.parametrize("backend", [*BACKENDS, *CUDA_BACKENDS])
@pytest.mark.parametrize("size", [(40, 48), (10, 48), (4, 3)])
@pytest.mark.parametrize("special", [None, "nan", "inf", "-inf"])
def test_ties_infinities_and_nan_as_in_torch(special, size, backend):
    # Whole numbers up to 4, in steps of powers of two: exact in any order of operations, with many ties.
    scores = random(1, 6, 5, 6).abs().mul(2).round()
    if special:
        for k, y, x in [(3, 0, 0), (1, 2, 3), (4, 2, 3), (5, 4, 5)]:
            scores[0, k, y, x] = float(special)
        scores[0, :, 4, 0] = float(special)
    expected = truth(scores, size, size, False).argmax(1).to(torch.uint8)
    (scores,) = moved(backend, scores)
    assert torch.equal(
        ops.upsample_argmax(scores, size, align_corners=False, backend=backend).cpu(), expected
    )


@pytest.mark.parametrize("backend", [*BACKENDS, *CUDA_BACKENDS])
@pytest.mark.parametrize("classes", [1, 2, 17, 255])
def test_of_equal_classes_the_first(backend, classes):
    # Whole numbers and sixteenths: exact in any order of operations.
    (scores,) = moved(backend, random(1, 1, 5, 6).mul(10).round().expand(1, classes, 5, 6).clone())
    labels = ops.upsample_argmax(scores, (40, 48), align_corners=False, backend=backend)
    assert (labels == 0).all()
    scores[:, -1] += 1
    labels = ops.upsample_argmax(scores, (40, 48), align_corners=False, backend=backend)
    assert (labels == classes - 1).all()


@needs_native
@given(
    n=st.integers(0, 2), c=st.integers(1, 25), h=st.integers(1, 12), w=st.integers(1, 24),
    height=st.integers(1, 40), width=st.integers(1, 90), keep=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    align_corners=st.booleans(), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_isa(n, c, h, w, height, width, keep, align_corners, dtype, threads):
    scores = nhwc(random(n, c, h, w, dtype=dtype))
    crop = max(1, round(height * keep[0])), max(1, round(width * keep[1]))

    def run(isa):
        # One more row, to see that nothing is written beyond the end; 255 is no class here.
        out = torch.full((n * crop[0] + 1, crop[1]), 255, dtype=torch.uint8)
        native.module.upsample_argmax(
            scores.data_ptr(), out.data_ptr(), native.DTYPE_CODES[dtype], n, h, w, c, height, width, *crop,
            align_corners, threads,
        )  # fmt: skip
        check(out[:-1].view(n, *crop), scores, (height, width), crop, align_corners)
        assert (out[-1] == 255).all()

    each_isa(run)


# Beside CASES: tiles of few and of many columns, and one whose classes do not fit in shared memory.
CUDA_CASES = [
    *CASES,
    ((2, 21, 5, 6), (33, 47), (33, 44)),
    ((1, 12, 9, 40), (18, 79), (17, 76)),
    ((1, 256, 20, 70), (20, 70), (3, 67)),
]


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("shape, size, crop", CUDA_CASES)
def test_cuda_kernel(shape, size, crop, align_corners, dtype, backend):
    scores = random(*shape, dtype=dtype)
    (given,) = moved(backend, scores)
    labels = ops.upsample_argmax(given, size, crop, align_corners, backend=backend)
    check(labels.cpu(), scores, size, crop, align_corners)


@needs_emulator
@pytest.mark.parametrize("seed", range(3))
def test_cuda_kernel_in_any_order_of_threads(seed):
    scores, size = random(2, 13, 7, 9, seed=seed), (20, 70)
    native.emulation.set_seed(seed)
    check(ops.upsample_argmax(scores, size, backend="emulated"), scores, size, size, True)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_kernel_where_neighbours_agree(backend):
    # Regions of one label with borders between them, as networks make them.
    regions = random(1, 5, 3, 4).argmax(1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    scores = torch.nn.functional.one_hot(regions, 5).permute(0, 3, 1, 2) * 3.0 + random(1, 5, 12, 16)
    (given,) = moved(backend, scores)
    labels = ops.upsample_argmax(given, (96, 128), backend=backend).cpu()
    check(labels, scores, (96, 128), (96, 128), True)
    first, second = truth(scores.double(), (96, 128), (96, 128), True).topk(2, 1).values.unbind(1)
    assert (first - second > 1e-5).float().mean() > 0.99


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("start", [0, 3])
def test_cuda_kernel_on_windows(start, backend):
    # Channels from `start` of wider pixels in a frame of NaN; labels that no 4 bytes are aligned to.
    n, c, h, w = 2, 7, 4, 5
    scores = random(n, c, h, w)
    frame = torch.full((n, h + 2, w + 3, c + start + 2), float("nan")).permute(0, 3, 1, 2)
    frame[:, start : start + c, 1:-1, 2:-1] = scores
    frame, memory = moved(backend, frame, torch.full((2 * 16 * 20 + 2,), 255, dtype=torch.uint8))
    labels = memory[1:-1].view(2, 16, 20)
    upsample_argmax_cuda(frame[:, start : start + c, 1:-1, 2:-1], (16, 20), labels, True, backend)
    check(labels.cpu(), scores, (16, 20), (16, 20), True)
    assert memory[0] == memory[-1] == 255


@needs_emulator
def test_cuda_kernel_on_images_far_apart():
    scores = random(3, 4, 3, 2, dtype=torch.bfloat16)
    with far_apart(scores.shape, scores.dtype) as far:
        labels = ops.upsample_argmax(far.copy_(scores), (9, 8), backend="emulated")
    check(labels, scores, (9, 8), (9, 8), True)


@needs_native
def test_any_strides():
    scores = random(2, 5, 6, 7)
    expected = ops.upsample_argmax(scores, (24, 30))
    for name, layout in layouts(scores):
        assert torch.equal(ops.upsample_argmax(layout, (24, 30), backend="native"), expected), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_have_no_gradient(backend):
    scores = random(1, 4, 3, 3).requires_grad_()
    labels = ops.upsample_argmax(scores, (9, 9), backend=backend)
    assert not labels.requires_grad
    assert torch.equal(labels, ops.upsample_argmax(scores.detach(), (9, 9), backend=backend))


def test_more_classes_than_labels():
    with pytest.raises(ValueError, match=r"^upsample_argmax: scores has 257 classes"):
        ops.upsample_argmax(torch.zeros(1, 257, 2, 2), (4, 4))


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 2, 2), (1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(
        torch.ops.shelfkern.upsample_argmax.default, (random(*shape), [16, 24], [15, 20], True, "native")
    )


@needs_native
def test_compile_and_export():
    scores = random(2, 8, 3, 4)
    expected = ops.upsample_argmax(scores, (24, 32), (23, 32))

    def labels(scores):
        return ops.upsample_argmax(scores, (24, 32), (23, 32))

    assert torch.equal(torch.compile(labels, fullgraph=True, backend="aot_eager")(scores), expected)

    class Labels(torch.nn.Module):
        def forward(self, scores):
            return labels(scores)

    program = torch.export.export(Labels(), (scores,))
    assert "shelfkern.upsample_argmax" in str(program.graph)
    assert torch.equal(program.module()(scores), expected)
