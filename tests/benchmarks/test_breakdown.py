"""The breakdown of a forward pass by layer: what is timed, and what its rows say."""

from __future__ import annotations

import dataclasses
import json

import breakdown
import pytest
import torch
from arithmetic import step_flop
from cases import Case
from clocks import Ceilings
from measure import Times

import shelfkern
from shelfkern import native
from shelfkern.engine import plan
from shelfkern.engine.cpu.algorithm import Algorithm
from shelfkern.engine.plan import step_bytes, step_macs
from shelfkern.nn import ShelfNet, ShelfNetConfig
from shelfkern.ops import _triton
from shelfkern.timing import Timing

CONFIG = ShelfNetConfig(
    num_classes=5, backbone="resnet18", backbone_width=16, widths=(16, 24), merge="attention", head="conv"
)
CASE = Case("shelfnet18_lw", (33, 64), 1, "float16", False, "cpu")
# 16 bits are held against the faster float32.
CEILINGS = Ceilings(bytes_per_s=1e12, flop_per_s={"float16": 2e12, "float32": 1e12})
emulated = pytest.mark.skipif(
    native.why_not_emulated is not None or not _triton.INTERPRETED, reason="no emulated kernels"
)


class TwoMicroseconds:
    """A clock by which each layer takes 2 us and all of them 50; it runs each once."""

    def in_graphs(self, runs):
        for run in runs.values():
            run()
        return {name: Timing((1e-6, 2e-6, 3e-6)) for name in runs}

    def measure(self, runs):
        for run in runs.values():
            run()
        return {name: Times(Timing((50e-6,)), Timing((60e-6,))) for name in runs}


@pytest.fixture(scope="module")
def found():
    """Layers of an emulated forward pass, how often the whole ran, and their rows."""
    torch.manual_seed(0)
    fast = shelfkern.accelerate(ShelfNet(CONFIG).eval(), torch.float16, "cpu", "emulated")
    images = torch.randn(1, 3, *CASE.size).half()
    layers, whole = fast.bound_steps(images), []
    rows = breakdown.rows(CASE, layers, lambda: whole.append(1), TwoMicroseconds(), CEILINGS)
    return fast, layers, whole, rows


@emulated
def test_a_row_for_each_layer_and_one_for_the_whole(found):
    fast, _, whole, rows = found
    *layers, total = json.loads(json.dumps(rows))
    assert [row["op"] for row in layers] == [step.op for step in fast.plan.steps]
    assert [row["layer"] for row in layers] == list(range(len(layers)))
    assert total["layer"] is None and total["op"] == "whole" and whole == [1]
    assert (total["layers_us"], total["median_us"]) == (2 * len(layers), 50)
    assert total["flop"] == pytest.approx(2 * fast.plan.macs(1, 64, 64), rel=1e-3)
    assert total["launches"] == sum(row["launches"] for row in layers) >= len(layers)
    assert sum(row["share"] for row in layers) == pytest.approx(1, abs=0.01)
    for row in rows:
        assert (row["model"], row["size"], row["dtype"]) == ("shelfnet18_lw", [33, 64], "float16")


@emulated
def test_floors_are_of_the_padded_size(found):
    fast, _, _, rows = found
    for step, row in zip(fast.plan.steps, rows[:-1], strict=True):
        flop = 2 * step_macs(step, 1, 64, 64)
        nbytes = step_bytes(step, torch.float16, 1, 64, 64)
        assert (row["flop"], row["bytes"]) == (flop, nbytes)
        assert row["floor_us"] == pytest.approx(1e6 * max(flop / 2e12, nbytes / 1e12), rel=1e-3)
        assert row["bound_by"] == ("flop" if flop / 2e12 > nbytes / 1e12 else "bytes")
        assert row["fraction"] == pytest.approx(row["floor_us"] / 2, rel=1e-3)
        assert (row["p10_us"], row["median_us"], row["p90_us"]) == (1.2, 2.0, 2.8)
    assert rows[-1]["floor_us"] == pytest.approx(sum(row["floor_us"] for row in rows[:-1]), rel=1e-3)
    assert rows[-1]["fraction"] == pytest.approx(rows[-1]["floor_us"] / 50, rel=1e-3)


CPU_CASE = Case("shelfnet18_lw", (33, 64), 1, "float32", False, "cpu", 1)


@pytest.fixture(scope="module")
def on_cpu():
    """The model, how often its first layer ran, and rows of its layers on a CPU."""
    torch.manual_seed(0)
    model = ShelfNet(CONFIG).eval()
    with torch.no_grad():
        images = torch.randn(1, 3, *CPU_CASE.size)
        rows = breakdown.break_down(CPU_CASE, model, images, False, None, CEILINGS)
    return model, images, rows


def test_layers_of_a_cpu_have_their_algorithms(on_cpu):
    model, _, rows = on_cpu
    *layers, total = json.loads(json.dumps(rows))
    fast = shelfkern.accelerate(model)
    assert [row["op"] for row in layers] == [step.op for step in fast.plan.steps]
    assert [row["algorithm"] for row in layers] == fast.plan.algorithms(1, 64, 64)
    assert all(0 < row["p10_us"] <= row["median_us"] <= row["p90_us"] for row in layers)
    # The whole has the resize too.
    assert total["median_us"] > 0.5 * total["layers_us"] > 0 and total["launches"] is None
    assert {row["threads"] for row in rows} == {1}
    assert "None" not in "\n".join(breakdown.table(rows))


def test_floors_of_a_cpu_are_of_the_arithmetic_done(on_cpu):
    model, _, rows = on_cpu
    plan = shelfkern.accelerate(model).plan
    for step, row in zip(plan.steps, rows[:-1], strict=True):
        flop = step_flop(step, row["algorithm"], 1, (64, 64))
        assert (row["flop"], row["direct_flop"]) == (flop, 2 * step_macs(step, 1, 64, 64))
        nbytes = step_bytes(step, torch.float32, 1, 64, 64)
        assert row["floor_us"] == pytest.approx(1e6 * max(flop / 1e12, nbytes / 1e12), rel=1e-3)


def test_each_layer_is_timed_in_every_pass_but_the_first(on_cpu):
    model, images, _ = on_cpu
    with torch.no_grad():
        fast = shelfkern.accelerate(model)
        wanted = fast(images)
        layers, times, together = breakdown.cpu_layers(fast, images, rounds=3)
        assert len(layers) == len(times) == len(fast.plan.steps) and together > 0
        assert {len(timing.seconds) for timing in times} == {3}
        assert torch.equal(fast(images), wanted)


def test_floors_are_of_what_is_multiplied():
    value = plan.Value(0, 32, 1)
    step = plan.Conv(
        "it", (value,), plan.Value(1, 32, 1), torch.zeros(32, 32, 3, 3), None, None, 1, plan.Activation()
    )
    ceilings = Ceilings(1e15, {"float32": 1e12, "bfloat16": 2e12, "int16": 3e12})
    case = dataclasses.replace(CPU_CASE, dtype="bfloat16")
    for name, rate in (
        ("native direct", 2e12),
        ("native winograd 4x4", 1e12),
        ("native winograd 4x4 int16 strips", 3e12),
    ):
        layer = breakdown.CpuLayer(step, Algorithm(name, 1.0, None), (1, 32, 64, 64))
        row, _ = breakdown.table_rows(case, [layer], [Timing((1.0,))], 1.0, ceilings)
        flop = step_flop(step, name, 1, (64, 64))
        assert row["floor_us"] == pytest.approx(1e6 * flop / rate, rel=1e-3), name


@emulated
def test_the_table_puts_the_slowest_first(found):
    *_, rows = found
    slow = rows[3] | {"median_us": 9.0, "module": "slow"}
    lines = breakdown.table([*rows[:3], slow, *rows[4:]])
    assert len(lines) == len(rows) + 1 and lines[1].endswith("slow")
    assert lines[1].split()[0] == "9.00" and "the whole with its resize 50.0 us" in lines[-1]
