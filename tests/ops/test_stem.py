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
    poisoned,
    random,
)
from test_conv_bn_act import (
    assert_no_bit_changes,
    assert_only_within,
    double,
    fenced,
    framed,
    same_non_finite,
    whole,
    with_threads,
)
from torch import nn
from torch.nn import functional as F

from shelfkern import native, ops
from shelfkern.ops import stem_native, stem_reference
from shelfkern.ops.stem import normalise, normalised_values, pack_stem, pack_stem_rows, stem_cuda

# n, h, w, k, and the size that the image is seen as
SHAPES = [
    (1, 32, 64, 64, (32, 64)),
    (2, 30, 33, 17, (32, 64)),
    (1, 5, 7, 3, (8, 8)),
    (3, 1, 1, 1, (4, 4)),
    (1, 70, 9, 33, (72, 12)),
    (1, 3, 5, 5, (72, 8)),
]
WIDE = [(1, 9, 1500, 17, (12, 1504)), (1, 37, 300, 33, (68, 304))]
# n, h, w, k, what the image is padded to, and what it is then enlarged to
ENLARGED = [
    (2, 30, 33, 17, (40, 40), (64, 64)),
    (1, 45, 71, 64, (48, 80), (72, 120)),
    (1, 20, 30, 5, (20, 30), (40, 60)),
    (1, 5, 7, 3, (5, 7), (24, 20)),
    (2, 1, 1, 1, (1, 1), (4, 4)),
    (1, 3, 5, 5, (40, 6), (72, 8)),
    (1, 33, 90, 19, (33, 90), (24, 64)),
    (1, 9, 700, 17, (10, 700), (12, 1400)),
]
SLOPES = [0.0, 0.01, None]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# With these a raw image becomes exactly its whole numbers less 3.
WHOLE_MEAN, WHOLE_STD = torch.tensor([[3.0] * 3, [1.0] * 3], dtype=torch.float64) / 255


def pixels(n, h, w, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, h, w, 3), generator=generator, dtype=torch.uint8)


def parameters(k, dtype=torch.float32):
    """w, scale, shift."""
    weight = random(k, 3, 7, 7, seed=1) / 147**0.5
    return weight.to(dtype), random(k, seed=2, dtype=dtype), random(k, seed=3, dtype=dtype)


def truth(image, weight, scale, shift, mean, std, size, slope, padded=None):
    """In float64, from torch's own modules."""
    weight, scale, shift, mean, std = double([weight, scale, shift, mean, std])
    x = image.double()
    if image.dtype is torch.uint8:
        x = ((x / 255 - mean) / std).permute(0, 3, 1, 2)
    seen = torch.zeros(x.shape[0], 3, *(padded or size), dtype=torch.float64)
    seen[:, :, : x.shape[2], : x.shape[3]] = x
    if padded:
        seen = F.interpolate(seen, size, mode="bilinear", align_corners=False)
    y = F.conv2d(seen, weight, stride=2, padding=3) * scale[:, None, None] + shift[:, None, None]
    if slope is not None:
        y = F.leaky_relu(y, slope) if slope else F.relu(y)
    return F.max_pool2d(y, 3, 2, 1)


def check(result, image, parameters, mean, std, size, slope, padded=None):
    weight = parameters[0]
    assert result.dtype is weight.dtype
    exact = truth(image, *parameters, mean, std, size, slope, padded)
    eager = stem_reference(image, *parameters, mean, std, size, slope, padded)
    # Where eager is exact by luck, one rounding of the largest value.
    floor = torch.finfo(weight.dtype).eps * float(exact.abs().max()) if exact.numel() else 0.0
    assert_as_exact(result, exact, eager, floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_raw_images(shape, dtype, backend):
    image, args = pixels(*shape[:3]), parameters(shape[3], dtype)
    result = ops.stem(image, *args, MEAN, STD, size=shape[4], slope=0.01, backend=backend)
    check(result, image, args, MEAN, STD, shape[4], 0.01)
    assert backend == "reference" or result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_images(shape, backend):
    n, h, w, k, size = shape
    image, args = random(n, 3, h, w), parameters(k)
    result = ops.stem(image, *args, MEAN, STD, size=size, slope=0.01, backend=backend)
    check(result, image, args, MEAN, STD, size, 0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_every_slope(slope, dtype, backend):
    image, args = pixels(1, 13, 18), parameters(19, dtype)
    result = ops.stem(image, *args, MEAN, STD, size=(16, 20), slope=slope, backend=backend)
    check(result, image, args, MEAN, STD, (16, 20), slope)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_bfloat16_images(shape, backend):
    n, h, w, k, size = shape
    image, args = random(n, 3, h, w, dtype=torch.bfloat16), parameters(k, torch.bfloat16)
    result = ops.stem(image, *args, MEAN, STD, size=size, slope=0.01, backend=backend)
    check(result, image, args, MEAN, STD, size, 0.01)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_whole_numbers_are_rounded_once(shape, dtype):
    image, args = pixels(*shape[:3]), whole(parameters(shape[3], dtype))
    norm, options = (WHOLE_MEAN, WHOLE_STD), dict(size=shape[4], slope=0.25, backend="native")
    normalised = image.permute(0, 3, 1, 2).float() - 3
    expected = truth(normalised, *args, *norm, shape[4], 0.25).to(dtype)
    assert torch.equal(ops.stem(image, *args, *norm, **options), expected)
    if dtype is torch.float32:
        assert torch.equal(ops.stem(normalised, *args, *norm, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_a_raw_image_is_its_normalised_self(shape, backend):
    image, args = pixels(*shape[:3]), parameters(shape[3])
    options = dict(size=shape[4], backend=backend)
    raw = ops.stem(image, *args, MEAN, STD, **options)
    normalised = ops.stem(normalise(image, MEAN, STD), *args, MEAN, STD, **options)
    # A normalised pixel is below 3 and off by a few roundings, of which the convolution adds 147.
    torch.testing.assert_close(raw, normalised, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_the_image_is_zero_after_normalisation(backend):
    image, args = pixels(2, 9, 11), parameters(8)
    around = F.pad(normalise(image, MEAN, STD), (0, 5, 0, 7))
    result = ops.stem(image, *args, MEAN, STD, size=(16, 16), backend=backend)
    expected = ops.stem(around, *args, MEAN, STD, backend=backend)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-5)


@needs_native
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, h, w, k, padded, size", ENLARGED)
def test_an_image_is_enlarged_on_every_isa(n, h, w, k, padded, size, dtype, raw):
    image, args = pixels(n, h, w), parameters(k, dtype)
    options = dict(size=size, padded=padded, slope=0.01)
    if not raw:
        image = normalise(image, MEAN, STD).to(dtype)
    each_isa(
        lambda isa: check(
            ops.stem(image, *args, MEAN, STD, **options, backend="native"),
            image, args, MEAN, STD, size, 0.01, padded,
        )
    )  # fmt: skip
    result = ops.stem(image, *args, MEAN, STD, **options, backend="reference")
    check(result, image, args, MEAN, STD, size, 0.01, padded)


@needs_native
@pytest.mark.parametrize("raw", [False, True])
def test_an_image_that_is_enlarged_is_read_within_its_bounds_and_by_any_thread(raw):
    image, (weight, scale, shift), padded = pixels(2, 61, 37), parameters(20), (64, 40)
    image = image if raw else normalise(image, MEAN, STD).contiguous()
    packed, values = pack_stem_rows(weight, torch.float32), normalised_values(MEAN, STD)
    # What is read beyond the image would be NaN, or another byte.
    around = torch.full((image.numel() + 128,), 255 if raw else float("nan"), dtype=image.dtype)
    inside = around[64:-64].view(image.shape)
    inside.copy_(image)

    def run():
        storage, out = fenced(poisoned((2, 20, 28, 20), torch.float32))
        stem_native(inside, packed, scale, shift, values, out, 0.25, padded=padded)
        assert_only_within(storage, out)
        return out

    check(run(), image, (weight, scale, shift), MEAN, STD, (112, 80), 0.25, padded)
    assert_no_bit_changes(run)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_the_cuda_kernel_enlarges_nothing(backend):
    image, args = pixels(1, 8, 8), parameters(4)
    with pytest.raises(RuntimeError, match=r"^stem: .*padded differs from size"):
        ops.stem(image, *args, MEAN, STD, size=(16, 16), padded=(8, 8), backend=backend)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_isa_is_as_exact(dtype):
    image, args, size = pixels(1, 41, 70), parameters(33, dtype), (44, 72)

    def run(isa):
        result = ops.stem(image, *args, MEAN, STD, size=size, backend="native")
        check(result, image, args, MEAN, STD, size, 0.0)

    each_isa(run)


@needs_native
@given(
    n=st.integers(1, 2), h=st.integers(1, 80), w=st.integers(1, 30), k=st.integers(1, 70),
    beyond=st.tuples(st.integers(0, 9), st.integers(0, 2)), slope=st.sampled_from([0.0, 0.25, None]),
    raw=st.booleans(), dtype=st.sampled_from(DTYPES), count=st.sampled_from([1, 2, 5]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_isa_writes_all_of_the_output(n, h, w, k, beyond, slope, raw, dtype, count):
    size = -(-h // 4) * 4 + 4 * beyond[0], -(-w // 4) * 4 + 4 * beyond[1]
    weight, scale, shift = whole(parameters(k, dtype))
    image = pixels(n, h, w)
    normalised = image.permute(0, 3, 1, 2).float() - 3
    expected = truth(normalised, weight, scale, shift, WHOLE_MEAN, WHOLE_STD, size, slope).to(dtype)
    packed, values = pack_stem_rows(weight, torch.float32), normalised_values(WHOLE_MEAN, WHOLE_STD)
    if not raw:
        # As an NHWC tensor of another shape, since stem takes it contiguous, with NaN around.
        image = fenced(normalised.reshape(n, -1, 1, 1))[1].view(n, 3, h, w)
        assert torch.equal(image, normalised)

    def run(isa):
        storage, out = fenced(poisoned(expected.shape, dtype))
        stem_native(image, packed, scale.float(), shift.float(), values, out, slope)
        assert torch.equal(out, expected), isa
        assert_only_within(storage, out)

    with_threads(count, lambda: each_isa(run))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    result = ops.stem(pixels(0, 8, 12), *parameters(17), MEAN, STD, backend=backend)
    assert result.shape == (0, 17, 2, 3) and result.dtype is torch.float32


@needs_native
def test_any_strides():
    weight, scale, shift = parameters(7)
    image, raw = random(2, 3, 9, 14), pixels(2, 9, 14)
    args = weight, scale, shift, MEAN, STD
    spread = weight.transpose(0, 3).contiguous().transpose(0, 3), *torch.stack([scale, shift], 1).unbind(1)
    norm = torch.stack([MEAN, STD], 1).unbind(1)
    for pictures in (image, raw):
        expected = ops.stem(pictures, *args, size=(12, 16))
        for name, layout in layouts(pictures):
            result = ops.stem(layout, *spread, *norm, size=(12, 16), backend="native")
            assert torch.equal(result, expected), name
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slope", SLOPES)
def test_nan_and_inf_go_where_torch_sends_them(slope, backend):
    image, args = random(1, 3, 70, 85), parameters(19)
    image[0, 0, 5, 8], image[0, 1, 40, 20], image[0, 2, 60, 84] = float("nan"), float("inf"), -float("inf")
    result = ops.stem(image, *args, MEAN, STD, size=(72, 88), slope=slope, backend=backend)
    same_non_finite(result, truth(image, *args, MEAN, STD, (72, 88), slope))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_change_no_bit(dtype):
    image, args = pixels(2, 100, 40), parameters(20, dtype)
    assert_no_bit_changes(lambda: ops.stem(image, *args, MEAN, STD, backend="native"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    args = *parameters(6, dtype), MEAN, STD
    for image in (pixels(1, 8, 8), random(1, 3, 8, 8, dtype=dtype)):
        assert torch.equal(ops.stem(image, *args), stem_reference(image, *args, (8, 8)))
        if native.why_not is None:
            with pytest.raises(RuntimeError, match=f"^stem: .*{dtype}"):
                ops.stem(image, *args, backend="native")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradient(backend):
    inputs = [t.double().requires_grad_() for t in (random(1, 3, 5, 4), *parameters(2))]

    def run(image, *args):
        return ops.stem(image, *args, MEAN, STD, size=(8, 4), slope=0.01, backend=backend)

    torch.autograd.gradcheck(run, inputs)


@needs_native
@pytest.mark.parametrize("raw", [False, True])
def test_native_refuses_to_lose_a_gradient(raw):
    image = pixels(1, 8, 8) if raw else random(1, 3, 8, 8)
    # A normalised image does not need mean and std.
    for needing in range(1, 6) if raw else range(4):
        args = [image.clone(), *parameters(2), MEAN.clone(), STD.clone()]
        args[needing].requires_grad_()
        assert ops.stem(*args).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.stem(*args, backend="native")
        with torch.no_grad():
            ops.stem(*args, backend="native")


VALID = dict(
    image=torch.zeros(1, 8, 12, 3, dtype=torch.uint8),
    w=torch.zeros(5, 3, 7, 7),
    scale=torch.zeros(5),
    shift=torch.zeros(5),
    mean=torch.zeros(3),
    std=torch.ones(3),
)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(image=None), TypeError, "image is NoneType"),
        (dict(image=torch.zeros(8, 12, 3, dtype=torch.uint8)), ValueError, r"image is .*\(N, H, W, 3\)"),
        (dict(image=torch.zeros(1, 3, 8, 12, dtype=torch.uint8)), ValueError, r"image is .*\(N, H, W, 3\)"),
        (dict(image=torch.zeros(1, 8, 12, 3)), ValueError, r"image is .*\(N, 3, H, W\)"),
        (dict(image=torch.zeros(1, 3, 8, 12).double()), TypeError, "image is torch.float64.*torch.float32"),
        (dict(image=torch.zeros(1, 3, 8, 12, dtype=torch.int64)), TypeError, "image is torch.int64"),
        (dict(w=None), TypeError, "w is NoneType"),
        (dict(w=torch.zeros(5, 3, 3, 3)), ValueError, r"w is \(5, 3, 3, 3\).*\(K, 3, 7, 7\)"),
        (dict(w=torch.zeros(5, 1, 7, 7)), ValueError, r"w is \(5, 1, 7, 7\).*\(K, 3, 7, 7\)"),
        (dict(w=torch.zeros(5, 3, 7, 7, device="meta")), ValueError, "w is on meta"),
        (dict(scale=torch.zeros(3)), ValueError, r"scale is \(3,\).*needs \(5,\)"),
        (dict(scale=torch.zeros(5, device="meta")), ValueError, "scale is on meta"),
        (dict(shift=None), TypeError, "shift is NoneType"),
        (dict(shift=torch.zeros(5, device="meta")), ValueError, "shift is on meta"),
        (dict(mean=torch.zeros(5)), ValueError, r"mean is \(5,\).*needs \(3,\)"),
        (dict(mean=torch.zeros(3, device="meta")), ValueError, "mean is on meta"),
        (dict(std=torch.ones(3, 1)), ValueError, r"std is \(3, 1\).*needs \(3,\)"),
        (dict(std=torch.ones(3, device="meta")), ValueError, "std is on meta"),
        (dict(size=(8, 8)), ValueError, r"size is \(8, 8\).*\(8, 12\)"),
        (dict(size=(4, 12)), ValueError, r"size is \(4, 12\).*\(8, 12\)"),
        (dict(size=(8, 12), padded=(8, 8)), ValueError, r"padded is \(8, 8\).*\(8, 12\)"),
        (dict(size=(8, 12), padded=(12,)), ValueError, r"padded is \(12,\).*\(8, 12\)"),
        (dict(size=(6, 12), padded=(8, 12)), ValueError, r"size is \(6, 12\).*multiples of 4"),
        (dict(size=(10, 12)), ValueError, r"size is \(10, 12\).*multiples of 4"),
        (dict(size=(8, 14)), ValueError, r"size is \(8, 14\).*multiples of 4"),
        (dict(size=(12,)), ValueError, r"size is \(12,\)"),
        (dict(image=torch.zeros(1, 6, 12, 3, dtype=torch.uint8)), ValueError, r"size is \(6, 12\)"),
        (dict(slope=1.01), ValueError, "slope is 1.01"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message, backend):
    with pytest.raises(error, match=f"^stem: {message}"):
        ops.stem(**{**VALID, "backend": backend, **change})


@needs_native
@pytest.mark.parametrize(
    "image, dtype, size, padded",
    [
        (pixels(2, 7, 9), torch.float32, [8, 12], [8, 12]),
        (pixels(2, 7, 9), torch.float32, [16, 12], [8, 9]),
        (pixels(0, 8, 8), torch.float32, [8, 8], [8, 8]),
        (pixels(1, 1, 1), torch.bfloat16, [4, 4], [4, 4]),
        (random(1, 3, 8, 8), torch.float32, [8, 8], [8, 8]),
    ],
)
def test_opcheck(image, dtype, size, padded):
    args = image, *parameters(4, dtype), MEAN, STD, size, padded, 0.01, "native"
    torch.library.opcheck(torch.ops.shelfkern.stem.default, args)


@needs_native
def test_compile_and_export():
    args = pixels(2, 13, 10), *parameters(6), MEAN, STD
    expected = ops.stem(*args, size=(16, 12))
    compiled = torch.compile(
        lambda *args: ops.stem(*args, size=(16, 12)) * 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*args), expected)

    class Stem(nn.Module):
        def forward(self, *args):
            return ops.stem(*args, size=(16, 12))

    program = torch.export.export(Stem(), args)
    assert "shelfkern.stem" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)


# The CUDA kernel. Tiles of 7 x 8 pooled pixels: less than one, just one, and several with rests; rows of
# bytes that are whole words and not; channels of 64, of whole packs and not.
CUDA_SHAPES = [
    *SHAPES,
    (1, 28, 32, 64, (28, 32)),
    (2, 57, 68, 8, (60, 68)),
    (1, 29, 35, 65, (32, 36)),
    (1, 8, 12, 1, (8, 12)),
    (1, 11, 13, 7, (12, 16)),
    (3, 4, 4, 13, (4, 4)),
]


def images(n, h, w, dtype):
    """A raw image and a normalised one."""
    return pixels(n, h, w), random(n, 3, h, w, dtype=dtype)


def run_cuda(
    backend, image, parameters, norm=(MEAN, STD), size=None, slope=0.01, seed=0, frame=fenced, **options
):
    """The raw kernel into poisoned memory that nothing else is written of."""
    if backend == "emulated":
        native.emulation.set_seed(seed)
    height, width = size or (image.shape[1:3] if image.dtype is torch.uint8 else image.shape[2:])
    shape = image.shape[0], parameters[0].shape[0], height // 4, width // 4
    memory, out = frame(poisoned(shape, parameters[0].dtype))
    start, strides = out.storage_offset(), out.stride()
    image, memory, *rest = moved(backend, image, memory, *parameters, *norm)
    out = memory.as_strided(shape, strides, start)
    packed, values = pack_stem(*rest[:3]), normalised_values(*rest[3:])
    stem_cuda(image, packed, values, out, slope, backend, **options)
    result = out.cpu().clone()
    out.fill_(torch.nan)
    assert memory.isnan().all()
    return result


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_is_the_reference(shape, dtype, backend):
    args, size = parameters(shape[3], dtype), shape[4]
    for image in images(*shape[:3], dtype):
        check(run_cuda(backend, image, args, size=size), image, args, MEAN, STD, size, 0.01)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_rounds_whole_numbers_once(shape, dtype, backend):
    # Every sum is exact: no wrong fragment, border or tap goes unseen. 16ths keep results in float16's range.
    image, args, norm = pixels(*shape[:3]), whole(parameters(shape[3], dtype)), (WHOLE_MEAN, WHOLE_STD)
    args[1] = args[1] / 16
    normalised = image.permute(0, 3, 1, 2).to(dtype) - 3
    expected = truth(normalised, *args, *norm, shape[4], 0.25).to(dtype)
    for either in (image, normalised):
        assert torch.equal(run_cuda(backend, either, args, norm, shape[4], 0.25, seed=1), expected)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_cuda_every_slope(slope, dtype, backend):
    image, args, size = pixels(1, 13, 18), parameters(19, dtype), (16, 20)
    check(run_cuda(backend, image, args, size=size, slope=slope), image, args, MEAN, STD, size, slope)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_cuda_repeats_bit_for_bit(dtype, backend):
    image, args = pixels(2, 32, 36), parameters(65, dtype)
    first = run_cuda(backend, image, args)
    for seed, blocks in ((1, 1), (2, 3), (3, None)):
        assert torch.equal(run_cuda(backend, image, args, seed=seed, blocks=blocks), first)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("k", [13, 16])
def test_cuda_writes_windows_and_unaligned_memory(k, dtype, backend):
    image, args = pixels(2, 12, 36), parameters(k, dtype)
    expected = run_cuda(backend, image, args)

    def aligned(t):
        # Whole packs to the left and the right of each pixel's channels.
        n, c, h, w = t.shape
        memory = poisoned((n, h + 1, w + 1, c + 24), t.dtype)
        return memory, memory[:, 1:, 1:, 8:-16].permute(0, 3, 1, 2)

    for frame in (lambda t: framed(t, torch.nan), aligned):
        assert torch.equal(run_cuda(backend, image, args, frame=frame), expected)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_cuda_reads_images_of_any_strides(dtype, backend):
    args, size = parameters(9, dtype), (16, 36)
    for image in images(2, 14, 36, dtype):
        expected = run_cuda(backend, image, args, size=size)
        (image,) = moved(backend, image)
        for name, view in layouts(image):
            assert torch.equal(run_cuda(backend, view, args, size=size), expected), name
        left = torch.cat([image, image], 2)[:, :, : image.shape[2]]
        unaligned = torch.cat([image.flatten()[:1], image.flatten()])[1:].view(image.shape)
        for view in (left, unaligned):
            assert torch.equal(run_cuda(backend, view, args, size=size), expected)
        expanded = image[:1].expand_as(image)
        expected = run_cuda(backend, expanded.contiguous(), args, size=size)
        assert torch.equal(run_cuda(backend, expanded, args, size=size), expected)


@needs_emulator
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
def test_cuda_takes_images_far_apart(dtype):
    image, args = pixels(2, 8, 12), parameters(8, dtype)
    with far_apart((2, 3, 8, 12), torch.uint8) as far, far_apart((2, 8, 2, 3), dtype) as out:
        far.copy_(image.permute(0, 3, 1, 2))
        stem_cuda(
            far.permute(0, 2, 3, 1), pack_stem(*args), normalised_values(MEAN, STD), out, 0.01, "emulated"
        )
        check(out.clone(), image, args, MEAN, STD, (8, 12), 0.01)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
@pytest.mark.parametrize("dtype", CUDA_DTYPES)
@pytest.mark.parametrize("slope", SLOPES)
def test_cuda_sends_nan_and_inf_where_torch_does(slope, dtype, backend):
    # NaN beside the windows of pooled pixels that it does not reach: what pads a filter row is no part of it.
    image, args = random(1, 3, 40, 45, dtype=dtype), parameters(9, dtype)
    image[0, 2, 6, 10], image[0, 0, 6, 30], image[0, 1, 20, 19] = float("nan"), float("nan"), float("inf")
    image[0, 2, 35, 44] = -float("inf")
    x, *rest = moved(backend, image, *args)
    result = ops.stem(x, *rest, *moved(backend, MEAN, STD), size=(40, 48), slope=slope, backend=backend).cpu()
    same_non_finite(result, truth(image, *args, MEAN, STD, (40, 48), slope))


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_cuda_public_op(backend):
    args = parameters(24, torch.bfloat16)
    for image in images(2, 9, 14, torch.bfloat16):
        x, *rest = moved(backend, image, *args, MEAN, STD)
        result = ops.stem(x, *rest, size=(12, 16), backend=backend)
        assert result.is_contiguous(memory_format=torch.channels_last)
        check(result.cpu(), image, args, MEAN, STD, (12, 16), 0.0)
        assert ops.stem(x[:0], *rest, size=(12, 16), backend=backend).shape == (0, 24, 3, 4)


@needs_emulator
@pytest.mark.parametrize("raw", [True, False])
def test_cuda_reads_shared_memory_without_bank_conflicts(raw):
    image = images(1, 60, 64, torch.float16)[not raw]
    native.emulation.reset_statistics()
    run_cuda("emulated", image, parameters(64, torch.float16))
    counts = native.emulation.statistics()
    assert counts["launches"] == 1 and counts["bank_conflicts"] == 0
    # Of 3 x 2 tiles: 8 warps, 11 steps, 2 fragments of pixels and 8 of channels.
    assert counts["mma"] == 6 * 8 * 11 * 2 * 8
    assert counts["global_bytes_written"] == 15 * 16 * 64 * 2
