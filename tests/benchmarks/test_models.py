"""The benchmark of whole networks: its cases, what it refuses, its rows, and that it ends in time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import arithmetic
import clocks
import measure
import numpy as np
import peers
import pytest
import resident
import rows
import sessions
import torch
from cases import (
    MODELS,
    RANGE_IMAGES,
    SHIPPED,
    Case,
    Matrix,
    build,
    calibrate,
    images_of,
    normalised,
    pictures,
    range_images,
)
from click.testing import CliRunner
from clocks import Ceilings
from judge import EAGERS, MAX_DIFFERENT, MAX_DIFFERENT_INT8, MAX_ERROR, Judge, Wrong
from measure import Deadline, OutOfTime, Times, time_limit
from peers import compiled, cpu_runtimes, cudnn, eager, exported, ours, quantised, tensorrt
from peers.network import Network

from shelfkern import native
from shelfkern.engine import plan
from shelfkern.nn import ShelfNet, ShelfNetConfig, shelfnet18_lw
from shelfkern.timing import Timing

ROOT = Path(__file__).parents[2]
CEILINGS = Ceilings(bytes_per_s=1e12, flop_per_s={"float32": 1e12, "float16": 1e15, "tf32": 4e14})
SCORES = Case("shelfnet18_lw", (64, 96), 2, "float32", False, "cpu")
LABELS = dataclasses.replace(SCORES, labels=True)
CPU = torch.device("cpu")


def load(name):
    """A script of the benchmarks, under a name that no test's helper has."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


program = load("models")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class OneMillisecond:
    """A meter by which every call takes so many milliseconds as its place says, and no time."""

    device = "cpu"

    def context_lost(self):
        return False

    def measure(self, runs):
        return {
            name: Times(Timing((1e-3 * place,) * 3), Timing((2e-3 * place,) * 3))
            for place, name in enumerate(runs, 1)
        }

    def launches(self, run):
        return 7


@dataclasses.dataclass(frozen=True)
class Fake:
    """A peer that gives what `make` makes of the model and the images."""

    name: str
    make: object
    ours: bool = False
    seconds: float = 20
    missing: str | None = None

    @property
    def key(self):
        return self.name

    def why_not(self):
        return self.missing

    def prepare(self, model, images, dtype, labels):
        return self.make(model, images)


def right(model, images):
    return lambda: model(images)


def raises(error):
    def make(model, images):
        raise error

    return make


def sleeps(model, images):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(5)


def bench(*found, seconds=60.0, meter=None):
    return program.Bench(
        list(found), meter or OneMillisecond(), {None: CEILINGS, 1: CEILINGS}, Deadline(seconds)
    )


# Cases.


def test_the_most_important_cases_come_first():
    found = Matrix("cuda").cases()
    assert [str(case) for case in found[:4]] == [
        "shelfnet18_lw 512x512 batch 1 float16 scores",
        "shelfnet18_lw 512x512 batch 1 float16 labels",
        "shelfnet50 512x512 batch 1 float16 scores",
        "shelfnet50 512x512 batch 1 float16 labels",
    ]
    assert len(set(found)) == len(found) == 4 * 2 * 3 * 2 * 2 + 2
    # The paper's cases, right after the first size.
    assert [(case.model, case.dtype) for case in found[8:10]] == [
        ("shelfnet50", "float32"),
        ("shelfnet101", "float32"),
    ]
    assert {case.batch for case in found} == {1, 8, 32}
    assert {case.size for case in found} == {(512, 512), (1024, 2048)}


def test_options_narrow_the_cases():
    quick = Matrix("cuda", quick=True).cases()
    assert {case.model for case in quick} == {"shelfnet18_lw", "shelfnet50"} and len(quick) == 4
    (scores, labels) = Matrix("cuda", ("shelfnet101",), ((64, 96),), (3,), ("bfloat16",)).cases()
    assert str(scores) == "shelfnet101 64x96 batch 3 bfloat16 scores" and labels.labels


def test_a_cpu_has_networks_of_its_own_on_all_threads_and_on_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = Matrix("cpu").cases()
    assert len(set(found)) == len(found) == 2 * 3 * 4 * 2
    assert [str(case) for case in found[:2]] == [
        "shelfnet18_lw 512x1024 batch 1 float32 scores threads 4",
        "shelfnet18_lw 512x1024 batch 1 float32 labels threads 4",
    ]
    # All threads first, and there the most important dtype.
    assert [case.threads for case in found] == [4] * 24 + [1] * 24
    assert [case.dtype for case in found[:24:8]] == ["float32", "bfloat16", "int8"]
    assert {(case.model, case.size) for case in found} == {
        ("shelfnet18_lw", (512, 1024)), ("shelfnet18_lw", (512, 512)),
        ("shelfnet50", (512, 512)), ("camvid", (360, 480)),
    }  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert {case.threads for case in Matrix("cpu").cases()} == {1}


def networks(**options):
    found = Matrix("cpu", dtypes=("float32",), threads=(2,), **options).cases()
    assert {case.threads for case in found} == {2}
    return [(case.model, case.size) for case in found if case.labels]


def test_options_narrow_a_cpus_networks():
    assert networks(models=("camvid",)) == [("camvid", (360, 480))]
    assert networks(sizes=((512, 512),)) == [("shelfnet18_lw", (512, 512)), ("shelfnet50", (512, 512))]
    # What is none of them is measured all the same.
    assert networks(models=("shelfnet101",)) == [("shelfnet101", (512, 512))]
    assert networks(sizes=((64, 64),)) == [("shelfnet18_lw", (64, 64))]
    assert networks(models=("camvid", "shelfnet50"), sizes=((64, 64),)) == [
        ("camvid", (64, 64)),
        ("shelfnet50", (64, 64)),
    ]
    assert networks(quick=True) == [("shelfnet18_lw", (512, 1024)), ("shelfnet18_lw", (512, 512))]


def test_a_case_has_its_threads_and_only_it():
    before = torch.get_num_threads()
    case = dataclasses.replace(SCORES, threads=before + 1)
    seen = []

    def counts(model, images):
        seen.append(torch.get_num_threads())
        return right(model, images)

    found = program.Bench(
        [Fake("eager", counts)], OneMillisecond(), {before + 1: CEILINGS}, Deadline(60)
    ).safely(case, set())
    assert seen == [before + 1] and torch.get_num_threads() == before
    assert rows.case_of(found[0]) == case and found[0]["threads"] == before + 1
    with pytest.raises(ValueError), measure.threads_of(case):
        raise ValueError
    assert torch.get_num_threads() == before


def test_images_of_codes_are_in_float32_and_others_than_those_for_ranges():
    case = dataclasses.replace(SCORES, dtype="int8")
    assert images_of(case, build(case.model)).dtype is torch.float32
    ranges = range_images((64, 96))
    assert ranges.shape == (RANGE_IMAGES, 64, 96, 3) and ranges.dtype is torch.uint8
    assert not torch.equal(ranges[:1], pictures(1, (64, 96), "cpu"))


def test_the_shipped_network_is_the_trained_one():
    assert build(SHIPPED).classes is not None and rows.plan_of(SHIPPED).num_classes == 11


def test_labels_on_a_gpu_are_made_of_raw_images():
    assert not LABELS.raw and not dataclasses.replace(SCORES, device="cuda").raw
    assert dataclasses.replace(LABELS, device="cuda").raw
    model = build("shelfnet18_lw")
    images = images_of(SCORES, model)
    assert images.shape == (2, 3, 64, 96) and images.dtype is torch.float32
    assert pictures(2, (64, 96), "cpu").shape == (2, 64, 96, 3)
    assert torch.equal(images, images_of(SCORES, model))
    assert abs(images.mean()) < 1 and 0.3 < images.std() < 2


@pytest.mark.parametrize("name", MODELS)
def test_random_networks_are_well_conditioned(name):
    model = build(name)
    assert not any(module.training for module in model.modules())
    case = dataclasses.replace(SCORES, model=name, dtype="bfloat16")
    images = images_of(case, model)
    scores = Network(model, torch.bfloat16, labels=False)(images)
    # Otherwise no result in 16 bits could be told from a wrong one.
    assert 0 < Judge(model, images, case).error_of(scores) < MAX_ERROR["bfloat16"]
    assert 0.5 < scores.float().std() < 20


# The judge.


def judged(case):
    model = build(case.model)
    images = images_of(case, model)
    return Judge(model, images, case), model(images)


def test_right_scores_pass_with_their_error():
    judge, scores = judged(SCORES)
    assert judge.limit == MAX_ERROR["float32"]
    # Computed in another batch.
    assert judge.error_of(scores) < 5e-6
    off = 0.5 * judge.limit * scores.std() * torch.randn_like(scores).sign()
    assert judge.error_of(scores + off) == pytest.approx(0.5 * judge.limit, rel=0.05)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: s + 1e-3 * s.std(), "the error is 0.001"),
        (lambda s: s.index_fill(3, torch.tensor([5]), float("nan")), "the error is nan"),
        (lambda s: s[:1], "it must be"),
        (lambda s: s.argmax(1), "it must be"),
    ],
)
def test_wrong_scores_are_refused(spoil, words):
    judge, scores = judged(SCORES)
    with pytest.raises(Wrong, match=words):
        judge.error_of(spoil(scores))


def test_one_score_far_off_is_refused():
    judge, scores = judged(SCORES)
    scores[1, 3, 7, 9] += 0.8e-3 * scores.std()
    with pytest.raises(Wrong, match="the largest error"):
        judge.error_of(scores)


def test_labels_may_differ_in_a_thousandth():
    judge, scores = judged(LABELS)
    assert judge.limit == MAX_DIFFERENT
    labels = scores.argmax(1).to(torch.uint8)
    assert judge.error_of(labels) == 0
    labels.view(-1)[:12] += 1
    assert judge.error_of(labels) == pytest.approx(12 / labels.numel())
    labels.view(-1)[12:20] += 1
    with pytest.raises(Wrong, match="the error is"):
        judge.error_of(labels)
    with pytest.raises(Wrong, match=r"torch\.int64"):
        judge.error_of(scores.argmax(1))


def test_labels_in_16_bits_are_held_against_eager_in_16_bits():
    case = dataclasses.replace(LABELS, dtype="bfloat16")
    model = build(case.model)
    images = images_of(case, model)
    judge = Judge(model, images, case)
    error = judge.error_of(Network(model, torch.bfloat16, labels=True)(images))
    assert error > MAX_DIFFERENT
    assert judge.limit == pytest.approx(EAGERS * error + MAX_DIFFERENT, rel=0.2)


def test_codes_of_8_bits_have_limits_of_their_own():
    judge, scores = judged(dataclasses.replace(SCORES, dtype="int8"))
    assert judge.limit == MAX_ERROR["int8"]
    off = scores.std() * torch.randn_like(scores)
    assert judge.error_of(scores + 0.9 * judge.limit * off) == pytest.approx(0.9 * judge.limit, rel=0.05)
    with pytest.raises(Wrong, match="the error is"):
        judge.error_of(scores + 1.1 * judge.limit * off)
    judge, scores = judged(dataclasses.replace(LABELS, dtype="int8"))
    labels = scores.argmax(1).to(torch.uint8)
    assert judge.limit == MAX_DIFFERENT_INT8
    labels.view(-1)[: int(0.9 * judge.limit * labels.numel())] += 1
    assert judge.error_of(labels) == pytest.approx(0.9 * judge.limit, rel=0.01)
    with pytest.raises(Wrong, match="the error is"):
        judge.error_of(labels.flip(2))


# Peers.


@pytest.mark.parametrize("name", ["shelfnet18_lw", "shelfnet50"])
@pytest.mark.parametrize("labels", [False, True])
def test_the_network_in_calls_of_cudnn_is_right(name, labels):
    case = dataclasses.replace(SCORES, model=name, labels=labels, size=(70, 97))
    model = build(name)
    images = images_of(case, model)
    judge = Judge(model, images, case)
    forward = cudnn.Forward(model, torch.float32, CPU, labels, None)
    judge.error_of(forward(images))
    if labels:
        assert torch.equal(forward(pictures(2, case.size, "cpu")), forward(images))


@pytest.mark.parametrize("winner", [0, 1])
def test_the_faster_way_is_chosen_once_and_kept(winner, monkeypatch):
    asked, called = [], []
    weight, bias = torch.randn(4, 4, 1, 1), torch.zeros(4)
    conv = cudnn.Conv(weight, bias, 1, 0.0, lambda ways: asked.append(ways) or winner)

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(conv, "_plain", lambda x, residual: called.append(0))
    monkeypatch.setattr(conv, "_fused", lambda x, residual: called.append(1))
    conv(OnGpu())
    conv(OnGpu())
    assert called == [winner, winner] and len(asked) == 1 and len(asked[0]) == 2


def test_a_way_that_fails_is_not_chosen(monkeypatch):
    def seconds(way):
        return way()

    monkeypatch.setattr(cudnn, "_seconds", seconds)
    assert cudnn.fastest([lambda: raises(RuntimeError("no engine"))(None, None), lambda: 2.0]) == 1
    assert cudnn.fastest([lambda: 1.0, lambda: 2.0]) == 0


def test_leaky_relu_has_no_fused_way(monkeypatch):
    conv = cudnn.Conv(torch.randn(4, 4, 1, 1), torch.zeros(4), 1, 0.01, pytest.fail)

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(conv, "_plain", lambda x, residual: "plain")
    assert conv(OnGpu()) == "plain"


@pytest.mark.parametrize("peer", [*eager.on_cpu(), *eager.on_gpu()], ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", [SCORES, LABELS], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eager_peers_are_right(peer, case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    model = build(case.model)
    images = images_of(case, model)
    before = [parameter.clone() for parameter in model.parameters()]
    result = peer.prepare(model, images, case.torch_dtype, case.labels)()
    Judge(model, images, case).error_of(result)
    assert result.dtype is (torch.uint8 if case.labels else case.torch_dtype)
    assert all(map(torch.equal, before, model.parameters()))


def test_raw_images_are_normalised_in_float32():
    model = build("shelfnet18_lw")
    raw = pictures(1, (64, 96), "cpu")
    found = Network(model, torch.bfloat16, labels=True).normalise(raw)
    assert found.is_contiguous(memory_format=torch.channels_last)
    truth = normalised(raw, model)
    assert (found.float() - truth).abs().max() <= 2**-8 * truth.abs().max()


def test_what_is_compiled_is_one_graph_with_the_modes_own_options(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    model = build("shelfnet18_lw")
    images = images_of(LABELS, model)
    by_key = {peer.key: peer for peer in compiled.on_gpu()}
    result = by_key["max-autotune"].prepare(model, images, torch.float32, True)()
    Judge(model, images, LABELS).error_of(result)
    (options,) = asked
    assert options["fullgraph"] is True and options["dynamic"] is False
    assert options["options"]["freezing"] is True and options["options"]["max_autotune"] is True
    assert options["options"]["triton.cudagraphs"] is True
    assert list(by_key)[-1] == "max-autotune"


def test_the_exported_network_takes_raw_images():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build("shelfnet18_lw")
    raw = pictures(2, LABELS.size, "cpu")
    session = runtime.InferenceSession(exported.export(model, raw, torch.float32, labels=True))
    (labels,) = session.run([exported.OUTPUT], {exported.INPUT: raw.numpy()})
    Judge(model, normalised(raw, model), LABELS).error_of(torch.from_numpy(labels))


CONFIG = ShelfNetConfig(
    num_classes=5, backbone="resnet18", backbone_width=32, widths=(32, 32), merge="attention", head="conv"
)


@functools.cache
def small():
    """A network that is quick to export, one model for all tests, so that each file is made once."""
    torch.manual_seed(0)
    return calibrate(ShelfNet(CONFIG))


def runtime(package):
    found = next(peer for peer in cpu_runtimes.on_cpu() if peer.key == package)
    if found.why_not() is not None:
        pytest.skip(found.why_not())
    return found


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("case", [SCORES, LABELS], ids=str)
@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_runtimes_of_a_cpu_are_right(package, case, dtype):
    case, peer, model = dataclasses.replace(case, dtype=dtype), runtime(package), build(SHIPPED)
    images = images_of(case, model)
    run = peer.prepare(model, images, case.torch_dtype, case.labels)
    if (package, dtype) == ("openvino", "int8") and not native.has_product(torch.int8):
        pytest.skip("without VNNI OpenVINO's sums saturate, and the error may be over the limit")
    error = Judge(model, images, case).error_of(run())
    # Codes leave a trace: it does not run in float32 unseen.
    assert dtype == "float32" or error > 1e-4
    # Images are read in place.
    before = run().clone()
    images.copy_(images.flip(3))
    Judge(model, images, case).error_of(run())
    assert not torch.equal(run(), before)


@pytest.mark.parametrize("suffix, kinds", [("xml", {"u8", "i8"}), ("onnx", {"u8", "i8"})])
def test_openvino_runs_both_kinds_of_file_in_8_bits(suffix, kinds, monkeypatch):
    openvino = pytest.importorskip("openvino")
    runtime("onnxruntime")
    if suffix == "onnx":
        monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
        quantised.openvino_file.cache_clear()
    elif importlib.util.find_spec("nncf") is None:
        pytest.skip("not installed: nncf")
    path = runtime_file(build(SHIPPED), suffix)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = sessions.convolutions(compiled)
    assert sum(found[kind] for kind in kinds) > 0.8 * sum(found.values())


def runtime_file(model, suffix):
    path = quantised.openvino_file(model, torch.Size((2, 3, 64, 96)), False, range_images)
    quantised.openvino_file.cache_clear()
    assert path.suffix == f".{suffix}"
    return path


def test_openvino_that_runs_floating_where_codes_are_asked_for_is_refused():
    runtime("openvino")
    model = build(SHIPPED)
    images = images_of(SCORES, model)
    path = exported.float_file(model, images, False)
    with pytest.raises(RuntimeError, match="no convolution of this network in 8 bits"):
        sessions.openvino(path, images.numpy(), 1, "int8")


def test_a_network_is_exported_once(monkeypatch):
    made = []
    monkeypatch.setattr(exported, "export", lambda model, images, *others: made.append(images.shape) or b"")
    model = build("shelfnet18_lw")
    ways = [(1, 32, 64, False), (1, 32, 64, False), (1, 32, 64, True), (2, 32, 64, False)]
    paths = [exported.float_file(model, torch.zeros(n, 3, h, w), labels) for n, h, w, labels in ways]
    assert paths[0] == paths[1] and len(set(paths)) == len(made) == 3
    exported._float_file.cache_clear()


def test_torch_has_no_convolutions_of_codes():
    model = build("shelfnet18_lw")
    for peer in (*eager.on_cpu(), *compiled.on_cpu()):
        with pytest.raises(ValueError, match=r"dtype is torch.int8, torch's own convolutions"):
            peer.prepare(model, images_of(SCORES, model), torch.int8, False)


def test_ours_counts_the_arithmetic_of_its_algorithms():
    model = build("shelfnet18_lw")
    images = images_of(SCORES, model)
    call = ours.Shelfkern("shelfkern", "shelfkern").prepare(model, images, torch.float32, False)
    plan = call.fast.plan
    assert call.flop() == arithmetic.plan_flop(plan, 2, (64, 96)) > 0
    names = plan.algorithms(2, 64, 96)
    fewer = any("winograd" in name for name in names)
    assert (call.flop() < 2 * plan.macs(2, 64, 96)) == fewer


# The arithmetic of algorithms, by hand.


@pytest.mark.parametrize(
    "op, stride, name, products",
    [
        ("conv", 1, "native direct", None),
        # 10 x 10 pixels are 3 x 3 tiles of 4 and 5 x 5 tiles of 2.
        ("conv", 1, "native winograd 4x4", 9 * 36 / 100),
        ("conv", 1, "native winograd 4x4 int16 strips", 9 * 36 / 100),
        ("conv", 1, "native winograd 2x2", 25 * 16 / 100),
        ("conv", 2, "native winograd 4x4", 9 * 81 / 100),
        ("deconv", 2, "native winograd 4x4", 4 * 81 / 100),
    ],
)
def test_products_of_minimal_filtering(op, stride, name, products):
    value = plan.Value(0, 4, 4)
    weight = torch.zeros(4, 4, 3, 3)
    if op == "conv":
        step = plan.Conv("it", (value,), plan.Value(1, 4, 4), weight, None, None, stride, plan.Activation())
    else:
        step = plan.DeconvAdd("it", (value, value), plan.Value(1, 4, 4), weight, torch.zeros(4))
    direct = 2 * 100 * 4 * 4 * (9 if op == "conv" else 9 / 4)
    wanted = direct if name == "native direct" else 2 * 100 * 4 * 4 * products
    assert arithmetic.step_flop(step, name, 1, (40, 40)) == pytest.approx(wanted)


def test_products_of_a_stem_by_minimal_filtering():
    vector = torch.zeros(5)
    step = plan.Stem(
        "it", (), plan.Value(0, 5, 4), torch.zeros(5, 3, 7, 7), vector, vector, plan.Activation()
    )
    # 40 x 48 pixels are 20 x 24 outputs, 5 x 6 tiles of 7 x 7 products of 12 colours for each channel.
    assert arithmetic.step_flop(step, "native winograd 4x4", 1, (40, 48)) == 2 * 30 * 49 * 12 * 5
    assert arithmetic.step_flop(step, "native direct", 1, (40, 48)) == 2 * 20 * 24 * 147 * 5


def test_a_block_counts_both_convolutions():
    value, weight, vector = plan.Value(0, 4, 4), torch.zeros(4, 4, 3, 3), torch.zeros(4)
    step = plan.SharedBlockStep(
        "it", (value,), plan.Value(1, 4, 4), weight, vector, vector, vector, vector, plan.Activation(), value
    )
    assert arithmetic.step_flop(step, "native winograd 4x4", 1, (32, 32)) == 2 * 2 * 4 * 4 * 4 * 36


def test_onnx_runtime_has_no_bfloat16():
    model = build("shelfnet18_lw")
    with pytest.raises(ValueError, match=r"dtype is torch.bfloat16, ONNX Runtime's convolutions on a CPU"):
        cpu_runtimes.OnnxRuntime().prepare(model, images_of(SCORES, model), torch.bfloat16, False)


def test_runtimes_that_are_not_installed_are_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = [peer.why_not() for peer in cpu_runtimes.on_cpu()]
    assert reasons == [f"not installed: {name}, onnx, onnxscript" for name in ("onnxruntime", "openvino")]


def test_tensorrt_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tensorrt.TensorRT().why_not() == "not installed: tensorrt, onnx, onnxscript"


def test_keys_choose_peers_and_keep_ours():
    every = peers.of_device("cuda")
    assert len({peer.name for peer in every}) == len({peer.key for peer in every}) == len(every)
    assert next(peer.name for peer in every if peer.ours) == "shelfkern"
    found = peers.chosen(every, ["cudnn"])
    assert [peer.key for peer in found] == ["shelfkern", "bound", "no-graphs", "cudnn"]
    assert peers.chosen(every, []) == every
    assert [peer.name for peer in peers.of_device("cpu")] == [
        *("shelfkern", "eager", "eager channels_last", "torch.compile, freezing"),
        *("ONNX Runtime", "OpenVINO"),
    ]


# A case.


def test_what_goes_wrong_becomes_a_row_and_the_others_are_timed():
    found = bench(
        Fake("shelfkern", right, ours=True),
        Fake("eager", right),
        Fake("absent", right, missing="not installed: it"),
        Fake("raising", raises(ValueError("of no use\nat all"))),
        Fake("large", raises(torch.OutOfMemoryError("CUDA out of memory"))),
        Fake("wrong", lambda model, images: lambda: model(images) + 1),
        Fake("slow", sleeps, seconds=0.2),
        Fake("last", right),
    ).case(SCORES, set())
    reasons = {row["variant"]: row["reason"] for row in found}
    assert reasons.pop("wrong").startswith("wrong, not timed: the error is")
    assert reasons == {
        "shelfkern": None,
        "eager": None,
        "absent": "not installed: it",
        "raising": "failed: ValueError: of no use",
        "large": "out of memory",
        "slow": "not prepared within 0 s",
        "last": None,
    }
    timed = [row for row in found if row["reason"] is None]
    assert [row["median_ms"] for row in timed] == [1.0, 2.0, 3.0]
    assert [row["wall_ms"] for row in timed] == [2.0, 4.0, 6.0]
    assert [row["ours_times_faster"] for row in timed] == [1.0, 2.0, 3.0]
    assert [row["launches"] for row in timed] == [7, 7, 7]
    assert all("median_ms" not in row for row in found if row["reason"] is not None)


def test_without_ours_there_is_no_ratio():
    ours = Fake("shelfkern", raises(ValueError()), ours=True)
    found = bench(ours, Fake("eager", right)).case(SCORES, set())
    assert [row["variant"] for row in found] == ["shelfkern", "eager"]
    assert found[0]["reason"] == "failed: ValueError: " and found[1]["ours_times_faster"] is None


def test_no_variant_is_prepared_past_the_deadline():
    found = bench(Fake("eager", right), seconds=program.LEAST_SECONDS - 1).case(SCORES, set())
    assert [row["reason"] for row in found] == ["skipped: no time was left to prepare it"]


def test_timing_ends_at_the_deadline():
    class Endless(OneMillisecond):
        def measure(self, runs):
            sleeps(None, None)

    seconds = program.LEAST_SECONDS + 2
    found = bench(Fake("eager", right), seconds=seconds, meter=Endless()).case(SCORES, set())
    assert [row["reason"] for row in found] == ["not timed: the time was spent"]
    assert found[0]["error"] < found[0]["limit"] and "median_ms" not in found[0]


def test_cases_that_no_time_is_left_for_are_listed(tmp_path):
    results = rows.ResultsFile(tmp_path / "out.jsonl", {"run": 1})
    program.measure(bench(Fake("eager", right), seconds=1), [SCORES, LABELS], results, None)
    found = rows.read(results.path)
    assert [rows.case_of(row) for row in found] == [SCORES, LABELS]
    assert {row["reason"] for row in found} == {"skipped: the time was spent"}
    assert {row["variant"] for row in found} == {None} and {row["run"] for row in found} == {1}


def test_a_case_that_does_not_fit_into_memory_is_a_row(monkeypatch):
    def large(model, images, case):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(program, "Judge", large)
    (row,) = bench(Fake("eager", right)).safely(SCORES, set())
    assert row["reason"] == "out of memory" and row["variant"] is None


class Breakable(OneMillisecond):
    """A meter on a device that one variant breaks."""

    lost = False

    def context_lost(self):
        return self.lost


def test_a_broken_context_ends_the_run_and_the_next_goes_on_without_it(tmp_path):
    meter = Breakable()

    def breaks(model, images):
        meter.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    peers = (Fake("eager", right), Fake("breaker", breaks), Fake("last", right))
    path = tmp_path / "out.jsonl"
    with pytest.raises(program.ContextLost):
        program.measure(bench(*peers, meter=meter), [SCORES], rows.ResultsFile(path, {}), None)
    (row,) = rows.read(path)
    assert (row["variant"], row["reason"]) == ("breaker", program.LOST)
    meter.lost = False
    results = rows.ResultsFile(path, {}, keep=True)
    program.measure(bench(*peers, meter=meter), [SCORES], results, None)
    found = rows.read(path)
    assert [(row["variant"], row["reason"]) for row in found] == [
        ("breaker", program.LOST),
        ("eager", None),
        ("last", None),
    ]
    # What has times is not measured again.
    program.measure(bench(meter=None), [SCORES], rows.ResultsFile(path, {}, keep=True), None)
    assert rows.read(path) == found


def test_a_context_broken_by_nobody_known_ends_the_case_for_good(tmp_path):
    class BreaksWhileTiming(Breakable):
        def measure(self, runs):
            self.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    path = tmp_path / "out.jsonl"
    with pytest.raises(program.ContextLost):
        found = bench(Fake("eager", right), meter=BreaksWhileTiming())
        program.measure(found, [SCORES], rows.ResultsFile(path, {}), None)
    program.measure(bench(Fake("eager", right)), [SCORES], rows.ResultsFile(path, {}, keep=True), None)
    (row,) = rows.read(path)
    assert (row["variant"], row["reason"]) == (None, program.LOST)


def test_a_failure_while_timing_is_a_row(tmp_path):
    class Fails(OneMillisecond):
        def measure(self, runs):
            raise RuntimeError("no events\nat all")

    (row,) = bench(Fake("eager", right), meter=Fails()).safely(SCORES, set())
    assert (row["variant"], row["reason"]) == (None, "failed: RuntimeError: no events")


def test_a_limit_gets_through_to_code_that_catches_exceptions():
    begin = time.monotonic()
    with pytest.raises(OutOfTime), time_limit(0.1):
        sleeps(None, None)
    assert time.monotonic() - begin < 3
    with time_limit(float("inf")):
        pass
    # Nothing is left to go off.
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_kernels_are_counted_and_copies_are_not():
    @dataclasses.dataclass
    class Event:
        name: str
        device_type: object
        is_user_annotation: bool = False

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        Event("conv", cuda),
        Event("Memcpy DtoD", cuda),
        Event("Memset (Device)", cuda),
        Event("cudaLaunchKernel", cpu),
        Event("Torch-Compiled Region", cuda, True),
    ]
    assert [measure._is_kernel(event) for event in events] == [True, False, False, False, False]


# Rows.


def test_arithmetic_and_traffic_as_counted_by_hand():
    flop, nbytes = rows.floor_of(Case("shelfnet18_lw", (512, 512), 1, "float16", False, "cuda"))
    assert flop == pytest.approx(2 * 12.5e9, rel=0.02)
    weights = nbytes - 2 * 512 * 512 * (3 + 19)
    assert weights == pytest.approx(2 * 14.6e6, rel=0.05)
    raw = Case("shelfnet18_lw", (512, 512), 1, "float16", True, "cuda")
    assert rows.floor_of(raw) == (flop, weights + 512 * 512 * (3 + 1))
    # Arithmetic is of the padded size, traffic of the image.
    odd = Case("shelfnet18_lw", (500, 490), 1, "float16", False, "cuda")
    assert rows.floor_of(odd) == (flop, weights + 2 * 500 * 490 * (3 + 19))


def test_a_row_says_everything():
    case = Case("shelfnet50", (512, 512), 2, "float16", False, "cuda")
    times = Times(Timing((1e-3, 2e-3, 3e-3)), Timing((4e-3,) * 3))
    ours = Times(Timing((1e-3, 1e-3, 1e-3)), Timing((1e-3,) * 3))
    outcome = rows.Outcome(None, 1e-3, 1e-2, 4.0, {"allocated_mib": 5.0, "reserved_mib": 6.0}, 70, times)
    row = json.loads(json.dumps(rows.row(case, Fake("eager", None), outcome, ours, CEILINGS)))
    assert rows.case_of(row) == case
    assert (row["variant"], row["ours"], row["reason"], row["error"]) == ("eager", False, None, 1e-3)
    assert (row["median_ms"], row["p10_ms"], row["p90_ms"], row["p99_ms"]) == (2.0, 1.2, 2.8, 2.98)
    assert (row["images_per_s"], row["wall_ms"], row["wall_images_per_s"]) == (1000, 4.0, 500)
    assert (row["ours_times_faster"], row["ours_times_faster_wall"]) == (2.0, 4.0)
    assert (row["launches"], row["reserved_mib"], row["rounds"]) == (70, 6.0, 3)
    # Bound by arithmetic: 4 x 42.1 GMAC at 1 PFLOP/s.
    flop, nbytes = rows.floor_of(case)
    assert flop / 1e15 > nbytes / 1e12 and row["product"] == "float16"
    assert row["floor_ms"] == pytest.approx(flop / 1e12, rel=1e-3)
    assert row["fraction"] == pytest.approx(row["floor_ms"] / 2, rel=1e-3)
    exact = rows.row(dataclasses.replace(case, dtype="float32"), Fake("eager", None), outcome, None, CEILINGS)
    assert exact["product"] == "tf32" and exact["ours_times_faster"] is None


def test_a_cpus_row_says_what_it_does_of_the_peak():
    case = dataclasses.replace(SCORES, threads=1)
    ceilings = Ceilings(1e12, {"float32": 1e12})
    outcome = rows.Outcome(None, 0.0, 1e-5, 1.0, {"memory_mib": 9.0}, None, None, flop=10**9)
    times = Times(Timing((2e-3,)), Timing((2e-3,)))
    row = rows.row(case, Fake("it", None), dataclasses.replace(outcome, times=times), times, ceilings)
    assert (row["threads"], row["memory_mib"]) == (1, 9.0)
    # 1 GFLOP in 2 ms at a peak of 1 TFLOP/s.
    assert (row["actual_gflop_per_s"], row["peak_gflop_per_s"], row["of_peak"]) == (500, 1000, 0.5)
    assert row["gflop_per_s"] == pytest.approx(rows.floor_of(case)[0] / 2e-3 / 1e9, rel=1e-3)
    direct = rows.row(
        case, Fake("it", None), dataclasses.replace(outcome, times=times, flop=None), times, ceilings
    )
    assert direct["actual_flop"] == direct["flop"]


def test_ours_names_the_fastest_peer():
    found = bench(Fake("slow", right), Fake("shelfkern", right, ours=True), Fake("last", right)).case(
        SCORES, set()
    )
    facts = {row["variant"]: (row.get("fastest_peer"), row.get("to_fastest_peer")) for row in found}
    # 1, 2 and 3 ms.
    assert facts == {"slow": (None, None), "shelfkern": ("slow", 0.5), "last": (None, None)}


def test_codes_take_a_byte_and_images_and_scores_four():
    case = Case("shelfnet18_lw", (512, 512), 1, "int8", False, "cpu", 2)
    flop, nbytes = rows.floor_of(case)
    assert nbytes - 4 * 512 * 512 * (3 + 19) == pytest.approx(14.6e6, rel=0.05)
    assert flop == rows.floor_of(dataclasses.replace(case, dtype="float32"))[0]


class NativeCode:
    """Native code for a CPU without products of bfloat16, whose peaks vary from run to run."""

    def __init__(self):
        self.asked = []

    def peak(self, kind, threads, milliseconds):
        if kind == "bfloat16":
            raise ValueError("kind is 'bfloat16', which avx2 has not")
        self.asked.append((kind, threads))
        return {"float32": 1e9, "int8": 4e9}[kind] * (1 + len(self.asked) % 2)


def test_a_cpus_peak_is_the_best_of_some_runs_in_each_dtype_that_it_has(monkeypatch):
    fake = NativeCode()
    monkeypatch.setattr(clocks.native, "module", fake)
    found = clocks.peaks(None, (torch.bfloat16, torch.int8))
    assert found == {"float32": 2e9, "int8": 8e9}
    assert set(fake.asked) == {(kind, torch.get_num_threads()) for kind in found}
    ceilings = Ceilings(1e9, found)
    assert ceilings.arithmetic(torch.bfloat16) == "float32" and ceilings.arithmetic(torch.int8) == "int8"
    assert Ceilings(1e9, {"float32": 1.0, "int16": 2.0}).arithmetic(torch.int8) == "int16"


def test_without_native_code_a_product_stands_in(monkeypatch):
    monkeypatch.setattr(clocks.native, "module", None)
    monkeypatch.setattr(clocks, "_product", lambda stopwatch, dtype: 3e9)
    assert clocks.peaks(None, (torch.int8,)) == {"float32": 3e9}


# Memory.


def test_memory_is_of_its_own_process(tmp_path):
    ballast = np.ones(150 << 17)
    model = small()
    case = dataclasses.replace(SCORES, threads=1)
    task = resident.task_of(eager.on_cpu()[0], model, images_of(case, model), case)
    found = resident.measure(task)
    # Its libraries, not what this process holds beside them; the net is a small network's, and of the
    # libraries' pages those that its first call brings.
    assert 1 < found["memory_net_mib"] < 150 < found["memory_mib"] < measured_here()
    assert ballast[0] == 1


def measured_here():
    with resident.STATUS.open() as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def test_memory_in_8_bits_is_without_making_images():
    model, case = small(), dataclasses.replace(SCORES, dtype="int8", threads=1)
    task = resident.task_of(ours.on_cpu(tune=False)[0], model, images_of(case, model), case)
    assert torch.equal(torch.load(task["range_images"]), range_images(case.size))
    del task["network"]
    assert resident.measure(task)["memory_net_mib"] > 1
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        resident.measure(task | {"range_images": "/nowhere/range_images.pt"})


def test_memory_of_ours_is_from_a_file_and_beside_its_model():
    peer, model = ours.on_cpu(tune=False)[0], shelfnet18_lw().eval()
    case = dataclasses.replace(SCORES, size=(64, 64), threads=1)
    task = resident.task_of(peer, model, images_of(case, model), case)
    for gone in ("file", "range_images"):
        task.pop(gone, None)
    (Path(task["network"]).parent / "model.pt").unlink()
    assert resident.measure(task)["memory_net_mib"] > 1
    found = resident.of(peer, model, images_of(case, model), case)
    # The model's own 56 MiB.
    assert found["memory_with_model_mib"] > found["memory_net_mib"] + 40


def test_memory_of_a_runtime_is_without_torch():
    peer, model, case = runtime("onnxruntime"), build(SHIPPED), SCORES
    task = resident.task_of(peer, model, images_of(case, model), case)
    assert task["runtime"] == "onnxruntime" and "model.pt" not in json.dumps(task)
    command = [sys.executable, "-X", "importtime", resident.__file__, json.dumps(task)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    before, peak = json.loads(run.stdout.splitlines()[-1])
    assert 0 < before < peak and " torch\n" not in run.stderr


def test_a_process_that_fails_says_why():
    task = {"peer": "eager", "dtype": "float32", "labels": False, "tune": False, "threads": 1}
    with pytest.raises(RuntimeError, match="its memory was not measured: FileNotFoundError"):
        resident.measure(task | {"file": "/nowhere/model.pt", "images": "/nowhere/images.pt"})


@pytest.mark.parametrize("threads, wanted", [(2, True), (1, False)])
def test_memory_is_measured_on_all_threads(threads, wanted, monkeypatch):
    monkeypatch.setattr(resident, "task_of", lambda *arguments: {})
    monkeypatch.setattr(resident, "measure", lambda task: {"memory_mib": 5.0, "memory_net_mib": 1.0})
    ceilings = {1: CEILINGS, 2: CEILINGS}
    found = program.Bench(
        [Fake("eager", right), Fake("absent", right, missing="it is not there")],
        OneMillisecond(), ceilings, Deadline(60), memory=True,
    ).case(dataclasses.replace(SCORES, threads=threads), set())  # fmt: skip
    assert ["memory_mib" in row for row in found] == [wanted, False]


def test_memory_that_cannot_be_had_leaves_the_times(monkeypatch, capsys):
    def fails(task):
        raise RuntimeError("its memory was not measured: no word")

    monkeypatch.setattr(resident, "task_of", lambda *arguments: {})
    monkeypatch.setattr(resident, "measure", fails)
    found = dataclasses.replace(bench(Fake("eager", right)), memory=True).case(SCORES, set())
    assert found[0]["median_ms"] == 1.0 and "memory_mib" not in found[0]
    assert "eager: its memory was not measured" in capsys.readouterr().err


def test_results_are_written_at_every_addition(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    results = rows.ResultsFile(path, {"commit": "abc"})
    results.add([{"case": 1}])
    assert rows.read(path) == [{"case": 1, "commit": "abc"}]
    results.add([{"case": 2}, {"case": 3}])
    assert [row["case"] for row in rows.read(path)] == [1, 2, 3]
    # A row's own threads count.
    rows.ResultsFile(path, {"threads": 2}).add([{"threads": 1}, {}])
    assert [row["threads"] for row in rows.read(path)] == [1, 2]
    rows.ResultsFile(path, {}).add([{"case": 4}])
    assert rows.read(path) == [{"case": 4}]
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


# The program.


def test_the_program_on_this_machine(tmp_path):
    path = tmp_path / "out.jsonl"
    options = "--model shelfnet18_lw --size 64 64 --dtype float32 --threads 1 --peers eager --no-tune"
    options += " --case-seconds 0.01 --breakdown --memory"
    command = [sys.executable, ROOT / "benchmarks" / "models.py", *options.split(), "--out", path]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    found = rows.read(path)
    assert [(row["output"], row["variant"], row["reason"]) for row in found] == [
        (output, variant, None) for output in ("scores", "labels") for variant in ("shelfkern", "eager")
    ]
    about = {"command", "cpu", "threads", "isa", "python", "torch", "shelfkern", "commit", "time", "device"}
    for row in found:
        assert about <= set(row) and row["median_ms"] > 0 and row["rounds"] >= 5
        assert "benchmarks/models.py --model shelfnet18_lw" in row["command"]
        assert row["threads"] == 1 and 0 < row["memory_net_mib"] < row["memory_mib"]
    layers = rows.read(tmp_path / "out_layers.jsonl")
    assert layers[-1]["op"] == "whole" and len(layers) > 30
    assert all(row["median_us"] > 0 and row["floor_us"] >= 0 for row in layers)
    assert "one by one" in run.stdout
    again = CliRunner().invoke(program.main, [*options.split(), "--out", str(path), "--resume"])
    assert again.exit_code == 0 and rows.read(path) == found


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--size", "16", "64"], "16 is not in the range"),
        (["--model", "unet"], "'unet' is not one of 'shelfnet18_lw'"),
        (["--peers", "nosuch"], "'nosuch' is not one of"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--threads", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_run_is_said(options, sentence, tmp_path):
    result = CliRunner().invoke(program.main, [*options, "--out", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 2 and sentence in result.output and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = CliRunner().invoke(program.main, ["--device", "cuda", "--out", str(tmp_path / "out.jsonl")])
    assert result.exit_code == 1 and "there is no GPU that torch can use" in result.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_program_on_a_gpu(tmp_path):
    path = tmp_path / "out.jsonl"
    options = "--device cuda --model shelfnet18_lw --size 64 64 --batch 1 --dtype float16 --no-tune"
    options += " --peers eager --peers cudnn --case-seconds 0.05 --breakdown --seconds 100"
    command = [sys.executable, ROOT / "benchmarks" / "models.py", *options.split(), "--out", path]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    found = rows.read(path)
    names = ("shelfkern", "shelfkern bound", "shelfkern without graphs", "cuDNN graph", "eager")
    assert [(row["variant"], row["reason"]) for row in found] == [(name, None) for name in names] * 2
    for row in found:
        assert row["launches"] > 10 and row["reserved_mib"] > 10 and row["wall_ms"] > 0
    layers = rows.read(tmp_path / "out_layers.jsonl")
    assert len(layers) > 30 and all(row["median_us"] > 0 for row in layers)
