"""The benchmark of whole networks: its cases, what it refuses, its rows, and that it ends in time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import measure
import peers
import pytest
import rows
import torch
from cases import MODELS, Case, Matrix, build, images_of, normalised, pictures
from click.testing import CliRunner
from clocks import Ceilings
from judge import EAGERS, MAX_DIFFERENT, MAX_ERROR, Judge, Wrong
from measure import Deadline, OutOfTime, Times, time_limit
from peers import compiled, cpu_runtimes, cudnn, eager, exported, tensorrt
from peers.network import Network

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
    return program.Bench(list(found), meter or OneMillisecond(), CEILINGS, Deadline(seconds))


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
    assert [case.size for case in Matrix("cpu").cases()] == [(512, 512)] * 2 + [(512, 1024)] * 2


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


@pytest.mark.parametrize("case", [SCORES, LABELS])
@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_runtimes_of_a_cpu_are_right(package, case):
    peer = next(peer for peer in cpu_runtimes.on_cpu() if peer.key == package)
    if peer.why_not() is not None:
        pytest.skip(peer.why_not())
    model = build(case.model)
    images = images_of(case, model)
    result = peer.prepare(model, images, torch.float32, case.labels)()
    Judge(model, images, case).error_of(result)


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


def test_results_are_written_at_every_addition(tmp_path):
    path = tmp_path / "folder" / "out.jsonl"
    results = rows.ResultsFile(path, {"commit": "abc"})
    results.add([{"case": 1}])
    assert rows.read(path) == [{"case": 1, "commit": "abc"}]
    results.add([{"case": 2}, {"case": 3}])
    assert [row["case"] for row in rows.read(path)] == [1, 2, 3]
    rows.ResultsFile(path, {}).add([{"case": 4}])
    assert rows.read(path) == [{"case": 4}]
    assert [file.name for file in path.parent.iterdir()] == ["out.jsonl"]


# The program.


def test_the_program_on_this_machine(tmp_path):
    path = tmp_path / "out.jsonl"
    options = "--model shelfnet18_lw --size 64 64 --peers eager --case-seconds 0.01 --breakdown"
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
    # Layers are of the GPU's engine.
    assert "no breakdown" in run.stderr and not (tmp_path / "out_layers.jsonl").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--size", "16", "64"], "16 is not in the range"),
        (["--model", "unet"], "'unet' is not one of 'shelfnet18_lw'"),
        (["--peers", "nosuch"], "'nosuch' is not one of"),
        (["--device", "tpu"], "'tpu' is not one of"),
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
