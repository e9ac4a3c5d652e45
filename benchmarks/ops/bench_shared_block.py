"""shared_block: two convolutions with one copy of the weights, their norms, and the residual."""

from __future__ import annotations

import math
from typing import Any

from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from library import fused_conv
from shapes import Problem

from shelfkern import ops
from shelfkern.ops._conv_triton import default_precision, pack_weight
from shelfkern.ops.conv_bn_act import product_dtype
from shelfkern.ops.shared_block import pack_block


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors = {
        "x": random.activation(problem.reads[0]),
        "w": random.weight(problem.weight, math.prod(problem.weight[1:])),
        **random.vectors(problem),
    }
    return tensors, dict(slope=problem.slope, skip=problem.skip)


def native(case: Case, kernel: Kernel) -> Run:
    x, w, *norms = case.tensors.values()
    packed = ops.pack_conv(w, padding=1, dtype=product_dtype(case.dtype, case.dtype))
    hidden, out = case.poisoned(), case.poisoned()

    def run():
        kernel(x, packed, *norms, hidden, out, **case.options)
        return out

    return run


def cuda(case: Case, kernel: Kernel) -> Run:
    x, w, *norms = case.tensors.values()
    packed = pack_block(w, *norms, case.dtype)
    out = case.poisoned()

    def run():
        kernel(x, packed, out, **case.options)
        return out

    return run


def triton(case: Case, kernel: Kernel) -> Run:
    x, w, *norms = case.tensors.values()
    weight, hidden, out = (
        pack_weight(w, case.dtype, default_precision(case.dtype)),
        case.poisoned(),
        case.poisoned(),
    )

    def run():
        kernel(x, weight, *norms, hidden, out, **case.options)
        return out

    return run


def library(case: Case, name: str) -> Run:
    """Two fused calls, each with its norm folded into its own copy of the weights."""
    x, w, scale1, shift1, scale2, shift2 = case.tensors.values()
    first = fused_conv(name, w, scale1, shift1, slope=case.problem.slope)
    second = fused_conv(name, w, scale2, shift2)
    if case.problem.skip:
        return lambda: second(first(x), x).add_(x)
    return lambda: second(first(x), x)


OP = Op("shared_block", inputs, {"native": native, "cuda": cuda, "triton": triton}, library)


@replayed
def test_shared_block(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
