from __future__ import annotations

import ctypes

import pytest
import torch
from parity import each_isa, needs_native

from shelfkern import native, ops
from shelfkern.ops import selftest

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
    "upsample_cross_entropy": ("upsample_cross_entropy", 18),
    "upsample_softmax_sum": ("upsample_softmax_sum", 1),
}
OF_BYTES = ("quantize", "upsample_argmax")
NATIVE = [op for op, kernels in ops.KERNELS.items() if "native" in kernels]


@pytest.fixture(autouse=True)
def untested(monkeypatch):
    """No op tested and none switched off, before and after."""
    monkeypatch.setattr(native, "disabled", {})
    selftest.run.cache_clear()
    yield
    selftest.run.cache_clear()


def spoil(monkeypatch, op, value=None):
    """Makes the first number that the op's kernel writes wrong by a little, or the given float."""
    function, position = OUTPUTS[op]
    right = getattr(native.module, function)

    def wrong(*args):
        result = right(*args)
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


def test_all_pass():
    results = [result for result in selftest.run_all() if result.backend == "native"]
    assert [result.op for result in results] == list(NATIVE)
    for result in results:
        assert result.reason is None and 0 <= result.error <= selftest.LIMIT and not result.failed
    assert native.disabled == {}


def test_all_pass_with_every_isa():
    def run(isa):
        selftest.run.cache_clear()
        assert not any(selftest.run(op).failed for op in NATIVE), isa

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
