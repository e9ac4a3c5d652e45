"""Int8 on a CPU: plans whose activations are unsigned codes, calibration, and whole networks."""

import collections
import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from models import CONFIGS, build, images
from test_cpu_threads import in_new_process
from test_quantization import fake_weight, plan_of, published_models, rms
from torch import nn

import shelfkern
from shelfkern import native
from shelfkern.engine import plan as p
from shelfkern.engine.calibration import Histogram, calibrate_unsigned
from shelfkern.engine.cpu.algorithm import Context
from shelfkern.engine.cpu.algorithms import algorithms
from shelfkern.engine.lower import lower
from shelfkern.engine.problem import Packed
from shelfkern.engine.quantization import Calibration, coded
from shelfkern.normalisation import Normalisation
from shelfkern.ops.quantize import Quantum

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
INT8, U8, FLOAT = torch.int8, torch.uint8, torch.float32
SIZE = (2, 64, 32)
CONTEXT = Context(FLOAT, Normalisation(), theirs=False)


def ones(plan):
    """A quantum for every activation."""
    values = (v for step in plan.steps for v in (*step.outputs, *step.temporaries))
    return Calibration({v.index: Quantum(1 / 64, 40) for v in values if v.stride and v != plan.scores}, True)


@published_models
def test_all_activations_of_the_published_models_are_codes(name):
    plan = plan_of(name)
    found = coded(plan, ones(plan))
    assert [type(step) for step in found.steps] == [type(step) for step in plan.steps]
    assert found.macs(1, 64, 64) == plan.macs(1, 64, 64) and found.scores == plan.scores
    for step in found.steps:
        for value in (*step.inputs, *step.outputs, *step.temporaries):
            floating = value.stride is None or value == found.scores
            assert (value.codes, value.quantum is None) == ((None, True) if floating else (U8, False))
    assert found.steps[0].raw and not coded(plan, dataclasses.replace(ones(plan), raw=False)).steps[0].raw


def test_what_no_kernel_makes_codes_of_is_followed_by_a_step_that_does():
    """Where the features before pooling are used, torch makes and pools them."""
    plan = lower(build(CONFIGS["five_levels"]))
    found = coded(plan, ones(plan))
    kinds = collections.Counter(type(step) for step in found.steps)
    assert kinds - collections.Counter(type(step) for step in plan.steps) == {p.Quantize: 2}
    first, codes, pool, pooled = found.steps[:4]
    assert first.output.codes is None and codes.inputs == (first.output,) and pool.inputs == (first.output,)
    assert type(pool) is p.MaxPool and pooled.inputs == (pool.output,) and pooled.output.codes is U8
    written = set()
    for step in found.steps:
        assert set(step.inputs) <= written and not {v.index for v in step.outputs} & {
            v.index for v in written
        }
        written |= set(step.outputs)


def test_the_plan_says_what_is_codes():
    plan = lower(build(CONFIGS["attention"]))
    found = coded(plan, ones(plan))
    text = found.describe(1, 64, 64)
    assert ":uint8" in text and "of raw pixels" in text and ":uint8" not in plan.describe(1, 64, 64)
    conv = next(step for step in found.steps if type(step) is p.Conv and step.residual)
    shapes = [value.shape(2, 64, 64) for value in (*conv.inputs, conv.output)]
    moved = sum(n * c * h * w for n, c, h, w in shapes) + conv.weight.numel() + 4 * 2 * len(conv.scale)
    assert p.step_bytes(conv, FLOAT, 2, 64, 64) == moved


def samples(*parts):
    return torch.cat([part.flatten() for part in parts])


def test_quanta_span_what_there_is():
    """Codes of what is never negative have no sign; a few negative ones take few codes."""
    uniform = torch.linspace(0, 1, 10_001)
    for x, zero, span in (
        (uniform, 0, 1.0),
        (samples(uniform, -0.01 * uniform), 3, 1.01),
        (samples(uniform, -uniform), 128, 2.0),
        (-uniform, 255, 1.0),
    ):
        histogram = Histogram()
        histogram.add(x)
        quantum = histogram.quantum()
        assert quantum.zero == zero and quantum.step == pytest.approx(span / 255, rel=0.02)


@pytest.mark.parametrize("negative", [0.0, 0.01, 1.0])
def test_quanta_lose_least(negative):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).pow(3)
    x = torch.where(x < 0, negative * x, x)
    histogram = Histogram()
    histogram.add(x)
    found = histogram.quantum()

    def error(quantum):
        return (quantum.values(quantum.codes(x)) - x).square().sum().item()

    every = [error(Quantum(found.step * factor, found.zero)) for factor in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0)]
    assert error(found) <= 1.05 * min(every)
    # Nothing is gained by codes that nothing has.
    assert found.zero == round(min(-x.min().item(), found.step * found.zero) / found.step)


def test_calibration_sees_every_activation():
    plan = lower(build(CONFIGS["attention"]))
    found = calibrate_unsigned(plan, images(2, 64, 64), Normalisation())
    assert found.quanta.keys() == ones(plan).quanta.keys() and not found.raw
    for step in plan.steps[:-1]:
        # A relu leaves nothing negative.
        if isinstance(step, p.Conv) and step.act == p.Activation(0.0) and not step.skip:
            assert found.quanta[step.output.index].zero == 0
        if isinstance(step, p.Conv) and step.act == p.Activation():
            assert found.quanta[step.output.index].zero > 64


CALIBRATING = """
import re
from pathlib import Path
import torch
from shelfkern.engine.calibration import calibrate_unsigned
from shelfkern.engine.lower import lower
from shelfkern.nn import shelfnet50

def highest():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

model = shelfnet50().eval()
plan, images = lower(model), torch.randn(1, 3, 64, 64)
Path("/proc/self/clear_refs").write_text("5")
before = highest()
calibrate_unsigned(plan, images, model.normalisation)
print(highest() - before, plan.weight_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_calibration_copies_a_layers_weights_at_a_time():
    taken, weights = map(int, in_new_process(CALIBRATING))
    assert taken < 0.75 * weights


def test_ranges_do_not_depend_on_batches():
    plan, x = lower(build(CONFIGS["attention"])), images(3, 64, 64)
    whole = calibrate_unsigned(plan, x, Normalisation())
    assert whole == calibrate_unsigned(plan, (x[:2], x[2:]), Normalisation())


def test_raw_images_and_what_they_are_normalised():
    plan, normalisation = lower(build(CONFIGS["attention"])), Normalisation((0.1, 0.5, 0.3), (0.2, 0.4, 0.8))
    raw = torch.randint(0, 256, (2, 64, 64, 3), dtype=U8)
    mean, std = torch.tensor(normalisation.mean), torch.tensor(normalisation.std)
    floating = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    for given, expected in (
        (raw, True),
        (floating, True),
        (1.1 * floating, False),
        ([raw, 9 * floating], False),
    ):
        assert calibrate_unsigned(plan, given, normalisation).raw is expected


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_are_what_their_values_stand_for(name):
    """Every step on codes beside the same step in float64 on the numbers that its inputs stand for."""
    model = build(CONFIGS[name])
    plan = lower(model)
    found = coded(plan, calibrate_unsigned(plan, images(2, 96, 64), model.normalisation))
    values, x = {}, images(2, 64, 32)
    context = dataclasses.replace(CONTEXT, theirs=True)
    for step in found.steps:
        inputs = [values[value] for value in step.inputs] or [x]
        # The one that would be chosen comes last.
        for algorithm in reversed(algorithms(step, SIZE, context, Packed())):
            outputs = [storage(value) for value in step.outputs] if algorithm.in_arena else []
            scratch = torch.full((algorithm.scratch,), 0x7F, dtype=U8)
            own = algorithm.prepare()(inputs, outputs, scratch)
            values[step.output] = outputs[0] if own is None else own
            check_step(step, algorithm.name, inputs, values[step.output])


@needs_native
@pytest.mark.parametrize("has", [(), (torch.int16,), (torch.int8, torch.int16)])
def test_codes_are_convolved_with_fewer_products_where_there_are_instructions(has, monkeypatch):
    monkeypatch.setattr(native, "has_product", lambda dtype: dtype in has)

    def names(channels, stride, quantum):
        x = p.Value(0, channels, 1, U8, Quantum(0.1, 3))
        out = p.Value(1, channels, stride, U8 if quantum else None, quantum)
        weight = torch.zeros(channels, channels, 3, 3)
        step = p.Conv("it", (x,), out, weight, None, None, stride, p.Activation(0.0))
        return [one.name for one in algorithms(step, (1, 64, 64), CONTEXT, Packed())]

    own, filtered = Quantum(0.1, 3), ["native winograd 4x4 int16"]
    assert names(64, 1, own) == filtered * (torch.int16 in has) + ["native direct"]
    for others in ((31, 1, own), (31, 2, own), (64, 1, None)):
        assert names(*others) == ["native direct"]
    # With stride 2 and transposed they are not that few: direct products of 8 bits take less time.
    fewer = filtered * (has == (torch.int16,)) + ["native direct"]
    assert names(64, 2, own) == fewer
    low, high, out = (p.Value(i, 64, 1 + (i == 0), U8, own) for i in range(3))
    up = p.DeconvAdd("up", (low, high), out, torch.zeros(64, 64, 3, 3), torch.zeros(64))
    assert [one.name for one in algorithms(up, (1, 64, 64), CONTEXT, Packed())] == fewer


def storage(value):
    """Poisoned memory for a value."""
    fill = 77 if value.codes else float("nan")
    out = torch.full(value.shape(*SIZE), fill, dtype=value.dtype(FLOAT))
    return out.contiguous(memory_format=torch.channels_last) if out.ndim == 4 else out


def check_step(step, name, inputs, result):
    x = [
        t.double() if value.quantum is None else value.quantum.values(t, torch.float64)
        for value, t in zip(step.inputs or (p.Value(0, 3, 1),), inputs, strict=True)
    ]
    if step.op == "stem" and name == "native direct" and native.has_product(torch.bfloat16):
        x, step = [x[0].bfloat16().double()], dataclasses.replace(step, weight=step.weight.bfloat16())
    # Winograd's sums are off by up to a fifth of a code, mostly far less.
    slack = 0.2 if "winograd" in name else 0.01
    truth, quantum = truth_of(step, x), step.output.quantum
    if quantum is None:
        assert (result - truth).abs().max() <= 1e-4 * truth.abs().max()
        return
    off = (quantum.values(result, torch.float64) - truth.clamp(*ends(quantum))).abs() / quantum.step
    # Codes between a block's convolutions may become their neighbours.
    near = 2.0 if isinstance(step, p.SharedBlockStep) else 0.5 + slack
    assert off.max() <= near and (off <= 0.5 + slack).double().mean() > 0.98, step.name


def ends(quantum):
    return ((code - quantum.zero) * quantum.step for code in (0, 255))


def truth_of(step, x):
    """A step in float64 on the numbers that its inputs stand for, its weights as their codes have them."""
    if isinstance(step, p.Quantize):
        return x[0]
    if isinstance(step, p.MaxPool):
        return nn.functional.max_pool2d(x[0], 3, 2, 1)
    if isinstance(step, p.AttentionGate):
        parameters = (t.double() for t in (step.weight, step.scale, step.shift))
        return shelfkern.ops.attention_gate_reference(x[0], *parameters)
    if isinstance(step, p.UpsampleAdd):
        return shelfkern.ops.upsample_add_reference(*x)
    if isinstance(step, p.DeconvAdd):
        weight = fake_weight(step.weight.transpose(0, 1), INT8).transpose(0, 1).double()
        return shelfkern.ops.deconv_add_reference(x[0], weight, step.bias.double(), x[1])
    floating = step.inputs == () or step.inputs[0].codes is None
    weight = step.weight.double() if floating else fake_weight(step.weight, INT8).double()
    reference = shelfkern.ops.conv_bn_act_reference
    if isinstance(step, p.SharedBlockStep):
        norms = [t.double() for t in (step.scale1, step.shift1, step.scale2, step.shift2)]
        hidden = reference(x[0], weight, *norms[:2], None, None, 1, 1, step.act.slope)
        hidden = step.hidden.quantum.values(step.hidden.quantum.codes(hidden), torch.float64)
        return reference(hidden, weight, *norms[2:], x[0], x[0] if step.skip else None, 1, 1, 0.0)
    norms = [None if t is None else t.double() for t in (step.scale, step.shift)]
    if isinstance(step, p.Stem):
        features = reference(x[0], weight, *norms, None, None, 2, 3, step.act.slope)
        return nn.functional.max_pool2d(features, 3, 2, 1)
    others = x[1] if step.residual else None, x[-1] if step.skip else None
    return reference(x[0], weight, *norms, *others, step.stride, step.padding, step.act.slope)


def simulated(plan, x):
    """A plan of codes in float64, rounded to codes after each step."""
    values = {}
    for step in plan.steps:
        result = truth_of(step, [values[value] for value in step.inputs] or [x.double()])
        quantum = step.output.quantum
        values[step.output] = (
            result if quantum is None else quantum.values(quantum.codes(result), torch.float64)
        )
    return values[plan.scores]


@needs_native
@pytest.mark.parametrize("name", ["attention", "deconv", "five_levels"])
@torch.no_grad()
def test_networks_are_near_the_exact_one(name):
    """The engine's result beside the same codes in float64, and the exact network."""
    model, x, samples_ = build(CONFIGS[name]), images(1, 64, 96), images(4, 64, 64)
    fast = shelfkern.accelerate(model, INT8, calibration=samples_)
    found, exact = fast(x), copy.deepcopy(model).double()(x.double())
    truth = nn.functional.interpolate(
        simulated(fast.plan, x), (64, 96), mode="bilinear", align_corners=model.align_corners
    )
    assert found.dtype is FLOAT and found.shape == exact.shape
    # A code that becomes its neighbour moves what follows: nearer to the same codes than these to the exact.
    assert rms(found, truth) < 0.5 * rms(truth, exact)
    assert rms(found, exact) <= 1.2 * rms(truth, exact)
    labels = fast.predict(x)
    assert (labels == found.argmax(1)).double().mean() > 0.999


@needs_native
@torch.no_grad()
def test_raw_images_and_their_normalised_selves_give_the_same():
    model, raw = build(CONFIGS["attention"]), torch.randint(0, 256, (2, 64, 96, 3), dtype=U8)
    fast = shelfkern.accelerate(model, INT8, calibration=raw)
    mean, std = torch.tensor(model.normalisation.mean), torch.tensor(model.normalisation.std)
    floating = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    assert fast.plan.steps[0].raw and torch.equal(fast.predict(raw), fast.predict(floating))


@needs_native
@torch.no_grad()
def test_weights_that_change_are_taken_up():
    model, x = build(CONFIGS["attention"]), images(1, 32, 64)
    fast = shelfkern.accelerate(model, INT8, calibration=images(2, 64, 64))
    before = fast(x)
    for parameter in model.backbone.parameters():
        parameter.mul_(1.1)
    again = shelfkern.accelerate(model, INT8, calibration=images(2, 64, 64))
    assert not torch.equal(fast(x), before) and torch.equal(fast(x), again(x))


@needs_native
def test_the_plan_names_what_runs():
    fast = shelfkern.accelerate(build(CONFIGS["attention"]), INT8, calibration=images(1, 64, 64))
    text = fast.plan.describe(1, 64, 64)
    assert ":uint8" in text and "native direct" in text
    assert fast.scores_dtype is FLOAT


@needs_native
def test_without_our_kernels_torch_multiplies_the_codes(monkeypatch):
    monkeypatch.setattr(native, "disabled", {("native", "conv_bn_act"): "off for a test"})
    model, samples_ = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model, INT8, calibration=samples_)
    assert fast.scores_dtype is torch.float16 and fast(samples_).isfinite().all()
    with pytest.raises(RuntimeError, match=r"backend is 'native', which cannot run .*off for a test"):
        shelfkern.accelerate(model, INT8, backend="native", calibration=samples_)


def test_other_codes_are_refused():
    with pytest.raises(
        ValueError, match=r"^dtype is torch\.float8_e4m3fn, on a CPU it may be .*torch\.int8$"
    ):
        shelfkern.accelerate(build(CONFIGS["attention"]), torch.float8_e4m3fn, calibration=images(1, 64, 64))


@needs_native
def test_slopes_that_the_kernels_do_not_take_are_refused():
    model = build(dataclasses.replace(CONFIGS["attention"], negative_slope=1.5))
    samples_ = images(1, 64, 64)
    assert shelfkern.accelerate(model)(samples_).isfinite().all()
    with pytest.raises(ValueError, match=r"has an activation of the slope 1\.5, it must be from 0 to 1"):
        shelfkern.accelerate(model, INT8, calibration=samples_)


@needs_native
@torch.no_grad()
def test_the_callers_autocast_is_not_for_calibration():
    model, samples_ = build(CONFIGS["attention"]), images(2, 64, 64)
    expected = shelfkern.accelerate(model, INT8, calibration=samples_)(samples_)
    with torch.autocast("cpu", torch.bfloat16):
        fast = shelfkern.accelerate(model, INT8, calibration=samples_)
    assert torch.equal(fast(samples_), expected)
