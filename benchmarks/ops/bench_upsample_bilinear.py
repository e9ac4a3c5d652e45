"""upsample_bilinear: scores resized to the image's size."""

from __future__ import annotations

from typing import Any

from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed, resize_rounding
from shapes import Problem


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    size = problem.writes[2:]
    return {"scores": random.activation(problem.reads[0])}, dict(size=size, crop=size)


def native(case: Case, kernel: Kernel) -> Run:
    out = case.poisoned().contiguous()

    def run():
        kernel(case.tensors["scores"], case.options["size"], out, True)
        return out

    return run


OP = Op("upsample_bilinear", inputs, {"native": native, "triton": native}, floor=resize_rounding)


@replayed
def test_upsample_bilinear(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
