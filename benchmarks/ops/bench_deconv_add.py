"""deconv_add: a transposed convolution of stride 2, a bias and a skip."""

from __future__ import annotations

from typing import Any

from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem

from shelfkern import ops
from shelfkern.ops._conv_triton import default_precision
from shelfkern.ops.conv_bn_act import product_dtype
from shelfkern.ops.deconv_add import pack_deconv_triton

# Average number of a channel's nine taps that reach a pixel.
TAPS = 9 / 4


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    x, skip = problem.reads
    tensors = {
        "x": random.activation(x),
        "w": random.weight(problem.weight, TAPS * problem.weight[0]),
        **random.vectors(problem),
        "skip": random.activation(skip),
    }
    return tensors, {}


def native(case: Case, kernel: Kernel) -> Run:
    x, w, bias, skip = case.tensors.values()
    packed = ops.pack_deconv(w, product_dtype(case.dtype, case.dtype))
    out = case.poisoned()

    def run():
        kernel(x, packed, bias, skip, out)
        return out

    return run


def triton(case: Case, kernel: Kernel) -> Run:
    x, w, bias, skip = case.tensors.values()
    weight, out = pack_deconv_triton(w, case.dtype, default_precision(case.dtype)), case.poisoned()

    def run():
        kernel(x, weight, bias, skip, out)
        return out

    return run


OP = Op("deconv_add", inputs, {"native": native, "triton": triton})


@replayed
def test_deconv_add(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
