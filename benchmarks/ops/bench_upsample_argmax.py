"""upsample_argmax: the best class of every pixel, from scores at low resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, Wrong, replayed
from shapes import Problem
from torch import Tensor

from shelfkern import ops


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    size = problem.writes[1:]
    return {"scores": random.activation(problem.reads[0])}, dict(size=size, crop=size)


def call(case: Case, kernel: Kernel) -> Run:
    out = case.poisoned(torch.uint8)

    def run():
        kernel(case.tensors["scores"], case.options["size"], out, True)
        return out

    return run


def judge(op: Op, case: Case) -> Callable[[Tensor], float]:
    """Requires a label's float64 score to be the largest, within the error of float32 resizing in torch
    calls.

    The error is the largest shortfall relative to the scores' deviation.
    """
    scores = case.tensors["scores"]
    exact = ops.upsample_bilinear_reference(scores.double(), **case.options)
    eager = ops.upsample_bilinear_reference(scores.float(), **case.options)
    coordinate = torch.finfo(torch.float32).eps * max(scores.shape[2:])
    # Two scores are compared, each within twice eager's error; the floor is a float32 coordinate's rounding.
    allowed = 2 * max(2 * float((eager - exact).abs().max()), 4 * coordinate * float(scores.abs().max()))

    def error_of(labels: Tensor) -> float:
        if labels.shape != exact[:, 0].shape or labels.max() >= exact.shape[1]:
            raise Wrong(f"labels are {tuple(labels.shape)} and up to {labels.max()}")
        lost = float((exact.amax(1) - exact.gather(1, labels.long()[:, None])[:, 0]).max())
        if not lost <= allowed:
            raise Wrong(f"a label's score is {lost:.3g} below the best, at most {allowed:.3g} is allowed")
        return lost / float(exact.std())

    return error_of


OP = Op("upsample_argmax", inputs, {"native": call, "cuda": call}, judge=judge)


@replayed
def test_upsample_argmax(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
