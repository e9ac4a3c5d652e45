"""The op benchmarks: what is refused, what a row says, and that each of them runs."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench_upsample_add import OP as UPSAMPLE_ADD
from clocks import Ceilings, Times
from harness import (
    COMPILED,
    DTYPES,
    EAGER,
    Composition,
    ContextLost,
    Outcome,
    Replay,
    Wrong,
    as_exact,
    compare,
)
from parity import assert_as_exact, needs_native
from results import ResultsFile, rows, table
from shapes import Entry, plan_of, problems_of

from shelfkern import ops
from shelfkern.timing import Timing

ROOT = Path(__file__).parents[2]


class OneSecond:
    """A stopwatch of which every call takes a second, and no time."""

    device = "cpu"
    compile_options = None

    def context_lost(self):
        return False

    def measure(self, runs):
        return {name: Times(Timing((1.0, 1.0, 1.0))) for name in runs}


def small(op, **attributes):
    """An op's first problem in a small image."""
    model = "shelfnet50" if op == "deconv_add" else "shelfnet18_lw"
    problems = problems_of(plan_of(model), 1, (64, 96))
    wanted = {"op": op, **attributes}
    found = next(p for p in problems if all(getattr(p, name) == value for name, value in wanted.items()))
    return Entry(found, {f"{model} 64x96": 1}, quick=True)


def compared(op, entry, dtype=torch.float32, variants=None):
    variants = variants or [name for name in op.variants("cpu") if name != COMPILED]
    return compare(op, entry, dtype, OneSecond(), variants)


# No network's plan has codes of 8 bits.
UNPLANNED = {"quantize"}
TRAINING = [
    small(name) for name in ("conv_train", "bn_act_conv_train", "shared_block_train", "max_pool_train")
]
CASES = [small(name) for name in ops.NAMES if name not in UNPLANNED] + [
    small("stem", raw=True),
    small("conv_bn_act", residual=True),
    small("conv_bn_act", skip=True),
    small("conv_bn_act", stride=2, slope=None),
    small("shared_block", skip=True),
]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("entry", CASES + TRAINING, ids=lambda entry: f"{entry.problem.op} {entry.problem}")
def test_every_variant_is_right_and_timed(entry, dtype):
    op = importlib.import_module(f"bench_{entry.problem.op}").OP
    for name, outcome in compared(op, entry, dtype).items():
        if name == "oneDNN" and dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert "bf16 path needs the cpu support" in outcome.unavailable
            continue
        assert outcome.times is not None, f"{name}: {outcome}"
        # Of two norms and activations in bfloat16, eager's gradient as well is a few hundredths off.
        rounded = 1e-1 if entry.problem.op == "shared_block_train" else 1e-2
        assert 0 <= outcome.error < (1e-5 if dtype is torch.float32 else rounded)


@needs_native
def test_a_norm_with_a_residual():
    entry = small("bn_act_dropout", residual=True)
    op = importlib.import_module("bench_bn_act_dropout").OP
    # In bfloat16 eager rounds the sum, and some of relu's arguments change their sign.
    for name, outcome in compared(op, entry).items():
        assert outcome.times is not None and outcome.error < 1e-5, f"{name}: {outcome}"


@pytest.mark.parametrize("entry", CASES + TRAINING, ids=lambda entry: f"{entry.problem.op} {entry.problem}")
def test_what_is_compiled_is_the_reference(entry):
    op = importlib.import_module(f"bench_{entry.problem.op}").OP
    case = op.case(entry.problem, torch.float32, "cpu")
    composition = Composition(op, case.fresh())
    parameters = set(case.tensors) & {"w", "scale", "shift", "scale1", "scale2", "shift1", "shift2", "bias"}
    frozen = {name for name in parameters if case.tensors[name] is not None}
    assert frozen <= set(dict(composition.named_parameters()))
    torch.testing.assert_close(composition(**composition.moving()), op.refer(case.fresh()))


@pytest.mark.parametrize("op", ["conv_train", "max_pool_train"])
def test_without_a_kernel_of_ours_nothing_is_compared(op):
    assert importlib.import_module(f"bench_{op}").OP.variants("cuda") == []


def test_a_lost_context_ends_the_comparison(monkeypatch):
    class Lost(OneSecond):
        def context_lost(self):
            return True

    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    op = dataclasses.replace(UPSAMPLE_ADD, library=fails)
    with pytest.raises(ContextLost, match=r"^oneDNN$"):
        compare(op, small("upsample_add"), torch.float32, Lost(), [EAGER, "oneDNN"])


def one_pixel_wrong(x, skip, gate, out):
    out.copy_(ops.upsample_add_reference(x, skip, gate))
    out[0, 0, 0, 0] += 1e-4


def one_pixel_unwritten(x, skip, gate, out):
    out[:, :, 1:] = ops.upsample_add_reference(x, skip, gate)[:, :, 1:]


@needs_native
@pytest.mark.parametrize("kernel", [one_pixel_wrong, one_pixel_unwritten])
def test_a_wrong_kernel_is_refused_and_has_no_time(kernel, monkeypatch):
    monkeypatch.setattr(UPSAMPLE_ADD._module, "upsample_add_native", kernel)
    entry = small("upsample_add")
    outcomes = compared(UPSAMPLE_ADD, entry)
    assert outcomes["native"].times is None
    assert "native is wrong, not timed: the " in outcomes["native"].refused
    assert outcomes[EAGER].times is not None
    found = rows(UPSAMPLE_ADD, entry, torch.float32, "cpu", outcomes, CEILINGS)
    assert [row["variant"] for row in found] == [EAGER]
    with pytest.raises(pytest.fail.Exception, match="native is wrong"):
        outcomes["native"].replay(None)


@needs_native
def test_a_failing_kernel_of_ours_fails_and_a_failing_peer_is_skipped(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(UPSAMPLE_ADD._module, "upsample_add_native", fails)
    op = dataclasses.replace(UPSAMPLE_ADD, library=fails)
    outcomes = compared(op, small("upsample_add"), variants=["native", "oneDNN"])
    assert outcomes["native"].refused == "native failed: RuntimeError: out of luck"
    assert outcomes["oneDNN"].unavailable == "oneDNN failed: RuntimeError: out of luck"
    with pytest.raises(pytest.skip.Exception, match="out of luck"):
        outcomes["oneDNN"].replay(None)


def test_wrong_labels_are_refused():
    op = importlib.import_module("bench_upsample_argmax").OP
    case = op.case(small("upsample_argmax").problem, torch.float32, "cpu")
    error_of, labels = op.judge(op, case), op.refer(case)
    assert error_of(labels) < 1e-6
    labels[0, 5, 5] = (labels[0, 5, 5] + 1) % 19
    with pytest.raises(Wrong, match="below the best"):
        error_of(labels)
    with pytest.raises(Wrong, match="up to 255"):
        error_of(case.poisoned(torch.uint8))


@pytest.mark.parametrize("change", [0.0, 1e-8, 1.9, 2.1, 3.9, 4.1, math.nan])
@pytest.mark.parametrize("everywhere", [True, False])
def test_the_rule_is_that_of_the_tests(change, everywhere):
    truth = torch.randn(1000, dtype=torch.float64)
    signs = torch.randn(1000, dtype=torch.float64).sign()
    eager = truth + 1e-3 * signs
    result = truth + 1e-3 * signs * (change if everywhere else 1)
    result[0] = truth[0] + 1e-3 * change
    found = []
    for judge in (as_exact, assert_as_exact):
        try:
            judge(result, truth, eager, 1e-12)
            found.append(True)
        except AssertionError:
            found.append(False)
    assert found[0] is found[1] is (change < (2 if everywhere else 4))


CEILINGS = Ceilings(bytes_per_s=1e6, flop_per_s={"float32": 1e6, "bfloat16": 1e3})
FACTS = {
    *("op", "shape", "reads", "writes", "dtype", "flop", "bytes", "uses", "variant", "ours", "cache"),
    *("median_us", "p10_us", "p90_us", "rounds", "graph_us", "gb_per_s", "tflop_per_s", "fraction"),
    *("copy_gb_per_s", "product_tflop_per_s", "product", "error", "to_fastest_peer"),
}


def outcomes_of(**seconds):
    return {name: Outcome(1e-7, Times(Timing((time,) * 3))) for name, time in seconds.items()}


def test_a_row_says_everything():
    entry = small("upsample_add")
    outcomes = outcomes_of(native=2.0) | {EAGER: Outcome(2e-7, Times(Timing((6.0,) * 3)))}
    ours, eager = rows(UPSAMPLE_ADD, entry, torch.bfloat16, "cpu", outcomes, CEILINGS)
    assert set(ours) == FACTS == set(eager)
    assert json.loads(json.dumps(ours))["shape"] == str(entry.problem)
    assert (ours["ours"], eager["ours"]) == (True, False)
    assert (ours["to_fastest_peer"], eager["to_fastest_peer"]) == (3.0, None)
    assert (ours["median_us"], eager["median_us"], eager["error"]) == (2e6, 6e6, 2e-7)
    nbytes = entry.problem.bytes(torch.bfloat16)
    assert ours["gb_per_s"] == pytest.approx(nbytes / 2 / 1e9, rel=1e-3)
    # Bound by traffic; its 16-bit arithmetic is held against the faster float32.
    assert ours["product"] == "float32"
    assert ours["fraction"] == pytest.approx(nbytes / 1e6 / 2, rel=1e-3)
    assert len(table([ours, eager])) == 3


def test_cold_and_warm_rows_of_a_gpu():
    times = Times(Timing((1.0,)), cold=Timing((2.0,)), graph=Timing((0.5,)))
    found = rows(
        UPSAMPLE_ADD, small("upsample_add"), torch.float32, "cpu", {EAGER: Outcome(0, times)}, CEILINGS
    )
    assert [(row["cache"], row["median_us"], row["graph_us"]) for row in found] == [
        ("warm", 1e6, 5e5),
        ("cold", 2e6, None),
    ]


def test_float32_on_a_gpu_is_held_against_tf32():
    ceilings = Ceilings(1.0, {"float16": 8.0, "float32": 1.0, "tf32": 4.0})
    assert ceilings.seconds(8.0, 1.0, torch.float32) == 2.0
    assert ceilings.seconds(8.0, 1.0, torch.float16) == 1.0
    assert ceilings.seconds(8.0, 5.0, torch.float16) == 5.0


def test_a_run_replaces_the_rows_of_its_ops_alone(tmp_path):
    path = tmp_path / "results" / "ops_cpu.jsonl"
    first = ResultsFile(path)
    first.add([{"op": "a", "run": 1}])
    first.add([{"op": "b", "run": 1}])
    ResultsFile(path).add([{"op": "a", "run": 2}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"op": "b", "run": 1},
        {"op": "a", "run": 2},
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_replayed_clock_shows_the_measured_seconds():
    clock, seconds, shown = Replay(), iter((0.25, 3.0)), []
    for _ in range(2):
        before = clock()
        clock.play(seconds)
        shown.append(clock() - before)
    assert shown == [0.25, 3.0]


@needs_native
def test_the_benchmark_of_an_op_from_the_command_line(tmp_path):
    arguments = "benchmarks/ops/bench_upsample_add.py -m quick -k float32 --device cpu --seconds 0.01"
    avoid = tmp_path / "avoid"
    avoid.write_text(f"upsample_add {COMPILED}\nstem native\n")
    command = [sys.executable, "-m", "pytest", *arguments.split(), "-q", "-p", "no:cacheprovider"]
    command += ["--avoid", str(avoid), "--results", str(tmp_path)]
    # In a worker of pytest-xdist, as which this process may run, pytest-benchmark would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    path = tmp_path / "ops_cpu.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["variant"] for row in found} == {"native", EAGER}
    about = {"command", "cpu", "threads", "python", "torch", "shelfkern", "commit", "time", "device"}
    for row in found:
        assert {*FACTS, *about} <= set(row)
        assert "pytest benchmarks/ops/bench_upsample_add.py -m quick" in row["command"]
    script = ROOT / "benchmarks" / "ops" / "plot.py"
    subprocess.run([sys.executable, script, path], check=True, timeout=60)
    assert "fastest peer" in path.with_suffix(".svg").read_text() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_sh_says_that_there_is_no_gpu(tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    script = ROOT / "benchmarks" / "gpu.sh"
    run = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stdout == "" and not out.exists()
    assert run.stderr == f"gpu.sh: there is no GPU that torch of {sys.executable} can use on this machine\n"
