"""upsample_softmax_sum: adds the class probabilities of one scale of a mirrored image."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors = {
        "scores": random.activation(problem.reads[0]),
        "out": torch.zeros(problem.writes, device=random.device),
    }
    return tensors, dict(size=problem.writes[2:], mirror=True)


def call(case: Case, kernel: Kernel) -> Run:
    def run():
        case.call(kernel, exp=False, align_corners=True)
        return case.tensors["out"]

    return run


def floor(case: Case, truth: torch.Tensor) -> float:
    """Rounding of a source coordinate in float32, and one rounding of the sum."""
    scores = case.tensors["scores"]
    moved = 4 * max(scores.shape[2:]) * float(scores.abs().max())
    return (1 + moved) * torch.finfo(torch.float32).eps * float(truth.abs().max())


OP = Op("upsample_softmax_sum", inputs, {"native": call, "cuda": call}, floor=floor)


@replayed
def test_upsample_softmax_sum(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
