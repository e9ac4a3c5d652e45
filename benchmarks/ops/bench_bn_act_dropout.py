"""bn_act_dropout: act(batch_norm(x) + residual) by the batch's own statistics, and then its gradient."""

from __future__ import annotations

from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from shapes import Problem
from torch import Tensor
from torch.nn import functional as F

from shelfkern.ops import _common as common
from shelfkern.ops.bn_act_dropout import (
    bn_act_dropout_backward_native,
    bn_act_dropout_backward_triton,
    empty_mask,
)

EPS = 1e-5


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    x, grad, *residual = problem.reads
    tensors = {
        "x": random.activation(x),
        "grad": random.activation(grad),
        **random.vectors(problem),
        "residual": random.activation(residual[0]) if residual else None,
    }
    return tensors, dict(slope=problem.slope)


def reference(
    x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, slope: float | None
) -> Tensor:
    """The gradient of x; the other gradients are computed too."""
    with torch.enable_grad():
        x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
        y = F.batch_norm(x, None, None, weight, bias, True, eps=EPS)
        leaves = [x, weight, bias]
        if residual is not None:
            leaves.append(residual.detach().requires_grad_())
            y = y + leaves[-1]
        return torch.autograd.grad(common.activate(y, slope), leaves, grad)[0]


def step(case: Case, forward: Kernel, backward: Kernel) -> Run:
    x, grad, weight, bias, residual = case.tensors.values()
    slope = case.options["slope"]
    out, grad_x, grad_residual = (case.poisoned() for _ in range(3))
    mean, var, grad_weight, grad_bias = torch.empty(4, x.shape[1], device=x.device).unbind()
    mask = None if slope is None else empty_mask(x, slope)
    gradients = (grad_x, None if residual is None else grad_residual, grad_weight, grad_bias)

    def run():
        forward(x, weight, bias, residual, None, EPS, slope, out, mean, var, mask)
        backward(grad, x, weight, mean, var, None, mask, EPS, slope, *gradients)
        return grad_x

    return run


def native(case: Case, kernel: Kernel) -> Run:
    return step(case, kernel, bn_act_dropout_backward_native)


def triton(case: Case, kernel: Kernel) -> Run:
    return step(case, kernel, bn_act_dropout_backward_triton)


OP = Op("bn_act_dropout", inputs, {"native": native, "triton": triton}, reference=reference)


@replayed
def test_bn_act_dropout(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
