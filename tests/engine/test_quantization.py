"""Codes of 8 bits: the rewriting of plans, calibration, and networks against fake quantisation in float64."""

import collections
import copy
import dataclasses
import itertools
import math

import pytest
import torch
from models import CONFIGS, build, images
from torch import nn

from shelfkern import native
from shelfkern import nn as published
from shelfkern.engine import arena, order
from shelfkern.engine import plan as p
from shelfkern.engine.calibration import (
    BATCH,
    BINS,
    Histogram,
    batches_of,
    calibrate,
    check_calibration,
)
from shelfkern.engine.gpu import quantized as gpu_quantized
from shelfkern.engine.gpu.algorithm import Context
from shelfkern.engine.gpu.algorithms import algorithms
from shelfkern.engine.gpu.device import gpu_of
from shelfkern.engine.gpu.program import GpuProgram, Options
from shelfkern.engine.gpu.timing import candidate, key_of, tuner_of
from shelfkern.engine.lower import lower
from shelfkern.engine.problem import Packed
from shelfkern.engine.quantization import KINDS, quantized
from shelfkern.normalisation import Normalisation
from shelfkern.ops import _triton

INT8, FP8 = torch.int8, torch.float8_e4m3fn
CPU = torch.device("cpu")
CODED = (p.QuantizedConv, p.QuantizedBlock)
kinds = pytest.mark.parametrize("kind", KINDS)
# The kernels on a GPU, or interpreted.
KERNELS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not _triton.INTERPRETED, reason="Triton is not interpreted")
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA: {native.cuda_reason()}"),
        ],
    ),
]


def ones(plan):
    """A range for every activation."""
    values = [v for step in plan.steps for v in (*step.outputs, *step.temporaries)]
    return {value.index: 1.0 for value in values}


def plan_of(name):
    with torch.device("meta"):
        return lower(getattr(published, name)())


# By hand: convolutions without the classifier; blocks; codes made by a step of their own, after the stem and
# each merge; and activations that their maker writes in both forms. For 18-lw these are the first block of
# each stage (4), which the second one adds; the deepest lateral; both merges of the first up column; the
# entry and both blocks of the down column, and both of its downs.
PUBLISHED = {
    "shelfnet18_lw": (33, 5, 1 + 4, 4 + 1 + 2 + 5),
    # All but the last block of each stage (12), and the last of those three that are levels.
    "shelfnet34_lw": (46, 5, 1 + 4, 12 + 3 + 2 + 5),
    # Of the up columns' merges, transposed convolutions read all but the finest of the first.
    "shelfnet50": (59, 12, 1 + 6, 12 + 1 + 1 + 7),
    "shelfnet101": (110, 12, 1 + 6, 29 + 1 + 1 + 7),
}
published_models = pytest.mark.parametrize("name", PUBLISHED)


@kinds
@published_models
def test_steps_of_the_published_models(name, kind):
    plan = plan_of(name)
    found = quantized(plan, ones(plan), kind)
    counts = collections.Counter(type(step) for step in found.steps)
    both = sum(isinstance(step, CODED) and step.copy is not None for step in found.steps)
    convs, blocks, quantizes, copies = PUBLISHED[name]
    assert counts[p.QuantizedConv] == convs and counts[p.QuantizedBlock] == blocks
    assert counts[p.Quantize] == quantizes and both == copies
    # The classifier stays, and so do all other ops.
    assert counts[p.Conv] == 1 and type(found.steps[-1]) is p.Conv and counts[p.SharedBlockStep] == 0
    before = collections.Counter(step.op for step in plan.steps)
    assert collections.Counter(step.op for step in found.steps) - before == {"quantize": quantizes}
    assert found.macs(1, 64, 64) == plan.macs(1, 64, 64) and found.scores == plan.scores


@published_models
def test_steps_read_what_was_written_in_the_form_they_need(name):
    plan = plan_of(name)
    found = quantized(plan, ones(plan), INT8)
    written, indices = set(), set()
    for step in found.steps:
        assert set(step.inputs) <= written
        assert not written & set(step.outputs) and not indices & {v.index for v in step.outputs}
        written |= set(step.outputs)
        indices |= {v.index for v in step.outputs}
        first, rest = step.inputs[:1], step.inputs[1:]
        assert all((value.codes is INT8) == isinstance(step, CODED) for value in first)
        assert all(value.codes is None for value in rest)
        if isinstance(step, p.QuantizedBlock):
            assert step.hidden.codes is INT8 and len(step.inputs) == 2
            assert step.inputs[0].shape(1, 64, 64) == step.inputs[1].shape(1, 64, 64)
        if isinstance(step, CODED):
            assert len(step.outputs) == len({value.codes for value in step.outputs})
    read = {value for step in found.steps for value in step.inputs} | {found.scores}
    assert read == written


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("beside", [False, True])
def test_arena_holds_copies_apart(name, beside):
    plan = lower(build(CONFIGS[name]))
    found = quantized(plan, ones(plan), INT8)
    size = (2, 64, 96)
    streams = order.side_by_side(found, [1.0] * len(found.steps)) if beside else order.in_sequence(found)
    values = {v for step in found.steps for v in (*step.outputs, *step.temporaries)}
    layout = arena.lay_out(found, values, *size, torch.float16, streams)
    span = {
        v: (layout.offsets[v], layout.offsets[v] + arena.value_bytes(v, *size, torch.float16)) for v in values
    }
    touched = arena._touched(found)
    for one, other in itertools.combinations(values, 2):
        if span[one][0] < span[other][1] and span[other][0] < span[one][1]:
            first, second = sorted((touched[one], touched[other]))
            assert max(first) < len(found.steps)
            assert all(streams.ended(step, second[0]) for step in first)


def conv_step(residual=False, skip=False, floating=False, writes="both", kind=INT8, act=0.01, scale=True):
    """32 to 48 channels, 3x3, stride 2."""
    x, out = p.Value(0, 32, 4, None if floating else kind), p.Value(1, 48, 8)
    others = [p.Value(2, 48, 8)] * residual + [p.Value(3, 48, 8)] * skip
    copy = p.Value(4, 48, 8, kind) if writes == "both" else None
    out = dataclasses.replace(out, codes=kind) if writes == "codes" else out
    vectors = torch.randn(48) if scale else None, torch.randn(48)
    steps = dict(x_step=0.021, codes_step=3 / (127 if kind is INT8 else 448), copy=copy)
    weight = torch.randn(48, 32, 3, 3) / 17
    return p.QuantizedConv(
        "conv", (x, *others), out, weight, *vectors, 2, p.Activation(act), residual, skip, **steps
    )


def block_step(skip=False, writes="both", kind=INT8):
    codes, x, out, hidden = p.Value(0, 32, 8, kind), p.Value(1, 32, 8), p.Value(2, 32, 8), p.Value(3, 32, 8)
    copy = p.Value(4, 32, 8, kind) if writes == "both" else None
    out = dataclasses.replace(out, codes=kind) if writes == "codes" else out
    norms = [torch.rand(32) + 0.5, torch.randn(32), torch.rand(32) - 1.5, torch.randn(32)]
    largest = 127 if kind is INT8 else 448
    return p.QuantizedBlock(
        "block", (codes, x), out, torch.randn(32, 32, 3, 3) / 17, *norms, p.Activation(0.01),
        dataclasses.replace(hidden, codes=kind), skip,
        x_step=2 / largest, hidden_step=3 / largest, codes_step=4 / largest, copy=copy,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [INT8, FP8])
def test_bytes_and_what_is_printed(kind):
    name = "int8" if kind is INT8 else "fp8"
    step = conv_step(residual=True, kind=kind)
    # x in codes; residual and result in 16 bits, and the result's codes; weights in codes.
    moved = 2 * 16 * 16 * 32 + 2 * 8 * 8 * 48 * (2 + 2 + 1) + 48 * 32 * 9 + 2 * 48 * 4
    assert p.step_bytes(step, torch.float16, 2, 64, 64) == moved
    assert p.step_macs(step, 2, 64, 64) == 2 * 8 * 8 * 48 * 32 * 9
    assert step.detail() == f"3x3/2, + residual, leaky_relu(0.01), of {name} to {name} too"
    details = [
        conv_step(kind=kind, writes="codes"),
        conv_step(kind=kind, writes="floating"),
        conv_step(kind=kind, floating=True),
    ]
    ends = [step.detail().partition("leaky_relu(0.01)")[2] for step in details]
    assert ends == [f", of {name} to {name}", f", of {name}", f", to {name} too"]
    block = block_step(kind=kind, writes="codes")
    moved = 2 * 8 * 8 * 32 * (1 + 2 + 1) + 32 * 32 * 9 + 4 * 32 * 4
    assert p.step_bytes(block, torch.float16, 2, 64, 64) == moved
    assert block.detail().endswith(f"of {name} to {name}")
    quantize = p.Quantize("stem", (p.Value(0, 32, 4),), p.Value(1, 32, 4, kind), 0.1)
    assert p.step_bytes(quantize, torch.float16, 1, 64, 64) == 16 * 16 * 32 * 3
    assert quantize.detail() == f"to {name}"
    plan = lower(build(CONFIGS["attention"]))
    assert f"of {name} to {name} too" in str(quantized(plan, ones(plan), kind))


def test_steps_kept_floating():
    plan = lower(build(CONFIGS["attention"]))
    keep = ("backbone.layer1.0.conv1", "shelf.columns.1.entry")
    found = quantized(plan, ones(plan), INT8, keep)
    by_name = collections.defaultdict(list)
    for step in found.steps:
        by_name[step.name].append(step)
    # A convolution writes codes itself, the sum of a block is followed by a step that makes them.
    (first,) = by_name[keep[0]]
    assert first.inputs[0].codes is None and first.output.codes is INT8
    block, codes = by_name[keep[1]]
    assert type(block) is p.SharedBlockStep and type(codes) is p.Quantize
    assert by_name["shelf.columns.1.blocks.0"][0].inputs == (codes.output, block.output)
    everything = [step.name for step in plan.steps]
    assert quantized(plan, {}, INT8, everything) == plan


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind=torch.float16), "kind is torch.float16, it may be torch.int8 or torch.float8_e4m3fn"),
        (dict(keep=("head",)), "keep has 'head', which is no step of the plan"),
        (dict(ranges={}), "ranges has none for the activation of 'backbone.conv1'"),
        (dict(ranges={0: 0.0}), "ranges has 0.0 for the activation of 'backbone.conv1', it must be a finite"),
        (dict(ranges={0: math.nan}), "ranges has nan for the activation of 'backbone.conv1'"),
        (dict(ranges={0: math.inf}), "ranges has inf for the activation of 'backbone.conv1'"),
    ],
)
def test_what_cannot_be_quantised_is_refused(change, message):
    plan = lower(build(CONFIGS["attention"]))
    with pytest.raises(ValueError, match=message):
        quantized(**dict(dict(plan=plan, ranges=ones(plan), kind=INT8), **change))


def test_a_block_without_the_range_of_what_lies_between():
    plan = lower(build(CONFIGS["attention"]))
    block = next(step for step in plan.steps if isinstance(step, p.SharedBlockStep))
    with pytest.raises(ValueError, match=f"none for the activation of '{block.name}'"):
        quantized(plan, {k: v for k, v in ones(plan).items() if k != block.hidden.index}, INT8)


def conv_inputs(model, x):
    """The largest absolute inputs of every convolution in the model itself, by name, one for each call."""
    found = collections.defaultdict(list)

    def note(name):
        return lambda module, inputs: found[name].append(inputs[0].abs().max().item())

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_ranges_are_the_largest_inputs_of_the_models_convolutions(name):
    model = build(CONFIGS[name])
    plan, x = lower(model), images(3, 64, 32)
    ranges = calibrate(plan, x, FP8)
    expected = conv_inputs(model, x)
    measured = set()
    for step in plan.steps[:-1]:
        if type(step) is p.Conv and step.inputs:
            (largest,) = expected[step.name]
            pairs = [(step.inputs[0], largest)]
        elif type(step) is p.SharedBlockStep:
            pairs = zip((step.inputs[0], step.hidden), expected[f"{step.name}.conv"], strict=True)
        else:
            continue
        for value, largest in pairs:
            assert ranges[value.index] == pytest.approx(largest, rel=1e-4)
            measured.add(value.index)
    assert set(ranges) == measured


def test_batches_of_several_sizes_and_raw_images_count_together():
    model = build(CONFIGS["attention"])
    plan = lower(model)
    raw = torch.randint(0, 256, (5, 32, 64, 3), dtype=torch.uint8)
    normalisation = Normalisation((0.1, 0.5, 0.3), (0.2, 0.4, 0.8))
    mean, std = torch.tensor(normalisation.mean), torch.tensor(normalisation.std)
    floating = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    whole = calibrate(plan, raw, FP8, normalisation)
    assert whole == pytest.approx(calibrate(plan, floating, FP8), rel=1e-4)
    assert whole != pytest.approx(calibrate(plan, raw, FP8), rel=1e-2)
    several = calibrate(plan, (batch for batch in (raw[:2], floating[2:])), FP8, normalisation)
    assert several == pytest.approx(whole, rel=1e-4)
    other = images(1, 64, 64)
    with_other = calibrate(plan, [raw, other], FP8, normalisation)
    alone = calibrate(plan, other, FP8)
    assert with_other == pytest.approx({k: max(whole[k], alone[k]) for k in whole}, rel=1e-4)
    assert [len(batch) for batch in batches_of(torch.zeros(2 * BATCH + 1, 3, 32, 32))] == [BATCH, BATCH, 1]


def test_ranges_of_int8_clip_the_tail():
    model = build(CONFIGS["attention"])
    plan, x = lower(model), images(2, 64, 64)
    largest = calibrate(plan, x, INT8, method="largest")
    assert largest == pytest.approx(calibrate(plan, x, FP8))
    least = calibrate(plan, x, INT8)
    assert set(least) == set(largest)
    assert all(0.5 * largest[k] < least[k] <= largest[k] * 1.0001 for k in least)
    assert any(least[k] < 0.99 * largest[k] for k in least)


def squared_error(x, largest):
    step = largest / 127
    return (x - (x / step).round().clamp(-128, 127) * step).square().sum().item()


SAMPLES = {
    "uniform": lambda: torch.rand(100_000),
    "relu": lambda: torch.randn(100_000).relu(),
    "long tail": lambda: torch.randn(100_000).pow(3),
    "one far off": lambda: torch.cat([torch.randn(100_000), torch.tensor([50.0])]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_range_of_least_error_loses_least(name):
    x = SAMPLES[name]()
    histogram = Histogram()
    histogram.add(x)
    found = histogram.least_error(127)
    every = [squared_error(x, histogram.largest * part / 64) for part in range(1, 65)]
    assert squared_error(x, found) <= 1.05 * min(every)
    if name == "uniform":
        assert found > 0.95
    else:
        assert squared_error(x, found) < 0.95 * every[-1]


def test_histograms_add_up_in_any_order():
    x = torch.cat([torch.zeros(7), torch.rand(1000), 6 * torch.rand(1000), -3 * torch.rand(1000)])
    whole, parts = Histogram(), Histogram()
    whole.add(x)
    for part in x.split(500):
        parts.add(part)
    parts.add(torch.zeros(3))
    # What is exactly 0 is exact at any range.
    assert whole.counts.sum() == parts.counts.sum() == 3000 and len(parts.counts) == BINS
    assert whole.largest == parts.largest == x.max()
    assert parts.least_error(127) == pytest.approx(whole.least_error(127), rel=0.03)
    # As if the range had been known from the start.
    direct = torch.histc(x[x != 0].abs(), BINS, 0, parts._top).long()
    assert 6 <= parts._top <= 12 and (parts.counts - direct).abs().sum() <= 2


def test_more_values_than_float32_counts():
    count = 2**24 + 100
    histogram = Histogram()
    histogram.add(torch.ones(1).expand(count))
    assert histogram.counts.sum() == count


def dead_layer(model):
    nn.init.constant_(model.backbone.layer1[0].bn1.weight, 0)
    nn.init.constant_(model.backbone.layer1[0].bn1.bias, 0)


def broken_layer(model):
    model.backbone.layer1[0].bn1.bias.data[3] = math.nan


@pytest.mark.parametrize(
    "change, arguments, error, message",
    [
        (None, dict(images=[]), ValueError, "calibration has no images, it needs at least one"),
        (None, dict(images=torch.zeros(0, 3, 64, 64)), ValueError, "calibration has no images"),
        (None, dict(images=["a.png"]), TypeError, "calibration holds a str, it must hold tensors"),
        (None, dict(images=torch.zeros(1, 64, 64, 3)), ValueError, "64"),
        (None, dict(kind=torch.bfloat16), ValueError, "kind is torch.bfloat16, it may be"),
        (
            None,
            dict(kind=FP8, method="least_error"),
            ValueError,
            "method is 'least_error', for torch.float8_e4m3fn it may be 'largest'",
        ),
        (
            None,
            dict(method="best"),
            ValueError,
            "method is 'best', for torch.int8 it may be 'least_error' or",
        ),
        (dead_layer, {}, ValueError, "activation of 'backbone.layer1.0.conv1' is nothing but zeros"),
        (broken_layer, {}, ValueError, "activation of 'backbone.layer1.0.conv1' is not finite"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change, arguments, error, message):
    model = build(CONFIGS["attention"])
    if change:
        change(model)
    with pytest.raises(error, match=message):
        calibrate(**dict(dict(plan=lower(model), images=images(1, 32, 32), kind=INT8), **arguments))


def test_what_is_not_finite_stays_so():
    histogram = Histogram()
    for x in (torch.ones(4), torch.tensor([1.0, math.nan]), torch.full((3,), 7.0)):
        histogram.add(x)
    assert math.isnan(histogram.largest)


@pytest.mark.parametrize(
    "dtype, calibration, message",
    [
        (INT8, None, "calibration is None, dtype torch.int8 needs images such as those to come"),
        (FP8, None, "calibration is None, dtype torch.float8_e4m3fn needs images"),
        (torch.float16, torch.zeros(1), "calibration is given and dtype torch.float16, it is for torch.int8"),
    ],
)
def test_calibration_is_for_eight_bits(dtype, calibration, message):
    with pytest.raises(ValueError, match=message):
        check_calibration(dtype, calibration)
    check_calibration(INT8, [])
    check_calibration(torch.float32, None)


def fake(x, step, kind):
    """x as it is after its codes have been made of it."""
    if kind is INT8:
        return (x / step).round().clamp(-128, 127) * step
    return (x / step).clamp(-448, 448).float().to(FP8).to(x.dtype) * step


def fake_weight(w, kind):
    step = w.float().abs().amax((1, 2, 3), keepdim=True) / (127 if kind is INT8 else 448)
    return fake(w.float(), step, kind).to(w.dtype)


def fake_model(model, plan, ranges, kind, dtype):
    """The model with inputs and weights of the same convolutions as the plan's rounded to codes."""
    model = copy.deepcopy(model).to(dtype)
    modules = dict(model.named_modules())
    largest = 127 if kind is INT8 else 448
    for step in plan.steps[:-1]:
        if type(step) is p.Conv and step.inputs:
            module, values = modules[step.name], [step.inputs[0]]
        elif type(step) is p.SharedBlockStep:
            module, values = modules[step.name].conv, [step.inputs[0], step.hidden]
        else:
            continue
        steps = itertools.cycle([ranges[value.index] / largest for value in values])
        module.weight.data = fake_weight(module.weight.data, kind)
        module.register_forward_pre_hook(
            lambda _, inputs, steps=steps: (
                fake(inputs[0].float(), next(steps), kind).to(dtype)
                if dtype is not torch.float64
                else fake(inputs[0], next(steps), kind)
            )
        )
    return model


def program(model, plan, dtype, device="cpu", **options):
    where = torch.device(device)
    return GpuProgram(
        plan,
        Options(where, dtype, graphs=device == "cuda", **options),
        model.normalisation,
        model.align_corners,
        tuner_of(where, False),
    )


def rms(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


@kinds
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("attention", torch.float16),
        ("no_lateral", torch.float16),
        ("five_levels", torch.float16),
        # Its scores are beyond float16.
        ("deconv", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_networks_equal_fake_quantisation(name, dtype, kind):
    """In float64, as far as eager torch with fake quantisation in the same 16 bits does."""
    model = build(CONFIGS[name])
    plan, x = lower(model), images(4, 64, 96)
    ranges = calibrate(plan, x, kind)
    fast = program(model, quantized(plan, ranges, kind), dtype, ours=False)
    found = fast.scores(x.to(dtype))
    assert set(fast.algorithm_names(4, 64, 96)) == {"torch"} and found.isfinite().all()
    exact = copy.deepcopy(model).double()(x.double())
    truth = fake_model(model, plan, ranges, kind, torch.float64)(x.double())
    eager = fake_model(model, plan, ranges, kind, dtype)(x.to(dtype))
    assert rms(found, truth) <= 2 * rms(eager, truth)
    # As far from the network in full precision as codes are, no further, and no nearer.
    assert 0.7 * rms(truth, exact) <= rms(found, exact) <= 1.4 * rms(truth, exact)


def storage(value, dtype, size, device):
    """Poisoned memory for a value."""
    kind = value.dtype(dtype)
    out = torch.full(value.shape(*size), 77 if kind is INT8 else math.nan, device=device).to(kind)
    return out.contiguous(memory_format=torch.channels_last) if out.ndim == 4 else out


def run(algorithm, step, inputs, dtype, size, device):
    outputs = [storage(value, dtype, size, device) for value in step.outputs] if algorithm.in_arena else []
    scratch = None
    if algorithm.scratch:
        scratch = torch.full((algorithm.scratch,), 0x7F, dtype=torch.uint8, device=device)
    own = algorithm.prepare()([x.to(device) for x in inputs], outputs, scratch, False)
    return [x.cpu() for x in (outputs if own is None else [own])]


def random_inputs(step, dtype, size):
    """Codes over their whole range, and floating values."""
    found = []
    for value in step.inputs:
        shape = value.shape(*size)
        if value.codes is INT8:
            x = torch.randint(-128, 128, shape).to(INT8)
        else:
            x = (40 * torch.randn(shape)).to(FP8) if value.codes else torch.randn(shape).to(dtype)
        found.append(x.contiguous(memory_format=torch.channels_last))
    return found


def truth_of(step, inputs):
    """A step in float64, before its result is rounded."""
    x, *others = (x.double() for x in inputs)
    if isinstance(step, p.Quantize):
        return x
    kind = step.inputs[0].codes
    weight = fake_weight(step.weight, kind).double() if kind else step.weight.half().double()
    x = x * (step.x_step if kind else 1.0)

    def affine(y, scale, shift):
        y = y * (1.0 if scale is None else scale.double()[:, None, None])
        return y + shift.double()[:, None, None]

    def leaky(y):
        return nn.functional.leaky_relu(y, step.act.slope)

    if isinstance(step, p.QuantizedBlock):
        h = leaky(affine(nn.functional.conv2d(x, weight, padding=1), step.scale1, step.shift1))
        h = fake(h, step.hidden_step, kind)
        y = affine(nn.functional.conv2d(h, weight, padding=1), step.scale2, step.shift2)
        return (y + others[0]).relu() + (others[0] if step.skip else 0.0)
    y = affine(nn.functional.conv2d(x, weight, None, step.stride, 1), step.scale, step.shift)
    y = leaky(y + others[0] if step.residual else y)
    return y + others[-1] if step.skip else y


def assert_is(results, step, truth, dtype, slack):
    """Results are the truth rounded to their dtypes; slack: how far off sums may be, of the largest.

    A code may be its neighbour where the truth lies that near the middle between both.
    """
    near = slack * truth.abs().max()
    for value, result in zip(step.outputs, results, strict=True):
        if value.codes is None:
            rounding = torch.finfo(dtype).eps / 2
            assert ((result.double() - truth).abs() <= near + rounding * truth.abs() + 1e-7).all()
        else:
            low, high = (fake(truth + side, step.codes_step, value.codes) for side in (-near, near))
            codes = result.double() * step.codes_step
            margin = 1e-6 * step.codes_step
            assert ((codes >= low - margin) & (codes <= high + margin)).all()
            assert (low == high).double().mean() > 0.9


STEPS = {
    "both": lambda kind: conv_step(kind=kind),
    "codes, residual": lambda kind: conv_step(residual=True, writes="codes", kind=kind),
    "floating, skip": lambda kind: conv_step(skip=True, writes="floating", kind=kind),
    "residual and skip, relu": lambda kind: conv_step(True, True, kind=kind, act=0.0),
    "no norm": lambda kind: conv_step(kind=kind, scale=False),
    "of floating": lambda kind: conv_step(floating=True, kind=kind),
    "quantize": lambda kind: p.Quantize("q", (p.Value(0, 24, 4),), p.Value(1, 24, 4, kind), 0.013),
}
SIZE = (2, 48, 32)


def context_of(device, dtype=torch.float16, **changes):
    where = torch.device(device)
    return Context(gpu_of(where), where, dtype, "ieee", Normalisation(), **changes)


@kinds
@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_torchs_calls_give_the_steps_result(name, kind):
    step = STEPS[name](kind)
    inputs = random_inputs(step, torch.float16, SIZE)
    (found,) = algorithms(step, SIZE, context_of("cpu", ours=False), Packed())
    assert found.name == "torch"
    results = run(found, step, inputs, torch.float16, SIZE, "cpu")
    assert_is(results, step, truth_of(step, inputs), torch.float16, 1e-6)


@kinds
@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_every_kernel_gives_the_steps_result(name, device, kind):
    step = STEPS[name](kind)
    inputs = random_inputs(step, torch.float16, SIZE)
    found = algorithms(step, SIZE, context_of(device, theirs=False), Packed())
    assert {algorithm.family for algorithm in found} == {"triton"}
    assert step.op == "quantize" or any("split" in algorithm.name for algorithm in found)
    # Hopper sums float8 products to 14 bits.
    slack = 2.0**-11 if device == "cuda" and kind is FP8 else 2e-6
    for algorithm in found:
        results = run(algorithm, step, inputs, torch.float16, SIZE, device)
        assert_is(results, step, truth_of(step, inputs), torch.float16, slack)


@kinds
@pytest.mark.parametrize("device", ["torch", *KERNELS])
@pytest.mark.parametrize("writes", ["both", "codes", "floating"])
@torch.no_grad()
def test_blocks_give_the_steps_result(writes, device, kind):
    """Where a code between the convolutions becomes its neighbour, so may one of the results."""
    step = block_step(skip=writes == "both", writes=writes, kind=kind)
    inputs = random_inputs(step, torch.float16, SIZE)
    ours = device != "torch"
    context = context_of(device if ours else "cpu", ours=ours, theirs=not ours)
    truth = truth_of(step, inputs)
    one_code = step.hidden_step * (1 if kind is INT8 else 32) * (step.scale2.abs() * 1.0).max()
    near = (one_code * step.weight.abs().max()).item()
    for algorithm in algorithms(step, SIZE, context, Packed()):
        results = run(algorithm, step, inputs, torch.float16, SIZE, context.device)
        for value, result in zip(step.outputs, results, strict=True):
            scale = step.codes_step if value.codes else 1.0
            rounded = fake(truth, scale, value.codes) if value.codes else truth.half().double()
            off = (result.double() * scale - rounded).abs()
            unit = scale * (1 if value.codes is INT8 else 32) if value.codes else near + 2e-3 * truth.abs()
            assert (off <= near + unit).all()
            assert (off <= 1e-3 * rounded.abs() + 1e-6).double().mean() > 0.95


@kinds
@pytest.mark.parametrize("device", KERNELS)
@torch.no_grad()
def test_networks_on_kernels(device, kind):
    """As near to the network in full precision as fake quantisation, and every step on kernels of ours."""
    if device == "cpu" and native.emulation is None:
        pytest.skip(f"no emulator: {native.why_not_emulated}")
    model = build(CONFIGS["attention"])
    plan, x = lower(model), images(1, 32, 64)
    ranges = calibrate(plan, images(4, 64, 64), kind)
    coded = quantized(plan, ranges, kind)
    fast = program(model, coded, torch.float16, device, theirs=False)
    found = fast.scores(x.half().to(device)).cpu()
    exact = copy.deepcopy(model).double()(x.double())
    truth = fake_model(model, plan, ranges, kind, torch.float64)(x.double())
    eager = fake_model(model, plan, ranges, kind, torch.float16)(x.half())
    assert rms(found, truth) <= 2 * rms(eager, truth)
    assert rms(found, exact) <= 2 * rms(truth, exact)


def test_old_gpus_say_what_codes_need():
    step = conv_step(kind=FP8)
    context = context_of("cpu", theirs=False)
    a100 = dataclasses.replace(context.gpu, name="NVIDIA A100", capability=(8, 0))
    context = dataclasses.replace(context, gpu=a100)
    reason = "NVIDIA A100 has compute capability 8.0, codes of torch.float8_e4m3fn need 8.9"
    if not _triton.reason():
        for one in (step, block_step(kind=FP8)):
            with pytest.raises(RuntimeError, match=reason):
                algorithms(one, SIZE, context, Packed())
        assert algorithms(conv_step(kind=INT8), SIZE, context, Packed())
    turing = dataclasses.replace(a100, name="T4", capability=(7, 5))
    context = dataclasses.replace(context, gpu=turing)
    assert gpu_quantized.unfit(INT8, context) == "T4 has compute capability 7.5, codes of torch.int8 need 8.0"
    assert gpu_quantized.unfit(None, context) is None


@pytest.mark.skipif(_triton.reason() is not None, reason=f"no Triton: {_triton.reason()}")
@kinds
def test_codes_are_predicted_faster_than_16_bits(kind):
    """Where arithmetic decides; and torch's calls far slower."""
    coded = conv_step(kind=kind, writes="codes")
    wide = dataclasses.replace(coded.inputs[0], channels=512), dataclasses.replace(coded.output, channels=512)
    weight = torch.zeros(512, 512, 3, 3)
    coded = dataclasses.replace(coded, inputs=wide[:1], output=wide[1], weight=weight)
    plain = p.Conv(
        "conv", (dataclasses.replace(wide[0], codes=None),), dataclasses.replace(wide[1], codes=None),
        weight, coded.scale, coded.shift, 2, coded.act,
    )  # fmt: skip
    size = (8, 512, 512)
    found = algorithms(coded, size, context_of("cpu"), Packed())
    best, torchs = found[0], next(one for one in found if one.name == "torch")
    assert best.family == "triton" and torchs.microseconds > 4 * best.microseconds
    in_16_bits = algorithms(plain, size, context_of("cpu"), Packed())[0]
    assert 0.4 < best.microseconds / in_16_bits.microseconds < 0.7


def test_scratch_holds_codes_between_and_parts_of_sums():
    step = block_step()
    found = algorithms(step, SIZE, context_of("cpu", theirs=False), Packed()) if not _triton.reason() else []
    for algorithm in found:
        split = int(algorithm.name.partition("split ")[2] or 1)
        pixels, between = 2 * 6 * 4, -(-2 * 6 * 4 * 32 // 256) * 256
        assert algorithm.scratch == between + (4 * split * pixels * 32 if split > 1 else 0)
        assert algorithm.launches == (4 if split > 1 else 2)


@torch.no_grad()
def test_problems_are_told_apart_and_timed():
    context = context_of("cpu", ours=False)
    steps = [
        step
        for kind in KINDS
        for step in (
            *(make(kind) for make in STEPS.values()),
            *(block_step(writes=writes, kind=kind) for writes in ("both", "codes", "floating")),
        )
    ]
    keys = {key_of(step, SIZE, context) for step in steps}
    # Without a norm it is the same work.
    assert len(keys) == len(steps) - len(KINDS)
    for step in steps:
        candidate(step, algorithms(step, SIZE, context, Packed())[0], SIZE, context).prepare()()
