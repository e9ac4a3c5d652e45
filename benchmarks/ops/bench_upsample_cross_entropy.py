"""upsample_cross_entropy: the loss of scores resized to the labels' size, and then its gradient."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem
from torch import Tensor

from shelfkern.ops import upsample_cross_entropy_reference
from shelfkern.ops.upsample_cross_entropy import Problem as Loss

IGNORED = 255


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    scores, target = problem.reads
    tensors = {"scores": random.activation(scores), "target": random.labels(target, scores[1])}
    return tensors, dict(size=target[1:])


def reference(scores: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of the loss computed by interpolate and cross_entropy."""
    with torch.enable_grad():
        scores = scores.detach().requires_grad_()
        loss = upsample_cross_entropy_reference(scores, target, size, ignore_index=IGNORED)
        return torch.autograd.grad(loss, scores)[0]


def call(case: Case, kernel: Kernel) -> Run:
    scores, target = case.tensors.values()
    loss = Loss(scores, target, case.options["size"], True, IGNORED, None, 0.0, None)
    gradient = case.poisoned(torch.float32).contiguous()

    def run():
        kernel(loss, gradient)
        return gradient.to(case.dtype)

    return run


OP = Op("upsample_cross_entropy", inputs, {"native": call, "triton": call}, reference=reference)


@replayed
def test_upsample_cross_entropy(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
