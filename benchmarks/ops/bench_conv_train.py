"""conv_train: a convolution and the gradients of its input and weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import WINOGRAD_ERROR, Case, Inputs, Op, Outcome, Run, Tensors, gradients, replayed, step_of
from shapes import Problem
from torch import Tensor, nn
from torch.nn import functional as F

from shelfkern import ops


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors = {
        "x": random.activation(problem.reads[0]),
        "grad": random.activation(problem.reads[1]),
        "w": random.weight(problem.weight, math.prod(problem.weight[1:])),
    }
    return tensors, dict(stride=problem.stride)


def module_of(w: Tensor, stride: int) -> nn.Conv2d:
    """The convolution as training has it; its padding keeps the size."""
    kernel = w.shape[2]
    conv = nn.Conv2d(w.shape[1], w.shape[0], kernel, stride, kernel // 2, bias=False, device="meta")
    conv.weight = nn.Parameter(w)
    return conv


@torch.enable_grad()
def reference(x: Tensor, grad: Tensor, w: Tensor, stride: int) -> Tensor:
    """The gradient of x; that of w is computed too."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return gradients(F.conv2d(x, w, None, stride, w.shape[2] // 2), [x, w], grad)


def step(case: Case, backend: str) -> Run:
    x, grad, w = case.tensors.values()
    conv = module_of(w, **case.options)
    x = x.detach().requires_grad_()
    return step_of(lambda: ops.conv_train(x, conv), [x, conv.weight], grad)


OP = Op("conv_train", inputs, step=step, backends=("native",), reference=reference, factor=WINOGRAD_ERROR)


@replayed
def test_conv_train(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
