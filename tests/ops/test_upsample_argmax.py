from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import BACKENDS, DTYPES, each_isa, layouts, needs_native, nhwc, random
from test_upsample_bilinear import CASES, truth

from shelfkern import native, ops


def check(labels, scores, size, crop, align_corners):
    """A label's exact score is the greatest, up to what eager float32 resizing may be wrong by."""
    args = size, crop, align_corners
    assert labels.dtype is torch.uint8 and labels.shape == (scores.shape[0], *crop)
    if labels.numel() == 0:
        return
    exact, eager = truth(scores.double(), *args), truth(scores.float(), *args)
    assert labels.max() < scores.shape[1]
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 17, 255])
def test_of_equal_classes_the_first(backend, classes):
    # Whole numbers and sixteenths: exact in any order of operations.
    scores = random(1, 1, 5, 6).mul(10).round().expand(1, classes, 5, 6).clone()
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
