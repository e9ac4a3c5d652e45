from __future__ import annotations

import ctypes

import pytest
import torch
from parity import each_isa, needs_native
from torch.nn import functional as F

from shelfkern import native, ops
from shelfkern.ops import selftest
from shelfkern.ops.quantize import Quantum

pytestmark = needs_native

# For each op: the native function that it calls, and which of its arguments is the address of its output.
OUTPUTS = {
    "attention_gate": ("attention_gate", 4),
    "bn_act_dropout": ("bn_act_dropout", 5),
    "conv_bn_act": ("conv_bn_act", 6),
    "deconv_add": ("conv_bn_act", 6),
    "quantize": ("quantize", 1),
    "shared_block": ("conv_bn_act", 6),
    "stem": ("stem", 5),
    "upsample_add": ("upsample_add", 3),
    "upsample_argmax": ("upsample_argmax", 1),
    "upsample_bilinear": ("upsample_bilinear", 1),
    "upsample_cross_entropy": ("upsample_cross_entropy", None),
    "upsample_softmax_sum": ("upsample_softmax_sum", 1),
}
# The same of what is tested in training.
GRADIENTS = {
    "bn_act_dropout": ("bn_act_dropout_backward", 7),
    "conv_train": ("winograd", 8),
    "max_pool_train": ("max_pool_backward", 2),
    "shared_block_train": ("bn_act_dropout_backward", 7),
    "upsample_bilinear": ("upsample_bilinear_backward", 1),
    "upsample_cross_entropy": ("upsample_cross_entropy", 18),
}
OF_BYTES = ("quantize", "upsample_argmax")
# What is called for codes: the op, the function, its output, and the argument that tells codes from floats.
U8 = native.DTYPE_CODES[torch.uint8]
CODED = [
    ("attention_gate", "attention_gate", 4, 5, U8),
    ("conv_bn_act", "conv_bn_act", 6, 7, U8),
    ("conv_bn_act", "winograd", 8, 9, U8),
    ("deconv_add", "conv_bn_act", 6, 7, U8),
    # Signed codes lie 128 lower.
    ("quantize", "quantize", 1, 6, 0),
    ("stem", "stem", 5, 7, U8),
    ("upsample_add", "upsample_add", 3, 4, U8),
]
NATIVE = [op for op, kernels in ops.KERNELS.items() if "native" in kernels]


@pytest.fixture(autouse=True)
def untested(monkeypatch):
    """No op tested and none switched off, before and after."""
    monkeypatch.setattr(native, "disabled", {})
    selftest.run.cache_clear()
    yield
    selftest.run.cache_clear()


def spoil(monkeypatch, op, value=None, outputs=OUTPUTS):
    """Makes the first number that the op's kernel writes wrong by a little, or the given float."""
    function, position = outputs[op]
    right = getattr(native.module, function)

    def wrong(*args):
        result = right(*args)
        if position is None:  # the sum of losses is returned
            total, *others = result
            return (1.01 * total if value is None else value, *others)
        if not args[position]:  # an output that is not wanted
            return result
        if op in OF_BYTES:
            label = ctypes.c_uint8.from_address(args[position])
            label.value = (label.value + 1) % 19
        else:
            number = ctypes.c_float.from_address(args[position])
            number.value = number.value + 1e-3 if value is None else value
        return result

    monkeypatch.setattr(native.module, function, wrong)


def call(op, backend):
    """What the public op, or with None its reference, makes of the self-test's float32 inputs."""
    public, reference, tensors, arguments = selftest._cases()[op]
    narrow = [t.float() if t.is_floating_point() else t for t in tensors]
    if backend is None:
        return reference(*narrow, **arguments)
    return public(*narrow, **arguments, backend=backend)


def test_every_op_has_a_case():
    assert set(selftest._cases()) == set(ops.NAMES)
    assert set(OUTPUTS) == set(NATIVE)
    assert set(selftest._training_cases()) == set(selftest.TRAINING) == set(GRADIENTS)
    assert set(selftest._codes_cases()) == set(selftest.CODES) == {op for op, *_ in CODED}


def test_all_pass():
    results = [result for result in selftest.run_all() if result.backend == "native"]
    assert [result.op for result in results if result.kind == ""] == list(NATIVE)
    assert [result.op for result in results if result.kind == "gradient"] == list(GRADIENTS)
    assert [result.op for result in results if result.kind == "codes"] == list(selftest.CODES)
    for result in results:
        assert result.reason is None and 0 <= result.error <= selftest.LIMIT and not result.failed
    assert native.disabled == {}


def test_all_pass_with_every_isa():
    def run(isa):
        selftest.run.cache_clear()
        assert not any(result.failed for result in selftest.run_all()), isa

    each_isa(run)


@pytest.mark.parametrize("op", NATIVE)
def test_a_wrong_kernel_is_found_and_switched_off(op, monkeypatch):
    spoil(monkeypatch, op)
    assert not torch.equal(call(op, "native"), call(op, None))
    result = selftest.run(op)
    assert result.failed and result.error > selftest.LIMIT
    assert native.reason(op) == native.disabled["native", op]
    with pytest.raises(RuntimeError, match=f"^{op}: .*self-test failed"):
        call(op, "native")
    assert torch.equal(call(op, "auto"), call(op, None))


@pytest.mark.parametrize("op", [op for op in NATIVE if op not in OF_BYTES])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kernel_that_writes_no_number_is_found(op, value, monkeypatch):
    spoil(monkeypatch, op, value)
    assert selftest.run(op).failed
    assert ("native", op) in native.disabled


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize("op", GRADIENTS)
def test_a_wrong_gradient_is_found_and_switched_off(op, value, monkeypatch):
    spoil(monkeypatch, op, value, GRADIENTS)
    result = selftest.run(op, kind="gradient")
    assert result.failed and result.name == f"{op}, gradient (native)"
    assert f"{op}, gradient (native) has an error of" in native.reason(op)
    # Without it all is right again, by torch's own calls.
    public, reference, tensors, arguments = selftest._training_cases()[op]
    narrow = [t.float() if t.is_floating_point() else t for t in tensors]
    found = selftest._with_gradients(public)(*narrow, **arguments, backend="auto")
    expected = selftest._with_gradients(reference)(*narrow, **arguments)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("op, function, output, position, of_codes", CODED)
def test_wrong_codes_are_found_where_floats_are_right(op, function, output, position, of_codes, monkeypatch):
    right = getattr(native.module, function)

    def wrong(*args):
        right(*args)
        if args[position] == of_codes:
            # Of a gate's float the highest byte but one.
            byte = ctypes.c_uint8.from_address(args[output] + 2 * (op == "attention_gate"))
            byte.value ^= 1

    monkeypatch.setattr(native.module, function, wrong)
    assert not selftest.run(op).failed
    result = selftest.run(op, kind="codes")
    assert result.failed and result.name == f"{op}, codes (native)"
    assert f"{op}, codes (native) has an error of" in native.reason(op)


def test_results_are_far_from_the_middle_of_two_codes(monkeypatch):
    """So that right kernels, whose sums may be rounded, give the same codes."""
    codes, seen = Quantum.codes, []

    def watched(quantum, x):
        seen.append(float(((x / quantum.step).remainder(1) - 0.5).abs().min()))
        return codes(quantum, x)

    monkeypatch.setattr(Quantum, "codes", watched)
    for _, reference, tensors, _ in selftest._codes_cases().values():
        reference(*tensors)
    assert len(seen) == 6 and min(seen) > 0.24


def test_what_is_built_on_a_wrong_gradient_is_off_too(monkeypatch):
    spoil(monkeypatch, "bn_act_dropout", outputs=GRADIENTS)
    found = [result for result in selftest.run_all() if result.backend == "native"]
    results = {(result.op, result.kind): result for result in found}
    assert not results["bn_act_dropout", ""].failed and results["bn_act_dropout", "gradient"].failed
    block = results["shared_block_train", "gradient"]
    assert block.error is None and block.reason == native.disabled["native", "bn_act_dropout"]


@pytest.mark.parametrize("op, activations", [("bn_act_dropout", 1), ("shared_block_train", 2)])
def test_activations_are_far_from_where_their_gradients_jump(op, activations, monkeypatch):
    """By more than float16 is wrong by on a GPU: four times its eps, of values up to 8."""
    least = []

    def watched(activation):
        def seen(x, *args):
            least.append(float(x.abs().min()))
            return activation(x, *args)

        return seen

    for name in ("leaky_relu", "relu"):
        monkeypatch.setattr(F, name, watched(getattr(F, name)))
    _, reference, tensors, arguments = selftest._training_cases()[op]
    reference(*tensors, **arguments)
    assert len(least) == activations and min(least) > 4 * 2**-10 * 8


@pytest.mark.parametrize("op", [op for op in NATIVE if OUTPUTS[op][0] == op != "conv_bn_act"])
def test_the_others_stay_on(op, monkeypatch):
    spoil(monkeypatch, op)
    assert [result.op for result in selftest.run_all() if result.failed] == [op]
    assert list(native.disabled) == [("native", op)]


def test_ops_that_share_a_wrong_kernel_are_all_off(monkeypatch):
    spoil(monkeypatch, "conv_bn_act")
    for result in map(selftest.run, NATIVE):
        shared = OUTPUTS[result.op][0] == "conv_bn_act"
        assert shared == (result.failed or result.reason is not None)
    for op in ("conv_bn_act", "deconv_add", "shared_block"):
        assert torch.equal(call(op, "auto"), call(op, None))


def test_each_op_is_tested_once(monkeypatch):
    first = selftest.run("upsample_add")
    spoil(monkeypatch, "upsample_add")
    assert selftest.run("upsample_add") is first


def test_what_cannot_run_has_not_failed():
    native.disable("stem", "off for a test")
    result = selftest.run("stem")
    assert result == selftest.Result("stem", "native", None, "off for a test") and not result.failed
    assert native.disabled == {("native", "stem"): "off for a test"}


@pytest.mark.parametrize(
    "error, failed",
    [(None, False), (0.0, False), (selftest.LIMIT, False), (2 * selftest.LIMIT, True), (float("nan"), True)],
)
def test_what_counts_as_failed(error, failed):
    assert selftest.Result("stem", "native", error, None).failed is failed
