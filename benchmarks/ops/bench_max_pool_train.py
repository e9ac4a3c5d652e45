"""max_pool_train: the stem's pooling and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Inputs, Op, Outcome, Run, Tensors, gradients, replayed, step_of
from shapes import Problem
from torch import Tensor, nn
from torch.nn import functional as F

from shelfkern import ops


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    x, grad = problem.reads
    return {"x": random.activation(x), "grad": random.activation(grad)}, {}


@torch.enable_grad()
def reference(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x."""
    x = x.detach().requires_grad_()
    return gradients(F.max_pool2d(x, 3, 2, 1), [x], grad)


def step(case: Case, backend: str) -> Run:
    x, grad = case.tensors.values()
    x, pool = x.detach().requires_grad_(), nn.MaxPool2d(3, 2, 1)
    return step_of(lambda: ops.max_pool_train(x, pool), [x], grad)


OP = Op("max_pool_train", inputs, step=step, backends=("native",), reference=reference)


@replayed
def test_max_pool_train(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
