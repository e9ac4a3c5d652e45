"""quantize, and the codes of weights."""

from __future__ import annotations

import types

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    CUDA_DTYPES,
    DTYPES,
    each_isa,
    far_apart,
    layouts,
    moved,
    needs_native,
    needs_triton,
    nhwc,
    random,
)
from test_conv_bn_act import with_threads
from torch import nn

from shelfkern import native, ops
from shelfkern.ops import _triton
from shelfkern.ops.quantize import can_run, quantize_native, quantize_triton

CODES = [torch.int8, torch.float8_e4m3fn]
FLOAT8 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")


def assert_codes(codes, exact, tolerance):
    """Every code is that of a value within the tolerance of the exact one: in the middle between two codes
    either may come, elsewhere only one. exact: float64, in steps.
    """
    assert exact.dtype is torch.float64 and codes.shape == exact.shape
    low, high = (
        ops.quantize_reference(exact + sign * tolerance, 1.0, codes.dtype).double() for sign in (-1, 1)
    )
    found = codes.double()
    if codes.dtype is torch.int8:
        assert (high - low).max() <= 1
    assert torch.equal(found.isnan(), low.isnan())
    assert ((low <= found) & (found <= high) | found.isnan()).all()


def numbers(*values):
    """(1, 4, 1, n) float32."""
    flat = torch.cat([torch.as_tensor(v, dtype=torch.float32).flatten() for v in values])
    return torch.cat([flat, flat.new_zeros(-flat.numel() % 4)]).view(1, 4, 1, -1)


def every_middle(dtype):
    """All codes, the middles between neighbours, and the numbers beside those."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].unique()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [middles.nextafter(torch.full_like(middles, end)) for end in (-INF, INF)]
    return numbers(codes, middles, *beside, [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 448.1, 464.0, 464.1])


def test_the_reference_by_hand():
    x = numbers([0.25, 0.75, -0.25, -0.75, 1.0, 63.5, -64.0, -64.5, INF, -INF, NAN, 0.2499])
    expected = [0, 2, 0, -2, 2, 127, -128, -128, 127, -128, 0, 0]
    assert ops.quantize_reference(x, 0.5).flatten().tolist() == expected
    x = numbers([17.0, 19.0, -17.0, 480.0, -INF, 2.0**-10, 2.0**-10 * 1.001, 3 * 2.0**-10])
    expected = [16, 20, -16, 448, -448, 0, 2.0**-9, 2 * 2.0**-9]
    assert ops.quantize_reference(x, 1.0, FLOAT8).float().flatten().tolist() == expected
    assert ops.quantize_reference(numbers([NAN]), 1.0, FLOAT8)[0, 0].float().isnan().all()


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
def test_every_middle_goes_to_the_even(dtype):
    x = every_middle(dtype)
    result = ops.quantize(*moved("triton", x), 1.0, dtype, backend="triton").cpu()
    expected = ops.quantize_reference(x, 1.0, dtype)
    # Signs of zeros as well.
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
def test_float32_of_all_sizes(dtype):
    bits = torch.arange(0, 2**32, 104729)
    x = numbers(bits.where(bits < 2**31, bits - 2**32).int().view(torch.float32))
    result = ops.quantize(*moved("triton", x), 1.0, dtype, backend="triton").cpu()
    expected = ops.quantize_reference(x, 1.0, dtype)
    assert torch.equal(result.float().nan_to_num(999), expected.float().nan_to_num(999))


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("source", CUDA_DTYPES)
def test_what_is_not_finite(source, dtype):
    x = random(1, 20, 3, 5, dtype=source)
    x[0, 3, 1, 1], x[0, 4, 1, 1], x[0, 19, 2, 4] = NAN, INF, -INF
    result = ops.quantize(*moved("triton", x), 0.01, dtype, backend="triton").cpu().float()
    largest = (127, -128) if dtype is torch.int8 else (448, -448)
    assert (result[0, 4, 1, 1], result[0, 19, 2, 4]) == largest
    wanted = NAN if dtype is FLOAT8 else 0.0
    assert torch.equal(result[0, 3, 1, 1].isnan(), torch.tensor(wanted).isnan())
    assert result.isnan().sum() == (dtype is FLOAT8)
    if dtype is torch.int8:
        assert result[0, 3, 1, 1] == 0


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("source", CUDA_DTYPES)
@pytest.mark.parametrize("step", [0.013, 1.0, 3e-5, 2000.0])
def test_codes_are_those_of_a_value_within_rounding(step, source, dtype):
    x = random(2, 70, 5, 9, dtype=source) * min(60 * step, 1e4)
    result = ops.quantize(*moved("triton", x), step, dtype, backend="triton").cpu()
    exact = x.double() / step
    # Of the step, its reciprocal and the product: three roundings to 24 bits.
    assert_codes(result, exact, 2.0**-22 * exact.abs())
    if step == 0.013:
        assert len(result.float().unique()) > 50


def test_a_wrong_code_is_seen():
    exact = torch.tensor([[[[0.5000001, 0.4, 7.0]]]], dtype=torch.float64)
    for codes, right in (([0, 0, 7], True), ([1, 0, 7], True), ([1, 1, 7], False), ([1, 0, 8], False)):
        codes = torch.tensor(codes, dtype=torch.int8).view(1, 1, 1, 3)
        if right:
            assert_codes(codes, exact, 1e-6)
        else:
            with pytest.raises(AssertionError):
                assert_codes(codes, exact, 1e-6)


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("c", [1, 21, 64, 130])
def test_writes_every_code_and_nothing_else(c, dtype):
    x = moved("triton", nhwc(random(2, c, 3, 7, dtype=torch.float16)))[0]
    expected = ops.quantize_reference(x, 1 / 32, dtype)
    for poison in (33, 44):
        frame = torch.full((4, 5, 9, c + 3), poison, dtype=torch.uint8, device=x.device).view(dtype)
        codes = frame[1:-1, 1:-1, 1:-1, 1:-2].permute(0, 3, 1, 2)
        quantize_triton(x, 1 / 32, codes)
        assert torch.equal(codes.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        around = torch.ones(frame.shape, dtype=torch.bool, device=x.device)
        around[1:-1, 1:-1, 1:-1, 1:-2] = False
        assert (frame.view(torch.uint8)[around] == poison).all()


@needs_triton
def test_takes_images_far_apart():
    x = random(2, 9, 3, 4, dtype=torch.float16)
    device = moved("triton", x)[0].device
    with far_apart(x.shape, x.dtype, device) as far, far_apart(x.shape, torch.int8, device) as codes:
        quantize_triton(far.copy_(x), 0.25, codes)
        assert torch.equal(codes.cpu(), ops.quantize_reference(x, 0.25))


@needs_triton
@given(
    n=st.integers(0, 3), c=st.integers(1, 140), h=st.integers(1, 9), w=st.integers(1, 9),
    dtype=st.sampled_from(CODES), source=st.sampled_from(CUDA_DTYPES), power=st.integers(-6, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_on_what_hypothesis_draws(n, c, h, w, dtype, source, power):
    x, step = random(n, c, h, w, dtype=source), 2.0**power
    result = ops.quantize(*moved("triton", x), step, dtype, backend="triton").cpu()
    assert torch.equal(result.float(), ops.quantize_reference(x, step, dtype).float())


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
def test_layouts(dtype):
    x = random(2, 12, 3, 5)
    expected = ops.quantize_reference(x, 1 / 16, dtype).float()
    for name, given_x in layouts(x):
        result = ops.quantize(*moved("triton", given_x), 1 / 16, dtype, backend="triton")
        assert result.dtype is dtype and result.is_contiguous(memory_format=torch.channels_last), name
        assert torch.equal(result.cpu().float(), expected), name
    expanded = moved("triton", x)[0][:, :1, :, :1].expand(2, 12, 3, 5)
    assert torch.equal(
        ops.quantize(expanded, 1 / 16, backend="triton").cpu(),
        ops.quantize_reference(expanded.cpu(), 1 / 16),
    )
    assert ops.quantize(moved("triton", x)[0][:0], 1.0, dtype, backend="triton").shape == (0, 12, 3, 5)


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
def test_opcheck(dtype):
    x = moved("triton", random(2, 5, 3, 4))[0]
    torch.library.opcheck(torch.ops.shelfkern.quantize.default, (x, 0.1, dtype, "triton"))


@needs_triton
@pytest.mark.parametrize("dtype", CODES)
def test_compile_and_export(dtype):
    x = moved("triton", random(2, 8, 5, 4))[0]
    options = dict(step=0.125, dtype=dtype, backend="triton")
    expected = ops.quantize(x, **options).float()
    compiled = torch.compile(
        lambda x: ops.quantize(x, **options).float(), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), expected)

    class Codes(nn.Module):
        def forward(self, x):
            return ops.quantize(x, **options).float()

    program = torch.export.export(Codes(), (x,))
    assert "shelfkern.quantize" in str(program.graph)
    assert torch.equal(program.module()(x), expected)


@needs_triton
def test_loses_no_gradient():
    x = moved("triton", random(1, 2, 3, 4))[0].requires_grad_()
    with pytest.raises(RuntimeError, match="requires grad, and the triton kernel has no gradient"):
        ops.quantize(x, 1.0, backend="triton")
    with torch.no_grad():
        ops.quantize(x, 1.0, backend="triton")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(1, 2, 3)), ValueError, r"^quantize: x is \(1, 2, 3\), it must be "),
        (dict(x=torch.zeros(1, 2, 3, 4, dtype=torch.int8)), TypeError, "torch.int8, it must be floating"),
        (dict(step=0.0), ValueError, "step is 0.0, it must be a finite number above 0"),
        (dict(step=-1.0), ValueError, "step is -1.0"),
        (dict(step=NAN), ValueError, "step is nan"),
        (dict(step=INF), ValueError, "step is inf"),
        (dict(dtype=torch.uint8), ValueError,
         "dtype is torch.uint8, it may be torch.int8 or torch.float8_e4m3fn"),
        (dict(backend="cuda"), RuntimeError, "which cannot run: quantize has no such kernel"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    call = dict(x=torch.zeros(1, 2, 3, 4), step=1.0) | change
    with pytest.raises(error, match=message):
        ops.quantize(**call)


def test_float8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(native, "disabled", {})
    monkeypatch.setattr(_triton, "why_not", None)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float16)
    for capability, reason in (((8, 9), None), ((9, 0), None), ((8, 0), "capability 8.0, codes of torch.f")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert can_run(x)["triton"] is None
        because = can_run(x, FLOAT8)["triton"]
        assert because is None if reason is None else reason in because


@pytest.mark.parametrize("dtype", CODES)
def test_weights(dtype):
    w = random(6, 5, 3, 2) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1e-44, 0.0])[:, None, None, None]
    w.requires_grad_()
    codes, step = ops.quantize_weight(w, dtype)
    assert codes.dtype is dtype and codes.shape == (6, 6, 5) and codes.is_contiguous()
    assert step.dtype is torch.float32 and step.shape == (6,) and not step.requires_grad
    largest = 127 if dtype is torch.int8 else 448
    assert torch.equal(codes.float().abs().amax((1, 2))[:4], torch.full((4,), float(largest)))
    assert torch.equal(step[:4], w.detach().abs().amax((1, 2, 3))[:4] / largest)
    assert step[5] == 1 and (codes[5].float() == 0).all() and (step > 0).all()
    unpacked = codes.float().view(6, 3, 2, 5).permute(0, 3, 1, 2)
    off = (unpacked * step[:, None, None, None] - w.detach()).abs()[:4]
    # Half a step of int8; of float8 half of the largest's last bit, which is 32 steps.
    assert (off <= step[:4, None, None, None] * (0.501 if dtype is torch.int8 else 16.01)).all()


def test_negative_and_positive_weights_have_opposite_codes():
    w = random(4, 7, 3, 3, dtype=torch.float16)
    for dtype in CODES:
        codes, mirrored = (ops.quantize_weight(sign * w, dtype)[0].float() for sign in (1, -1))
        assert torch.equal(codes, -mirrored)


def test_weights_that_have_no_codes():
    w = random(2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"^quantize_weight: dtype is torch.uint8, it may be torch.int8 or"):
        ops.quantize_weight(w, torch.uint8)
    for value in (NAN, INF):
        w[1, 2] = value
        with pytest.raises(ValueError, match=r"^quantize_weight: w holds what is not finite, every weight"):
            ops.quantize_weight(w, torch.int8)


@needs_native
def test_native_next_to_the_middle_of_two_codes_on_every_isa():
    middles = torch.arange(-129, 129).float() + 0.5
    infinity = torch.tensor(INF)
    x = torch.cat([middles, middles.nextafter(infinity), middles.nextafter(-infinity)]).view(1, -1, 1, 1)

    def run(isa):
        codes = torch.zeros(x.shape, dtype=torch.int8)
        quantize_native(x, 1.0, codes)
        assert torch.equal(codes, ops.quantize_reference(x, 1.0)), isa

    each_isa(run)


@needs_native
@given(
    n=st.integers(0, 3), c=st.integers(1, 140), h=st.integers(1, 9), w=st.integers(1, 9),
    source=st.sampled_from(DTYPES), power=st.integers(-6, 3),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_native_on_every_isa(n, c, h, w, source, power):
    x, step = nhwc(random(n, c, h, w, dtype=source)), 2.0**power
    expected = ops.quantize_reference(x, step)

    def run(isa):
        storage = torch.full((x.numel() + 64,), 33, dtype=torch.int8)
        codes = storage[32:-32].view(n, h, w, c).permute(0, 3, 1, 2)
        quantize_native(x, step, codes)
        assert torch.equal(codes, expected), isa
        assert (storage[:32] == 33).all() and (storage[-32:] == 33).all()

    each_isa(run)


@needs_native
def test_native_many_elements_on_every_thread():
    x = 40 * random(1, 21, 70, 90)
    for threads in (1, 3):
        found = with_threads(threads, lambda: ops.quantize(x, 0.5, backend="native"))
        assert torch.equal(found, ops.quantize_reference(x, 0.5))


@needs_native
@pytest.mark.parametrize("source", DTYPES)
def test_native_what_is_not_finite_on_every_isa(source):
    x = random(1, 20, 3, 5, dtype=source)
    x[0, 3, 1, 1], x[0, 4, 1, 1], x[0, 19, 2, 4] = NAN, INF, -INF

    def run(isa):
        result = ops.quantize(x, 0.01, backend="native")
        assert (result[0, 3, 1, 1], result[0, 4, 1, 1], result[0, 19, 2, 4]) == (0, 127, -128)

    each_isa(run)


@needs_native
def test_native_makes_no_float8():
    with pytest.raises(RuntimeError, match=r"dtype is torch\.float8_e4m3fn, the native kernel makes int8"):
        ops.quantize(torch.zeros(1, 1, 1, 1), 1.0, FLOAT8, backend="native")
