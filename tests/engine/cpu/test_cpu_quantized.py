"""Codes of 8 bits on a CPU: our kernels for each kind of step, and whole networks."""

import copy
import dataclasses

import pytest
import torch
from models import CONFIGS, build, images
from parity import each_isa
from test_quantization import (
    STEPS,
    assert_is,
    block_step,
    conv_step,
    fake,
    fake_model,
    random_inputs,
    rms,
    storage,
    truth_of,
)

import shelfkern
from shelfkern import native
from shelfkern.engine.cpu.algorithm import Context
from shelfkern.engine.cpu.algorithms import algorithms
from shelfkern.engine.lower import lower
from shelfkern.engine.problem import Packed
from shelfkern.engine.quantization import calibrate, quantized
from shelfkern.normalisation import Normalisation

pytestmark = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
INT8, FLOAT = torch.int8, torch.float32
SIZE = (2, 48, 32)
CONTEXT = Context(FLOAT, Normalisation(), theirs=False, codes=True)


def run(step, inputs):
    """What our one algorithm writes into poisoned memory."""
    (found,) = algorithms(step, SIZE, CONTEXT, Packed())
    assert found.in_arena
    outputs = [storage(value, FLOAT, SIZE, "cpu") for value in step.outputs]
    scratch = torch.full((found.scratch,), 0x7F, dtype=torch.uint8)
    assert found.prepare()(inputs, outputs, scratch) is None
    return outputs


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_every_kind_of_step(name):
    step = STEPS[name](INT8)
    if hasattr(step, "weight"):
        # As the truth has them where x is floating.
        step = dataclasses.replace(step, weight=step.weight.half().float())
    inputs = random_inputs(step, FLOAT, SIZE)
    each_isa(lambda isa: assert_is(run(step, inputs), step, truth_of(step, inputs), FLOAT, 2e-6))


@pytest.mark.parametrize("writes", ["both", "codes", "floating"])
@torch.no_grad()
def test_blocks(writes):
    """Where a code between the convolutions becomes its neighbour, so may one of the results."""
    step = block_step(skip=writes == "both", writes=writes, kind=INT8)
    inputs = random_inputs(step, FLOAT, SIZE)
    truth = truth_of(step, inputs)
    near = (step.hidden_step * step.scale2.abs().max() * step.weight.abs().max()).item()
    for value, result in zip(step.outputs, run(step, inputs), strict=True):
        one = step.codes_step if value.codes else 1.0
        rounded = fake(truth, one, INT8) if value.codes else truth
        off = (result.double() * one - rounded).abs()
        assert (off <= near + (one if value.codes else 1e-5 * truth.abs())).all()
        assert (off <= 1e-3 * rounded.abs() + 1e-6).double().mean() > 0.95


@pytest.mark.parametrize("name", ["attention", "deconv"])
@torch.no_grad()
def test_networks_are_as_near_as_fake_quantisation(name):
    """The engine's result beside torch's products of the same codes in float64, and the exact network."""
    model, x, samples = build(CONFIGS[name]), images(1, 64, 96), images(4, 64, 64)
    fast = shelfkern.accelerate(model, INT8, backend="native", calibration=samples)
    found = fast(x)
    plan = lower(model)
    truth = fake_model(model, plan, calibrate(plan, samples, INT8), INT8, torch.float64)(x.double())
    exact = copy.deepcopy(model).double()(x.double())
    assert found.dtype is FLOAT and found.shape == exact.shape
    # A code that becomes its neighbour moves what follows: nearer to the fake network than that to the exact.
    assert rms(found, truth) < 0.5 * rms(truth, exact)
    assert rms(found, exact) <= 1.2 * rms(truth, exact)
    labels = fast.predict(x)
    assert (labels == found.argmax(1)).double().mean() > 0.999


@torch.no_grad()
def test_isas_give_the_same_codes():
    """Sums of codes are whole numbers: what differs are roundings of float32 after them."""
    step = conv_step(writes="codes", kind=INT8)
    inputs, found = random_inputs(step, FLOAT, SIZE), []
    each_isa(lambda isa: found.append(run(step, inputs)[0]))
    for codes in found[1:]:
        assert (codes != found[0]).double().mean() < 1e-3 and (codes - found[0]).abs().max() <= 1


@torch.no_grad()
def test_weights_that_change_are_taken_up():
    model, x = build(CONFIGS["attention"]), images(1, 32, 64)
    fast = shelfkern.accelerate(model, INT8, calibration=images(2, 64, 64))
    before = fast(x)
    for parameter in model.backbone.parameters():
        parameter.mul_(1.1)
    again = shelfkern.accelerate(model, INT8, calibration=images(2, 64, 64))
    assert not torch.equal(fast(x), before) and torch.equal(fast(x), again(x))


def test_the_plan_names_what_runs():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), INT8, calibration=images(1, 64, 64))
    text = fast.plan.describe(1, 64, 64)
    assert "of int8 to int8" in text and "native direct" in text and "quantize" in text
    assert fast.scores_dtype is FLOAT


def test_without_our_kernels_torch_multiplies_the_codes(monkeypatch):
    monkeypatch.setattr(native, "disabled", {("native", "conv_bn_act"): "off for a test"})
    model, samples = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model, INT8, calibration=samples)
    assert fast.scores_dtype is torch.float16 and fast(samples).isfinite().all()
    with pytest.raises(RuntimeError, match=r"backend is 'native', which cannot run .*off for a test"):
        shelfkern.accelerate(model, INT8, backend="native", calibration=samples)


def test_other_codes_are_refused():
    with pytest.raises(
        ValueError, match=r"^dtype is torch\.float8_e4m3fn, on a CPU it may be .*torch\.int8$"
    ):
        shelfkern.accelerate(build(CONFIGS["attention"]), torch.float8_e4m3fn, calibration=images(1, 64, 64))


def test_plans_keep_their_values_apart():
    model = build(CONFIGS["attention"])
    plan = lower(model)
    coded = quantized(plan, calibrate(plan, images(1, 64, 64), INT8), INT8)
    for step in coded.steps:
        for algorithm in algorithms(step, SIZE, CONTEXT, Packed()):
            assert algorithm.name.startswith("native")
