"""Every way to run a step gives what the step means; the cost model and the names."""

import dataclasses
import math

import pytest
import torch
from engines import ENGINES, device_of, needs_emulation
from torch import nn
from torch.nn import functional as F

from shelfkern import nn as published
from shelfkern.engine import plan as p
from shelfkern.engine.gpu import cost, library
from shelfkern.engine.gpu.algorithm import Context
from shelfkern.engine.gpu.algorithms import algorithms
from shelfkern.engine.gpu.device import H200, gpu_of
from shelfkern.engine.gpu.timing import candidate, key_of
from shelfkern.engine.lower import lower
from shelfkern.engine.problem import Packed
from shelfkern.nn.backbone import BasicBlock, Bottleneck
from shelfkern.nn.blocks import SharedBlock
from shelfkern.normalisation import Normalisation
from shelfkern.ops import _conv_triton as conv

CPU = torch.device("cpu")
SIZE = (2, 64, 32)


def context_of(device, dtype, **changes):
    return Context(gpu_of(device), device, dtype, "ieee", Normalisation(), **changes)


def conv_step(residual=False, skip=False, stride=1, kernel=3, slope=0.0):
    x, out = p.Value(0, 64, 8), p.Value(1, 128, 8 * stride)
    others = [p.Value(2, 128, 8 * stride)] * residual + [p.Value(3, 128, 8 * stride)] * skip
    weight = torch.randn(128, 64, kernel, kernel) / (8 * kernel)
    vectors = torch.rand(128) + 0.5, torch.randn(128)
    act = p.Activation(slope)
    return p.Conv("conv", (x, *others), out, weight, *vectors, stride, act, residual, skip)


def block_step(channels, skip=False, slope=0.01):
    x, out, hidden = (p.Value(index, channels, 8) for index in range(3))
    weight = torch.randn(channels, channels, 3, 3) / (3 * channels**0.5)
    norms = [
        torch.rand(channels) + 0.5,
        torch.randn(channels),
        torch.rand(channels) + 0.5,
        torch.randn(channels),
    ]
    return p.SharedBlockStep("block", (x,), out, weight, *norms, p.Activation(slope), hidden, skip)


def deconv_step():
    x, skip, out = p.Value(0, 64, 8), p.Value(1, 48, 4), p.Value(2, 48, 4)
    return p.DeconvAdd("deconv", (x, skip), out, torch.randn(64, 48, 3, 3) / 24, torch.randn(48))


def gate_step():
    x, out = p.Value(0, 64, 4), p.Value(1, 32, None)
    return p.AttentionGate("gate", (x,), out, torch.randn(32, 64), torch.rand(32), torch.randn(32))


STEPS = {
    "conv": conv_step(),
    "conv, residual": conv_step(residual=True),
    "conv, skip, stride 2": conv_step(skip=True, stride=2, slope=0.01),
    "1x1": conv_step(kernel=1),
    "1x1, no activation": conv_step(kernel=1, slope=None),
    "block of 64": block_step(64),
    "block of 128, skip": block_step(128, skip=True, slope=0.0),
    "deconv": deconv_step(),
    "gate": gate_step(),
    "upsample": p.UpsampleAdd(
        "up", (p.Value(0, 48, 8), p.Value(1, 48, 4), p.Value(2, 48, None)), p.Value(3, 48, 4)
    ),
    "stem": p.Stem(
        "stem", (), p.Value(0, 64, 4), torch.randn(64, 3, 7, 7) / 12, torch.rand(64) + 0.5, torch.randn(64),
        p.Activation(0.0),
    ),
}  # fmt: skip


def random(value, dtype):
    shape = value.shape(*SIZE)
    if value.stride is None:
        return torch.rand(shape)
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def run(algorithm, step, inputs, dtype, device):
    """The step's result, from poisoned memory."""
    inputs = [x.to(device) for x in inputs]
    outputs, scratch = [], None
    if algorithm.in_arena:
        out = torch.full(step.output.shape(*SIZE), torch.nan, device=device)
        kind = step.output.dtype(dtype)
        outputs = [
            out.to(kind) if out.ndim == 2 else out.to(kind).contiguous(memory_format=torch.channels_last)
        ]
    if algorithm.scratch:
        scratch = torch.full((algorithm.scratch,), 0xFF, dtype=torch.uint8, device=device)
    own = algorithm.prepare()(inputs, outputs, scratch, False)
    return (outputs[0] if own is None else own).cpu()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_every_algorithm_gives_the_steps_result(name, engine):
    """As exact as torch's own calls in the same dtype, from float64."""
    step, dtype, device = STEPS[name], torch.float16, device_of(engine)
    inputs = [random(value, dtype) for value in step.inputs] or [torch.randn(SIZE[0], 3, *SIZE[1:]).to(dtype)]
    exactly = context_of(CPU, torch.float64, ours=False)
    (truth_of,) = algorithms(step, SIZE, exactly, Packed())
    truth = run(truth_of, step, [x.double() for x in inputs], torch.float64, CPU)
    eager = run(
        algorithms(step, SIZE, context_of(CPU, dtype, ours=False), Packed())[0], step, inputs, dtype, CPU
    )
    allowed = 2 * (eager.double() - truth).square().mean().sqrt() + 1e-6 * truth.std()
    found = algorithms(step, SIZE, context_of(device, dtype), Packed())
    assert len(found) >= 2
    for algorithm in found:
        result = run(algorithm, step, inputs, dtype, device)
        error = (result.double() - truth).square().mean().sqrt()
        assert error <= allowed, (algorithm.name, error, allowed)


@needs_emulation
def test_split_sums_and_tiles_of_every_kind_are_among_the_algorithms():
    names = [a.name for a in algorithms(STEPS["conv"], SIZE, context_of(CPU, torch.float16), Packed())]
    assert len(set(names)) == len(names)
    assert any("split" in name for name in names) and any("swap" in name for name in names)
    assert "torch" in names
    blocks = algorithms(STEPS["block of 64"], SIZE, context_of(CPU, torch.float16), Packed())
    assert {"cuda 12 rows", "cuda 8 rows", "cuda 4 rows"} <= {algorithm.name for algorithm in blocks}
    assert {a.family for a in blocks} == {"cuda", "triton", "torch"}
    # Scratch holds what lies between the two convolutions, and the parts of sums.
    one = next(a for a in blocks if a.family == "triton" and "split" not in a.name)
    assert one.scratch == 2 * 64 * 8 * 4 * 2 and one.launches == 2
    split = next(a for a in blocks if a.name.endswith("split 4"))
    assert split.scratch == one.scratch + 4 * 4 * (2 * 8 * 4) * 64 and split.launches == 4


@needs_emulation
def test_fastest_by_prediction_comes_first():
    for step in STEPS.values():
        found = algorithms(step, SIZE, context_of(CPU, torch.float16), Packed())
        times = [algorithm.microseconds for algorithm in found]
        assert times == sorted(times) and times[0] > cost.LAUNCH


def test_what_cannot_run_says_why():
    context = context_of(CPU, torch.float16, ours=False, theirs=False)
    reason = "backend is 'native', which cannot run conv_bn_act of conv: backend is 'library'"
    with pytest.raises(RuntimeError, match=reason):
        algorithms(STEPS["conv"], SIZE, context, Packed())
    pool = p.MaxPool("pool", (p.Value(0, 8, 2),), p.Value(1, 8, 4))
    with pytest.raises(RuntimeError, match="cannot run max_pool of pool: max_pool has no such kernel"):
        algorithms(pool, SIZE, context_of(CPU, torch.float16, theirs=False), Packed())


@needs_emulation
def test_blocks_that_the_cuda_kernel_does_not_take():
    wide_block = algorithms(block_step(160), SIZE, context_of(CPU, torch.float16), Packed())
    assert {a.family for a in wide_block} == {"triton", "torch"}
    in_float32 = algorithms(block_step(64), SIZE, context_of(CPU, torch.float32), Packed())
    assert {a.family for a in in_float32} == {"triton", "torch"}


def test_weights_are_packed_once():
    made = []
    packed = Packed()
    for _ in range(3):
        assert packed.get("form", lambda: made.append(1) or "weights") == "weights"
    assert made == [1]


@torch.no_grad()
def test_a_product_of_matrices_is_a_1x1_convolution():
    """cuBLASLt's call, which also runs on a CPU."""
    for step in (STEPS["1x1"], STEPS["1x1, no activation"]):
        assert library.cublaslt_fits(step)
        x = random(step.inputs[0], torch.float32)
        out = torch.full(step.output.shape(*SIZE), torch.nan).contiguous(memory_format=torch.channels_last)
        folded = library.folded(step.weight, step.scale, step.shift, torch.float32, CPU)
        assert library.cublaslt(step, *folded)([x], [out]) is None
        expected = F.conv2d(x, step.weight * step.scale[:, None, None, None], step.shift)
        torch.testing.assert_close(out, expected if step.act.slope is None else expected.relu())
    others = (
        STEPS["conv"],
        conv_step(kernel=1, stride=2),
        conv_step(True, kernel=1),
        conv_step(kernel=1, slope=0.1),
    )
    assert not any(map(library.cublaslt_fits, others))


def test_fused_and_plain_calls_of_cudnn_are_both_timed():
    """One may be many times slower than predicted: the tuner times the best of each family."""
    on_gpu = dataclasses.replace(context_of(CPU, torch.float16), device=torch.device("cuda"), ours=False)
    for step in (STEPS["conv"], STEPS["conv, residual"], block_step(64, slope=0.0)):
        families = [algorithm.family for algorithm in algorithms(step, SIZE, on_gpu, Packed())]
        assert sorted(families) == ["cudnn", "cudnn-fused"]
    families = [algorithm.family for algorithm in algorithms(STEPS["1x1"], SIZE, on_gpu, Packed())]
    assert sorted(families) == ["cublaslt", "cudnn", "cudnn-fused"]


def test_what_cudnn_fuses():
    assert library.cudnn_fused_fits(STEPS["conv"]) and library.cudnn_fused_fits(STEPS["conv, residual"])
    assert not library.cudnn_fused_fits(STEPS["conv, skip, stride 2"])
    assert not library.cudnn_fused_fits(conv_step(slope=0.01))


def test_problems_are_told_apart_by_all_that_matters():
    context = context_of(CPU, torch.float16)
    steps = [*STEPS.values(), conv_step(slope=0.1)]
    keys = {key_of(step, size, context) for step in steps for size in (SIZE, (1, 64, 32), (2, 32, 64))}
    assert len(keys) == 3 * len(steps)
    again = dataclasses.replace(STEPS["conv"], name="elsewhere", weight=torch.randn(128, 64, 3, 3))
    assert key_of(again, SIZE, context) == key_of(STEPS["conv"], SIZE, context)
    assert key_of(again, SIZE, context_of(CPU, torch.bfloat16)) != key_of(again, SIZE, context)
    single = context_of(CPU, torch.float32)
    tf32 = dataclasses.replace(single, precision="tf32")
    assert key_of(again, SIZE, single) != key_of(again, SIZE, tf32)


@needs_emulation
@torch.no_grad()
def test_what_is_timed_runs_on_the_problems_shapes():
    context = context_of(CPU, torch.float16)
    for step in STEPS.values():
        algorithm = algorithms(step, SIZE, context, Packed())[0]
        found = candidate(step, algorithm, SIZE, context)
        assert (found.name, found.microseconds) == (algorithm.name, algorithm.microseconds)
        found.prepare()()


# By hand: 18-lw has 34 convolutions, 5 blocks, 4 gates of two kernels, 4 merges and a stem.
KERNELS = {
    "shelfnet18_lw": (34, 5, 4, 4, 0),
    "shelfnet34_lw": (47, 5, 4, 4, 0),
    "shelfnet50": (60, 12, 0, 0, 6),
    "shelfnet101": (111, 12, 0, 0, 6),
}
# Multiply-adds of one image of 512 x 512, in billions: torch's own count of the models.
GMACS = {"shelfnet18_lw": 12.339, "shelfnet34_lw": 30.102, "shelfnet50": 39.662, "shelfnet101": 59.057}


def plan_of(name):
    with torch.device("meta"):
        return lower(getattr(published, name)())


@needs_emulation
@pytest.mark.parametrize("size", [(1, 512, 512), (1, 1024, 2048), (32, 512, 512)])
@pytest.mark.parametrize("name", KERNELS)
def test_launches_arithmetic_and_time_of_the_published_models(name, size):
    plan, context = plan_of(name), context_of(CPU, torch.float16)
    chosen = [algorithms(step, size, context, Packed())[0] for step in plan.steps]
    convs, blocks, gates, merges, deconvs = KERNELS[name]
    split = sum(a.launches == 2 and "split" in a.name for a in chosen)
    pairs = sum(
        a.family == "triton" for a, s in zip(chosen, plan.steps, strict=True) if s.op == "shared_block"
    )
    split_pairs = sum(a.launches == 4 for a in chosen)
    by_hand = 1 + convs + split + blocks + pairs + 2 * split_pairs + 2 * gates + merges + deconvs
    assert sum(a.launches for a in chosen) == by_hand
    scale = size[0] * size[1] * size[2] / 512**2
    assert plan.macs(*size) == pytest.approx(GMACS[name] * 1e9 * scale, rel=1e-3)
    # No faster than arithmetic and launches allow; no slower than a tenth of that rate and 5 us a launch.
    total = sum(a.microseconds for a in chosen)
    floor = 2 * plan.macs(*size) / 790e6
    assert floor + by_hand * 0.5 < total < 10 * floor + by_hand * 5


def test_least_traffic_counted_by_hand():
    plan = plan_of("shelfnet18_lw")
    by_name = {step.name: p.step_bytes(step, torch.float16, 1, 512, 512) for step in plan.steps}
    maps, filters, vectors = 128 * 128 * 64 * 2, 64 * 64 * 9 * 2, 2 * 64 * 4
    assert by_name["backbone.layer1.0.conv1"] == 2 * maps + filters + vectors
    # The residual is read too.
    assert by_name["backbone.layer1.0.conv2"] == 3 * maps + filters + vectors
    image = 3 * 512 * 512 * 2
    assert by_name["backbone.conv1"] == image + maps + 64 * 3 * 49 * 2 + vectors
    # A block reads its input once, and its weights once for both convolutions.
    block = 64 * 64 * 64 * 2
    assert by_name["shelf.columns.1.entry"] == 2 * block + filters + 2 * vectors
    merge = 32 * 32 * 64 * 2 + 2 * 64 * 64 * 64 * 2 + 64 * 4
    assert by_name["shelf.columns.0.merges.1"] == merge


def test_costs_grow_with_the_work():
    assert cost.passes(1 << 30, H200) > cost.passes(1 << 20, H200) > cost.LAUNCH
    assert cost.moving(100 << 20, H200) == pytest.approx((100 << 20) / (0.8 * 4.3e6))
    few, many = (cost.cuda_shared_block((n, 64, 64, 64), 8, H200) for n in (1, 16))
    # 64 tiles fill half of the GPU, 1024 take eight waves.
    assert many > 3 * few
    problem = conv.Problem(4096, 64, 9, 64, torch.float16)
    config = conv.CONFIGS[3]
    assert cost.library_conv(problem, "tf32", H200) <= cost.triton_conv(problem, config, H200)


def test_a_time_predicted_by_hand():
    """64 channels at 128 x 128, by tiles of 128 pixels and 64 channels, 32 input channels a step."""
    plan = plan_of("shelfnet18_lw")
    step = next(step for step in plan.steps if step.name == "backbone.layer1.0.conv1")
    found = algorithms(step, (1, 512, 512), context_of(CPU, torch.float16), Packed())
    (algorithm,) = (a for a in found if a.name == "triton 128x64x64 w8 s4")
    # 128 tiles, one wave. Of each 9 x 64 x 128 x 64 products at 2.99 million a microsecond; and 9 x 64 x 192
    # numbers of 2 bytes, those of all 132 multiprocessors at 8.6 MB a microsecond: that takes longer.
    products, loads = 9 * 64 * 128 * 64 / (790e6 / 2 / 132), 192 * 9 * 64 * 2 * 132 / 8.6e6
    assert products == pytest.approx(1.58, abs=0.01) and loads == pytest.approx(3.395, abs=0.001)
    assert algorithm.microseconds == pytest.approx(1.3 + loads + 1.0)


class Traffic:
    """What an eager forward pass of a model reads and writes, seen by hooks on its modules, 16 bits each."""

    def __init__(self, model):
        self.bytes = 0
        self.inside = set()
        self.classifier = model.head.classify
        for module in model.modules():
            if isinstance(module, SharedBlock):
                # Its convolution runs twice inside; x is read once, for the sum too.
                self.inside |= {module.conv}
                module.register_forward_hook(lambda m, inputs, out: self.add(m.conv, inputs[0], out, 4))
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module not in self.inside:
                module.register_forward_hook(self.conv)
            if isinstance(module, BasicBlock | Bottleneck):
                # The shortcut, read by the last convolution.
                module.register_forward_hook(lambda m, inputs, out: self.plain(out))

    def add(self, conv, x, out, vectors):
        self.plain(x), self.plain(out)
        self.bytes += 2 * conv.weight.numel() + 4 * vectors * out.shape[1]

    def plain(self, x):
        self.bytes += 2 * x.numel()

    def conv(self, module, inputs, out):
        # A bias, a folded norm, or in the classifier of the real-time models neither.
        vectors = 1 if module.bias is not None else 2 * (module is not self.classifier)
        self.add(module, inputs[0], out, vectors)


@pytest.mark.parametrize("size", [(1, 512, 512), (1, 1024, 2048), (8, 512, 512)])
@pytest.mark.parametrize("name", KERNELS)
@torch.no_grad()
def test_least_traffic_of_the_published_models(name, size):
    """The plan's bytes are those that eager's modules move, less what the fused ops do not."""
    n, h, w = size
    with torch.device("meta"):
        model = getattr(published, name)().eval()
        traffic = Traffic(model)
        model(torch.empty(n, 3, h, w))
    plan = plan_of(name)
    moved = {step.name: p.step_bytes(step, torch.float16, *size) for step in plan.steps}
    counted = traffic.bytes
    for step in plan.steps:
        if isinstance(step, p.Stem):
            # Eager writes what the pooling reads, four times as many pixels.
            counted -= 2 * 3 * math.prod(step.output.shape(*size))
        if isinstance(step, p.AttentionGate):
            # Eager's convolution reads pooled features and gives 16 bits; the gate reads all, gives 32.
            c = step.output.channels
            counted += 2 * math.prod(step.inputs[0].shape(*size)) - 2 * n * step.inputs[0].channels
            counted += 2 * n * c
        if isinstance(step, p.UpsampleAdd):
            counted += sum(value.bytes(*size, torch.float16) for value in (*step.inputs, step.output))
        if isinstance(step, p.DeconvAdd) or (isinstance(step, p.Conv) and step.skip):
            # The skip.
            counted += step.output.bytes(*size, torch.float16)
    assert sum(moved.values()) == counted
