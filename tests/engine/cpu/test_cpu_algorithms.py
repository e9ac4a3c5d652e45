import dataclasses
import math
import random

import pytest
import torch
from models import CONFIGS, assert_as_exact_as_eager, build, images
from parity import each_isa

import shelfkern
from shelfkern import native
from shelfkern.engine import plan as p
from shelfkern.engine.cpu import library, program
from shelfkern.engine.cpu.algorithm import Context
from shelfkern.engine.cpu.algorithms import algorithms
from shelfkern.engine.cpu.timing import images_of
from shelfkern.engine.lower import lower
from shelfkern.engine.problem import Packed, key_of
from shelfkern.nn.extents import Extents
from shelfkern.normalisation import Normalisation
from shelfkern.ops._conv_winograd import pays

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
SIZES = [(1, 32, 32), (2, 96, 64), (1, 33, 140)]


def context(dtype=torch.float32, **changes):
    return Context(dtype, Normalisation(), **changes)


def conv_step(channels, kernel=3, stride=1):
    x, out = (p.Value(i, channels, 1 if i == 0 else stride) for i in range(2))
    weight = torch.randn(channels, channels, kernel, kernel)
    return p.Conv("conv", (x,), out, weight, torch.ones(channels), None, stride, p.Activation(0.0))


def names(step, size, where):
    return [algorithm.name for algorithm in algorithms(step, size, where, Packed())]


@needs_native
@pytest.mark.parametrize("channels, others", [(31, []), (32, ["native winograd 4x4"])])
def test_a_stem_of_many_channels_takes_fewer_products(channels, others):
    weight, vector = torch.zeros(channels, 3, 7, 7), torch.zeros(channels)
    step = p.Stem("it", (), p.Value(0, channels, 4), weight, vector, vector, p.Activation(0.0))
    assert names(step, (1, 64, 64), context(theirs=False)) == [*others, "native direct"]


@needs_native
@torch.no_grad()
def test_a_network_with_a_wide_stem_is_as_exact_as_eager():
    model = build(dataclasses.replace(CONFIGS["enlarged"], backbone_width=48))
    inputs = [images(*size, seed=seed) for size in SIZES for seed in range(3)]
    fast = shelfkern.accelerate(model, backend="native")
    assert fast.plan.algorithms(1, 64, 64)[0] == "native winograd 4x4"
    assert_as_exact_as_eager(fast, model, inputs, torch.float32)


def test_what_reads_images_is_timed_on_those_that_it_enlarges():
    plan = lower(build(CONFIGS["enlarged"]))
    size = (2, *plan.extents.seen(90, 70))
    where = context(extents=plan.extents)
    assert images_of(size, where).shape == (2, 3, *plan.extents.padded(90, 70))
    assert images_of(size, context()).shape == (2, 3, *size[1:])
    keys = [
        [key_of(step, size, torch.float32, extents=extents) for step in plan.steps]
        for extents in (Extents(), plan.extents)
    ]
    differ = [step.inputs for step, one, other in zip(plan.steps, *keys, strict=True) if one != other]
    assert differ == [()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_mix_of_algorithms_is_as_exact_as_eager(name, dtype, monkeypatch):
    model, draw, mixed = build(CONFIGS[name]), random.Random(name), set()

    def choose(plan, size, where, tuner, passes):
        drawn = [draw.choice(names(step, size, where)) for step in plan.steps]
        mixed.update(drawn)
        return drawn

    def poisoned(shape, dtype, pooled=True):
        return torch.full(shape, math.nan if dtype.is_floating_point else torch.iinfo(dtype).max, dtype=dtype)

    monkeypatch.setattr(program, "choose", choose)
    monkeypatch.setattr(native, "empty", poisoned)
    inputs = [images(*size) for size in SIZES for _ in range(3)]
    # A new program each time, so that it is mixed anew.
    assert_as_exact_as_eager(lambda x: shelfkern.accelerate(model, dtype)(x), model, inputs, dtype)
    assert len(mixed) > 1 or native.why_not


@needs_native
@pytest.mark.parametrize("extent", [1, 2, 4, 5, 6, 7, 12, 13, 64])
def test_without_measurements_winograd_runs_where_it_pays(extent):
    wide, narrow = names(conv_step(32), (1, extent, extent), context()), conv_step(31)
    assert set(wide) == {"native direct", "native winograd 4x4", "native winograd 2x2", "onednn"} or (
        library.onednn_reason()
    )
    assert wide[0] == ("native winograd 4x4" if pays((1, 32, extent, extent)) else "native direct")
    for step in (narrow, conv_step(63, 3, 2), conv_step(64, 1)):
        found = names(step, (1, 64, 64), context())
        assert found[0] == "native direct" and not any("winograd" in name for name in found)


@needs_native
@pytest.mark.parametrize("extent", [1, 3, 4, 5, 8, 10, 12, 64])
def test_without_measurements_filters_of_stride_2_run_where_they_pay(extent):
    down = conv_step(64, 3, 2)
    low, high = p.Value(0, 64, 2), p.Value(1, 64, 1)
    up = p.DeconvAdd("up", (low, high), p.Value(2, 64, 1), torch.randn(64, 64, 3, 3), torch.ones(64))
    for step, transposed in ((down, False), (up, True)):
        found = names(step, (1, 2 * extent, 2 * extent), context(theirs=False))
        assert set(found) == {"native direct", "native winograd 4x4"}
        filtered = found[0] == "native winograd 4x4"
        assert filtered == pays((1, 64, extent, extent), 2, transposed)


@needs_native
@pytest.mark.parametrize("has", [False, True])
def test_whole_numbers_are_multiplied_of_bfloat16_where_there_are_instructions(has, monkeypatch):
    monkeypatch.setattr(native, "has_product", lambda dtype: dtype is not torch.int16 or has)
    low, high = p.Value(0, 64, 2), p.Value(1, 64, 1)
    up = p.DeconvAdd("up", (low, high), p.Value(2, 64, 1), torch.randn(64, 64, 3, 3), torch.ones(64))
    for step in (conv_step(64), conv_step(64, 3, 2), up):
        found = names(step, (1, 64, 64), context(torch.bfloat16))
        assert ("native winograd 4x4 int16" in found) == has and "native winograd 4x4" in found
        assert not has or found[0] == "native winograd 4x4 int16"
        assert "native winograd 4x4 int16" not in names(step, (1, 64, 64), context())
    narrow = names(conv_step(31), (1, 64, 64), context(torch.bfloat16))
    assert not any("winograd" in name for name in narrow)


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_a_backend_has_its_own_algorithms(name):
    for step in lower(build(CONFIGS[name])).steps:
        theirs = names(step, (1, 64, 64), context(ours=False))
        assert theirs and set(theirs) <= {"onednn", "torch"}
        if not isinstance(step, p.MaxPool) and step.inputs:
            ours = names(step, (1, 64, 64), context(theirs=False))
            assert ours and all(name.startswith("native") for name in ours)
            assert sorted(ours + theirs) == sorted(names(step, (1, 64, 64), context()))


def test_a_step_without_kernels_says_why():
    step = p.MaxPool("pool", (p.Value(0, 8, 4),), p.Value(1, 8, 8))
    with pytest.raises(RuntimeError, match="backend is 'native', which cannot run max_pool: max_pool has no"):
        algorithms(step, (1, 64, 64), context(theirs=False), Packed())


@needs_native
def test_weights_are_packed_once_for_all_sizes_and_only_for_what_runs():
    step, packed = conv_step(32), Packed()

    def made(index, size):
        algorithms(step, size, context(), packed)[index].prepare()
        return dict(packed._made)

    assert not packed._made
    first = made(0, (1, 64, 64))
    assert set(first) == {"native winograd 4x4"} and made(0, (2, 32, 96)) == first
    assert set(made(0, (1, 2, 2))) == {"native winograd 4x4", "direct"}


@pytest.mark.skipif(library.onednn_reason() is not None, reason="no oneDNN")
def test_oneddn_multiplies_bfloat16_only_where_the_cpu_does(monkeypatch):
    step = dataclasses.replace(conv_step(32), shift=torch.randn(32))
    x = torch.randn(1, 32, 9, 9).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    truth = torch.relu(torch.conv2d(x.double(), step.weight.double(), step.shift.double(), padding=1))
    # Some CPUs have no instructions, and oneDNN no convolutions, of bfloat16.
    for has in (False, True)[: 1 + torch.ops.mkldnn._is_mkldnn_bf16_supported()]:
        monkeypatch.setattr(library, "bfloat16_products", lambda has=has: has)
        packed = Packed()
        (found,) = algorithms(step, (1, 9, 9), context(torch.bfloat16, ours=False), packed)
        run = found.prepare()
        out = run([x], [], torch.empty(0))
        (convolve,) = packed._held.values()
        assert convolve.weight.dtype is (torch.bfloat16 if has else torch.float32)
        assert out.dtype is torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
        assert (out - truth).abs().max() <= 2**-7 * truth.abs().max()


@pytest.mark.skipif(library.onednn_reason() is not None, reason="no oneDNN")
def test_layouts_for_a_size_go_with_what_runs_it():
    step, packed = conv_step(32), Packed()

    def run(extent):
        (found,) = algorithms(step, (1, extent, extent), context(ours=False), packed)
        return found.prepare()

    runs = [run(9), run(9), run(16)]
    assert len(packed._held) == 2 and not packed._made
    del runs[0]
    assert len(packed._held) == 2
    runs.clear()
    assert not packed._held


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_bfloat16_on_every_isa_is_as_exact_as_eager(name):
    """With instructions for products of bfloat16 and without."""
    model, inputs = build(CONFIGS[name]), [images(*size, seed) for size in SIZES for seed in (0, 1)]
    each_isa(
        lambda isa: assert_as_exact_as_eager(
            shelfkern.accelerate(model, torch.bfloat16), model, inputs, torch.bfloat16
        )
    )
