"""The CUDA kernels on drawn shapes, dtypes, layouts and schedules."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import test_attention_gate as attention_gate
import test_shared_block as shared_block
import test_stem as stem
import test_upsample_add as upsample_add
import test_upsample_argmax as upsample_argmax
import test_upsample_softmax_sum as upsample_softmax_sum
import torch
from hypothesis import given, settings
from parity import CUDA_BACKENDS, CUDA_DTYPES, layouts, moved, random

from shelfkern import native, ops

each_backend = pytest.mark.parametrize("backend", CUDA_BACKENDS)
drawn = functools.partial(settings, deadline=None)
SMALL, CHANNELS = st.integers(1, 7), st.integers(1, 40)
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "transposed", "offset", "expanded")
CALL = dict(
    dtype=st.sampled_from(CUDA_DTYPES), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 2**32 - 1)
)


def laid_out(x, layout):
    """x in a layout, or as "expanded" one pixel of it everywhere."""
    return x[..., :1, :1].expand_as(x) if layout == "expanded" else dict(layouts(x))[layout]


def run(op, backend, seed, *tensors, **arguments):
    """The public op on the backend's device, in the schedule that the seed gives."""
    if backend == "emulated":
        native.emulation.set_seed(seed)
    return getattr(ops, op)(*moved(backend, *tensors), **arguments, backend=backend).cpu()


@each_backend
@given(n=st.integers(0, 3), c=CHANNELS, h=SMALL, w=SMALL, gated=st.booleans(), **CALL)
@drawn(max_examples=100)
def test_upsample_add(backend, n, c, h, w, gated, dtype, layout, seed):
    x, skip, gate = upsample_add.arguments(n, c, h, w, dtype, gated)
    x, skip = laid_out(x, layout), laid_out(skip, layout)
    upsample_add.check(run("upsample_add", backend, seed, x, skip, gate), x, skip, gate)


@each_backend
@given(n=st.integers(0, 3), c=CHANNELS, h=SMALL, w=SMALL, k=CHANNELS, **CALL)
@drawn(max_examples=100)
def test_attention_gate(backend, n, c, h, w, k, dtype, layout, seed):
    x, *rest = attention_gate.arguments(n, c, h, w, k, dtype)
    x = laid_out(x, layout)
    attention_gate.check(run("attention_gate", backend, seed, x, *rest), x, *rest)


@each_backend
@given(n=st.integers(0, 2), c=CHANNELS, h=SMALL, w=SMALL, skip=st.booleans(), **CALL)
@drawn(max_examples=40)
def test_shared_block(backend, n, c, h, w, skip, dtype, layout, seed):
    x, *rest = shared_block.inputs(n, c, h, w, torch.float16 if dtype is torch.float32 else dtype)
    x, options = laid_out(x, layout), dict(slope=0.01, skip=skip)
    result = run("shared_block", backend, seed, x, *rest, **options)
    shared_block.check(result, (x, *rest), **options)


@each_backend
@given(
    n=st.integers(0, 2), h=st.integers(1, 40), w=st.integers(1, 40), k=CHANNELS, raw=st.booleans(),
    beyond=st.tuples(st.integers(0, 2), st.integers(0, 2)), **CALL,
)  # fmt: skip
@drawn(max_examples=40)
def test_stem(backend, n, h, w, k, raw, beyond, dtype, layout, seed):
    size = tuple(4 * (-(-extent // 4) + more) for extent, more in zip((h, w), beyond, strict=True))
    image = stem.pixels(n, h, w) if raw else laid_out(random(n, 3, h, w, dtype=dtype), layout)
    parameters = stem.parameters(k, dtype)
    result = run("stem", backend, seed, image, *parameters, stem.MEAN, stem.STD, size=size, slope=0.01)
    stem.check(result, image, parameters, stem.MEAN, stem.STD, size, 0.01)


RESIZE = dict(
    n=st.integers(0, 2), c=st.integers(1, 24), h=SMALL, w=SMALL, size=st.tuples(*[st.integers(1, 30)] * 2),
    keep=st.tuples(st.floats(0, 1), st.floats(0, 1)), align_corners=st.booleans(), **CALL,
)  # fmt: skip


def cropped(size, keep):
    return tuple(max(1, round(extent * share)) for extent, share in zip(size, keep, strict=True))


@each_backend
@given(**RESIZE)
@drawn(max_examples=100)
def test_upsample_argmax(backend, n, c, h, w, size, keep, align_corners, dtype, layout, seed):
    scores, crop = laid_out(random(n, c, h, w, dtype=dtype), layout), cropped(size, keep)
    arguments = dict(size=size, crop=crop, align_corners=align_corners)
    labels = run("upsample_argmax", backend, seed, scores, **arguments)
    upsample_argmax.check(labels, scores, size, crop, align_corners)


@each_backend
@given(mirror=st.booleans(), exp=st.booleans(), **RESIZE)
@drawn(max_examples=100)
def test_upsample_softmax_sum(
    backend, n, c, h, w, size, keep, align_corners, mirror, exp, dtype, layout, seed
):
    scores = laid_out(random(n, c, h, w, dtype=dtype), layout)
    before, variant = random(n, c, *cropped(size, keep)), dict(mirror=mirror, exp=exp)
    if backend == "emulated":
        native.emulation.set_seed(seed)
    there, out = moved(backend, scores, before.clone())
    arguments = dict(**variant, align_corners=align_corners)
    ops.upsample_softmax_sum(there, size, out, **arguments, backend=backend)
    upsample_softmax_sum.check(out.cpu(), before, scores, size, **arguments)
