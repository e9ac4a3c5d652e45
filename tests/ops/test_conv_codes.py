"""Convolutions of codes of 8 bits, and of those that write codes: conv_bn_act and shared_block."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    EVERY,
    Layer,
    assert_as_exact,
    far_apart,
    moved,
    needs_triton,
    needs_triton_on_a_gpu,
    poisoned,
    random,
)
from test_conv_bn_act import NETWORK, assert_only_within, framed, walled
from test_quantize import assert_codes

from shelfkern import ops
from shelfkern.ops import _conv_triton as conv
from shelfkern.ops.conv_bn_act import (
    conv_bn_act_codes_reference,
    conv_bn_act_reference,
    conv_bn_act_triton,
    out_shape,
)
from shelfkern.ops.shared_block import shared_block_triton

CODES = [torch.int8, torch.float8_e4m3fn]
WIDE = [torch.float16, torch.bfloat16, torch.float32]
SMALL = conv.Config(64, 64, 64, 4, 3)
SPLIT = dataclasses.replace(SMALL, split=3)
NAN, INF = float("nan"), float("inf")
# n, c, h, w, k, kernel, stride, padding
SHAPE = (2, 19, 5, 4, 67, (3, 3), 2, 1)


@dataclasses.dataclass
class OfTaps(Layer):
    """The arguments of the raw kernel: weights (K, taps, C), residual and skip of a wide dtype."""

    kernel: tuple[int, int]

    @property
    def tensors(self):
        return self.x, self.weight, self.scale, self.shift, self.residual, self.skip

    @property
    def sizes(self):
        return self.kernel, self.stride, self.padding, self.slope

    def truth(self, step, codes_dtype):
        return conv_bn_act_codes_reference(*self.tensors, *self.sizes, step, codes_dtype)


def small_numbers(*shape, seed, dtype):
    """Whole numbers from -4 to 4: sums of their products, and quarters of these, are exact in float32."""
    return (2 * random(*shape, seed=seed)).round().clamp(-4, 4).to(dtype)


def layer(shape, dtype, wide=torch.float16, present=EVERY, slope=0.25):
    """A layer whose result is exact in float32: scales are powers of two."""
    n, c, h, w, k, kernel, stride, padding = shape
    x, filters = small_numbers(n, c, h, w, seed=0, dtype=dtype), torch.zeros(k, c, *kernel)
    weight = small_numbers(k, kernel[0] * kernel[1], c, seed=1, dtype=dtype)
    maps = out_shape(x, filters, stride, padding)
    scale = 2.0 ** torch.arange(k).remainder(4).sub(3)
    shift = small_numbers(k, seed=2, dtype=torch.float32)
    others = (small_numbers(*maps, seed=seed, dtype=wide) for seed in (3, 4))
    return OfTaps(x, weight, scale, shift, *others, stride, padding, slope, kernel).only(present)


def random_layer(shape, dtype, wide=torch.float16):
    """Codes of random numbers, and the scale that makes the result about 1."""
    n, c, h, w, k, kernel, stride, padding = shape
    weight, step = ops.quantize_weight(random(k, c, *kernel, seed=1), dtype)
    x_step = 4 / (127 if dtype is torch.int8 else 448)
    x = ops.quantize_reference(random(n, c, h, w), x_step, dtype)
    maps = out_shape(x, torch.zeros(k, c, *kernel), stride, padding)
    scale = step * x_step * (1 + random(k, seed=2).abs()) / (c * kernel[0] * kernel[1]) ** 0.5
    others = random(k, seed=3), random(*maps, seed=4, dtype=wide), random(*maps, seed=5, dtype=wide)
    return OfTaps(x, weight, scale, *others, stride, padding, 0.25, kernel)


def window(t, fill):
    """On the kernels' device, a window equal to t of a larger NHWC tensor of `fill`; None for None."""
    return None if t is None else framed(moved("triton", t)[0], fill)[1]


def poisoned_codes(shape, dtype, poison):
    """A frame of a byte, and the window in it."""
    n, c, h, w = shape
    frame = torch.full((n + 2, h + 2, w + 2, c + 3), poison, dtype=torch.uint8)
    frame = moved("triton", frame)[0].view(dtype)
    return frame, frame[1:-1, 1:-1, 1:-1, 1:-2].permute(0, 3, 1, 2)


def run(of, config=SMALL, wide=torch.float16, codes_dtype=torch.int8, step=0.5, poison=0x55, **options):
    """The raw kernel: result and codes, either None where its dtype is. Inputs have numbers around them that
    would show, outputs poison that may not change.
    """
    x, residual, skip = window(of.x, 77), window(of.residual, NAN), window(of.skip, NAN)
    weight, scale, shift = moved("triton", *of.tensors[1:4])
    scale, shift = (None if t is None else walled(t) for t in (scale, shift))
    shape = out_shape(of.x, torch.zeros(weight.shape[0], of.x.shape[1], *of.kernel), of.stride, of.padding)
    out_frame, out = frame, codes = None, None
    if wide is not None:
        out_frame, out = framed(moved("triton", poisoned(shape, wide))[0], NAN)
    if codes_dtype is not None:
        frame, codes = poisoned_codes(shape, codes_dtype, poison)
        options.update(codes=codes, codes_step=step)
    after = (scale, shift, residual, skip, out)
    conv_bn_act_triton(x, weight, *after, *of.sizes, config, **options)
    if wide is not None:
        assert_only_within(out_frame, out)
    if codes_dtype is not None:
        around = torch.ones(frame.shape, dtype=torch.bool, device=frame.device)
        around[1:-1, 1:-1, 1:-1, 1:-2] = False
        assert (frame.view(torch.uint8)[around] == poison).all()
    return tuple(None if t is None else t.cpu() for t in (out, codes))


def check_exact(of, wide=torch.float16, codes_dtype=torch.int8, step=0.5, **options):
    """Both results are the exact ones, rounded once; and no code is left as it was."""
    truth, truth_codes = of.truth(step, codes_dtype or torch.int8)
    for poison in (0x55, 0x2A) if codes_dtype is not None else (0,):
        out, codes = run(of, wide=wide, codes_dtype=codes_dtype, step=step, poison=poison, **options)
        if wide is not None:
            assert torch.equal(out, truth.to(wide))
        if codes_dtype is not None:
            assert codes.dtype is codes_dtype
            assert torch.equal(codes.float(), truth_codes.float())


@pytest.fixture
def parts(monkeypatch):
    """The workspaces of split sums, which start as poison and have poison around them."""
    taken = []

    def poisoned_workspace(config, pixels, channels, like):
        if config.split == 1:
            return None
        dtype = conv.sum_dtype(like.dtype)
        frame = torch.full((config.split * pixels * channels + 1024,), 10**9, dtype=dtype).to(like.device)
        taken.append(frame)
        return frame[512:-512].view(config.split, pixels, channels)

    monkeypatch.setattr(conv, "workspace", poisoned_workspace)
    yield taken
    for frame in taken:
        assert (frame[:512] == 10**9).all() and (frame[-512:] == 10**9).all()
        assert (frame[512:-512] != 10**9).all()


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("config", conv.CONFIGS + conv.SMALL_CONFIGS)
def test_every_configuration(config, swapped, dtype, parts):
    config = dataclasses.replace(config, swap=config.swap != swapped)
    check_exact(layer(SHAPE, dtype), config=config, codes_dtype=dtype)
    assert len(parts) == 2 * (config.split > 1)


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", [2, 3, 8, 10])
def test_every_split(split, swap, dtype, parts):
    # 5 taps of two blocks of channels make 10 steps, and 9 steps leave the last parts without one.
    for shape in ((1, 70, 3, 5, 5, (1, 5), 1, 2), (1, 20, 3, 4, 3, (3, 3), 1, 1)):
        check_exact(layer(shape, dtype), config=dataclasses.replace(SMALL, split=split, swap=swap))


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("slope", [0.0, 0.25, None])
@pytest.mark.parametrize("present", [(), *((name,) for name in EVERY), EVERY])
def test_every_part_of_the_epilogue(present, slope, config):
    of = layer((1, 33, 5, 4, 19, (2, 1), 1, 0), torch.int8, torch.bfloat16, present, slope)
    check_exact(of, wide=torch.bfloat16, config=config)


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("codes_dtype", [None, *CODES])
@pytest.mark.parametrize("wide", [None, *WIDE])
@pytest.mark.parametrize("dtype", [*CODES, *WIDE])
def test_every_pair_of_results(dtype, wide, codes_dtype, config):
    if wide is None and codes_dtype is None:
        return
    between = dtype if dtype in WIDE else torch.bfloat16
    check_exact(
        layer((1, 40, 4, 5, 21, (3, 3), 1, 1), dtype, between),
        wide=wide, codes_dtype=codes_dtype, step=0.25, config=config,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("kernel, stride, padding", [((1, 1), 2, 0), ((7, 7), 2, 3), ((2, 5), 1, 2)])
def test_strides_and_paddings(kernel, stride, padding, dtype):
    check_exact(layer((1, 5, 8, 9, 6, kernel, stride, padding), dtype), codes_dtype=dtype)


@needs_triton
@given(
    n=st.integers(1, 3), c=st.one_of(st.integers(1, 35), st.sampled_from([64, 65, 129])),
    h=st.integers(2, 7), w=st.integers(2, 12), k=st.integers(1, 70), kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 3), present=st.sets(st.sampled_from(EVERY)), dtype=st.sampled_from(CODES),
    codes_dtype=st.sampled_from(CODES), config=st.sampled_from([None, SMALL, SPLIT]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_on_what_hypothesis_draws(n, c, h, w, k, kernel, stride, present, dtype, codes_dtype, config):
    shape = (n, c, h, w, k, (kernel, kernel), stride, kernel // 2)
    check_exact(layer(shape, dtype, present=present), codes_dtype=codes_dtype, config=config)


@needs_triton
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, split=4)])
def test_sums_of_int8_are_exact_beyond_float32(config):
    # About 2**26: float32 would round every part, and then the sum of parts.
    x = torch.randint(120, 128, (1, 8192, 1, 5), dtype=torch.int8)
    weight = torch.randint(120, 128, (7, 1, 8192), dtype=torch.int8)
    of = OfTaps(x, weight, None, None, None, None, 1, 0, 0.25, (1, 1))
    truth, _ = of.truth(1.0, torch.int8)
    assert (truth != truth.float().double()).any()
    out, _ = run(of, config, torch.float32, None)
    assert torch.equal(out, truth.float())


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [SHAPE, (1, 64, 5, 6, 40, (3, 3), 1, 1), (1, 300, 2, 3, 17, (1, 1), 1, 0)])
def test_random_codes_are_those_of_a_value_within_rounding(shape, dtype, config):
    of, step = random_layer(shape, dtype), 0.03
    out, codes = run(of, config, codes_dtype=dtype, step=step)
    truth, _ = of.truth(step, dtype)
    # What float32 sums may be off, of int8 only in the epilogue: 2**-20 of what was added up.
    magnitude = dataclasses.replace(
        of, x=of.x.double().abs(), weight=of.weight.double().abs(), shift=of.shift.abs(),
        residual=of.residual.abs(), skip=of.skip.abs(),
    ).truth(step, dtype)[0]  # fmt: skip
    assert_codes(codes, truth / step, 2.0**-20 * magnitude / step)
    assert len(codes.float().unique()) > 40
    assert_as_exact(out, truth, eager(of, out.dtype).cpu())


def eager(of, dtype):
    """The layer in torch's own convolution of a wide dtype, with the codes' steps in the weights."""
    x, weight, scale, *after = moved("triton", *of.tensors)
    w = (weight.float() * scale[:, None, None]).unflatten(1, of.kernel).permute(0, 3, 1, 2)
    options = of.stride, of.padding, of.slope
    return conv_bn_act_reference(x.to(dtype), w.to(dtype), None, *after, *options)


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("codes_dtype", CODES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_what_is_not_finite(dtype, codes_dtype, config):
    of = layer((1, 33, 5, 6, 18, (3, 3), 1, 1), dtype)
    of.x[0, 7, 1, 1] = NAN
    of.residual[0, 3, 4, 5], of.skip[0, 4, 4, 5], of.skip[0, 5, 4, 5] = NAN, INF, -INF
    expected, expected_codes = of.truth(0.5, codes_dtype)
    _, codes = poisoned_codes(tuple(expected.shape), codes_dtype, 0x55)
    x, residual, skip, out = (window(t, 0) for t in (of.x, of.residual, of.skip, torch.zeros_like(of.skip)))
    after = (*moved("triton", *of.tensors[1:4]), residual, skip, out)
    conv_bn_act_triton(x, *after, *of.sizes, config, codes=codes, codes_step=0.5)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    found = codes.cpu().float()
    if codes_dtype is torch.int8:
        assert (found[expected.isnan()] == 0).all()
    else:
        assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(99), expected_codes.float().nan_to_num(99))
    largest = [127, -128] if codes_dtype is torch.int8 else [448, -448]
    assert found[0, 4:6, 4, 5].tolist() == largest


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
def test_images_far_apart(config):
    of = layer((2, 9, 3, 4, 5, (3, 3), 1, 1), torch.int8, present=("scale", "shift", "skip"))
    truth, truth_codes = of.truth(0.5, torch.int8)
    device = moved("triton", of.x)[0].device
    weight, scale, shift = moved("triton", *of.tensors[1:4])
    with (
        far_apart(of.x.shape, torch.int8, device) as x,
        far_apart(truth.shape, torch.int8, device) as codes,
        far_apart(truth.shape, torch.float16, device) as skip,
    ):
        x.copy_(of.x), skip.copy_(of.skip)
        after = (scale, shift, None, skip, None)
        conv_bn_act_triton(x, weight, *after, *of.sizes, config, codes=codes, codes_step=0.5)
        assert torch.equal(codes.cpu(), truth_codes)


@needs_triton
@pytest.mark.parametrize("dtype", [*CODES, torch.float16])
def test_parts_are_the_callers(dtype, monkeypatch):
    of, config = layer((1, 40, 3, 4, 21, (3, 3), 1, 1), dtype), SPLIT
    expected = run(of, config)
    monkeypatch.setattr(conv, "workspace", None)
    memory = torch.full((conv.scratch_bytes(config, 12, 21) // 4 + 100,), 10**9, dtype=torch.int32)
    memory = moved("triton", memory)[0]
    found = run(of, config, parts=memory)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (memory[-100:] == 10**9).all() and (memory[:-100] != 10**9).all()
    with pytest.raises(ValueError, match=r"^parts has 4 bytes, a sum split in 3 needs 3024$"):
        run(of, config, parts=memory[:1])


@needs_triton
def test_there_is_something_to_write():
    of = layer((1, 3, 3, 4, 5, (1, 1), 1, 0), torch.int8)
    message = "^conv_bn_act: out and codes are None, at least one of them must be a tensor$"
    with pytest.raises(ValueError, match=message):
        conv_bn_act_triton(*of.tensors, None, *of.sizes)


@needs_triton
def test_codes_that_cannot_be_stored_together_take_small_tiles(monkeypatch):
    asked, right = [], conv.best
    monkeypatch.setattr(conv, "best", lambda problem, *rest: asked.append(problem) or right(problem, *rest))
    x = torch.zeros(1, 4, 4, 32, dtype=torch.int8).permute(0, 3, 1, 2)
    weight, out = torch.zeros(32, 1, 32, dtype=torch.int8), torch.zeros(1, 4, 4, 32).permute(0, 3, 1, 2)
    for codes in (torch.empty_like(x), poisoned_codes((1, 32, 4, 4), torch.int8, 0)[1]):
        tensors = moved("triton", x, weight, None, None, None, None, out)
        conv_bn_act_triton(*tensors, (1, 1), 1, 0, None, codes=codes.to(tensors[0].device))
    assert [problem.aligned for problem in asked] == [True, False]


@needs_triton
@pytest.mark.parametrize("config", [SMALL, SPLIT])
@pytest.mark.parametrize("dtype", CODES)
def test_repeats_bit_for_bit(dtype, config):
    of = random_layer((1, 70, 4, 5, 20, (3, 3), 1, 1), dtype)
    first = run(of, config)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(of, config), first, strict=True))


# The shared block: hidden is codes too, with a step of its own.
def block(dtype, config, skip=True, out=torch.float16, codes_dtype=torch.int8, **options):
    """What the kernel makes of a block, and what the two convolutions do."""
    first = layer((1, 24, 5, 6, 24, (3, 3), 1, 1), dtype, present=("scale", "shift"))
    residual = small_numbers(*first.x.shape, seed=7, dtype=torch.float16)
    _, hidden_codes = first.truth(0.5, dtype)
    # Both convolutions have the weights; the second one's scale holds the step of hidden.
    scale2, shift2 = first.scale.flip(0) / 2, first.shift.flip(0)
    second = dataclasses.replace(
        first, x=hidden_codes, scale=scale2, shift=shift2, residual=residual,
        skip=residual if skip else None, slope=0.0,
    )  # fmt: skip
    expected = second.truth(2.0, codes_dtype or torch.int8)
    x, hidden, result, again = (
        window(t, 0) for t in (first.x, first.x, expected[0].to(torch.float16), residual)
    )
    hidden.fill_(13)
    result.fill_(NAN)
    _, codes = poisoned_codes(tuple(result.shape), codes_dtype or torch.int8, 0x55)
    parameters = moved("triton", first.weight, first.scale, first.shift, scale2, shift2)
    shared_block_triton(
        x, *parameters, hidden, result if out else None, first.slope, skip, config, None, False,
        residual=again, codes=codes if codes_dtype else None, codes_step=2.0, hidden_step=0.5, **options,
    )  # fmt: skip
    return (result.cpu(), codes.cpu()), (expected[0].to(torch.float16), expected[1])


@needs_triton
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("config", [SMALL, (SPLIT, SMALL), (SMALL, SPLIT)])
@pytest.mark.parametrize("dtype", CODES)
def test_shared_block(dtype, config, skip):
    for out, codes_dtype in ((True, dtype), (True, None), (False, dtype)):
        found, expected = block(dtype, config, skip, out, codes_dtype)
        if out:
            assert torch.equal(found[0], expected[0])
        if codes_dtype:
            assert torch.equal(found[1].float(), expected[1].float())


@needs_triton
def test_shared_block_takes_a_configuration_for_each(monkeypatch):
    taken, right = [], conv.workspace
    monkeypatch.setattr(conv, "workspace", lambda config, *rest: taken.append(config) or right(config, *rest))
    block(torch.int8, (SMALL, SPLIT))
    assert taken == [SMALL, SPLIT]
    taken.clear()
    block(torch.int8, SPLIT)
    assert taken == [SPLIT, SPLIT]


@needs_triton
def test_shared_block_shares_memory_for_parts(monkeypatch):
    monkeypatch.setattr(conv, "workspace", None)
    memory = moved("triton", torch.full((conv.scratch_bytes(SPLIT, 30, 24) // 4,), NAN))[0]
    found, expected = block(torch.int8, SPLIT, parts=memory)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_triton
def test_shared_block_of_codes_needs_what_they_stand_for():
    x = torch.zeros(1, 4, 3, 3, dtype=torch.int8)
    weight, norm = torch.zeros(4, 9, 4, dtype=torch.int8), torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"^shared_block: residual is None, it must be given where x is torch"
    ):
        shared_block_triton(x, weight, norm, norm, norm, norm, x, x, 0.0, False)


@needs_triton_on_a_gpu
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", NETWORK)
def test_every_configuration_of_the_networks_layers(shape, dtype):
    of = random_layer(shape, dtype)
    truth, _ = of.truth(1.0, torch.int8)
    allowed = eager(of, torch.float16).cpu()
    pixels = truth.numel() // shape[4]
    problem = conv.Problem(pixels, shape[4], of.weight.shape[1], shape[1], dtype)
    for config in conv.configurations(problem, "tf32", 132):
        out, _ = run(of, config, codes_dtype=None, overlap=True)
        assert_as_exact(out, truth, allowed)


@needs_triton_on_a_gpu
def test_launches_that_overlap_change_no_bit():
    of = random_layer((1, 256, 32, 32, 256, (3, 3), 1, 1), torch.int8)
    expected = run(of, SPLIT)
    for _ in range(20):
        found = run(of, SPLIT, overlap=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
