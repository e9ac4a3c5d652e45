"""attention_gate: the mean over pixels, a matrix product, its norm and a sigmoid."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors = {
        "x": random.activation(problem.reads[0]),
        "w": random.weight(problem.weight, problem.weight[1]),
        **random.vectors(problem),
    }
    return tensors, {}


def native(case: Case, kernel: Kernel) -> Run:
    x, w, scale, shift = case.tensors.values()
    w = w.float()
    out = case.poisoned(torch.float32)

    def run():
        kernel(x, w, scale, shift, out)
        return out

    return run


def floor(case: Case, truth: torch.Tensor) -> float:
    """A few float32 roundings of the sigmoid's argument; a gate is below 1."""
    return 4 * torch.finfo(torch.float32).eps


OP = Op("attention_gate", inputs, {"native": native, "cuda": native}, floor=floor)


@replayed
def test_attention_gate(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
