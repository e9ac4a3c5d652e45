"""upsample_add: skip + gate * nearest_x2(x)."""

from __future__ import annotations

from typing import Any

from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    x, skip, (n, c) = problem.reads
    tensors = {
        "x": random.activation(x),
        "skip": random.activation(skip),
        "gate": random.vector(n * c).sigmoid().view(n, c),
    }
    return tensors, {}


def call(case: Case, kernel: Kernel) -> Run:
    out = case.poisoned()

    def run():
        kernel(**case.tensors, out=out)
        return out

    return run


OP = Op("upsample_add", inputs, {"native": call, "cuda": call, "triton": call})


@replayed
def test_upsample_add(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
