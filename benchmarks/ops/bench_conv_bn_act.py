"""conv_bn_act: act(scale * conv(x, w) + shift + residual) + skip."""

from __future__ import annotations

import math
from typing import Any

from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from library import fused_conv
from shapes import Problem

from shelfkern import ops
from shelfkern.ops._conv_triton import default_precision, pack_weight
from shelfkern.ops.conv_bn_act import product_dtype


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    vectors = random.vectors(problem)
    tensors = {
        "x": random.activation(problem.reads[0]),
        "w": random.weight(problem.weight, math.prod(problem.weight[1:])),
        "scale": vectors.get("scale"),
        "shift": vectors.get("shift"),
        "residual": random.activation(problem.writes) if problem.residual else None,
        "skip": random.activation(problem.writes) if problem.skip else None,
    }
    return tensors, dict(stride=problem.stride, padding=problem.weight[2] // 2, slope=problem.slope)


def native(case: Case, kernel: Kernel) -> Run:
    x, w, *others = case.tensors.values()
    geometry, dtype = (case.options["stride"], case.options["padding"]), product_dtype(case.dtype, case.dtype)
    packed = ops.pack_conv(w, *geometry, dtype=dtype)
    out = case.poisoned()

    def run():
        kernel(x, packed, *others, out, case.options["slope"])
        return out

    return run


def triton(case: Case, kernel: Kernel) -> Run:
    x, w, *others = case.tensors.values()
    weight, out = pack_weight(w, case.dtype, default_precision(case.dtype)), case.poisoned()
    options = case.options

    def run():
        kernel(x, weight, *others, out, w.shape[2:], options["stride"], options["padding"], options["slope"])
        return out

    return run


def library(case: Case, name: str) -> Run:
    x, w, scale, shift, residual, skip = case.tensors.values()
    conv = fused_conv(name, w, scale, shift, case.problem.stride, case.problem.slope)
    if skip is None:
        return lambda: conv(x, residual)
    return lambda: conv(x, residual).add_(skip)


OP = Op("conv_bn_act", inputs, {"native": native, "triton": triton}, library)


@replayed
def test_conv_bn_act(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
