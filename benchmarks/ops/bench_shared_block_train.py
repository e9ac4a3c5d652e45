"""shared_block_train: the shared-weights residual block by its batch's statistics, and all gradients."""

from __future__ import annotations

from typing import Any

import bench_conv_train
import torch
from bench_bn_act_conv_train import norm_of
from harness import WINOGRAD_ERROR, Case, Inputs, Op, Outcome, Run, Tensors, gradients, replayed, step_of
from shapes import Problem
from torch import Tensor
from torch.nn import functional as F

from shelfkern import ops
from shelfkern.ops import _common as common


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors, _ = bench_conv_train.inputs(problem, random)
    return tensors | random.vectors(problem), dict(slope=problem.slope, skip=problem.skip)


@torch.enable_grad()
def reference(
    x: Tensor,
    grad: Tensor,
    w: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    slope: float | None,
    skip: bool,
) -> Tensor:
    """The gradient of x; the other gradients are computed too."""
    leaves = [t.detach().requires_grad_() for t in (x, w, weight1, bias1, weight2, bias2)]
    x, w, weight1, bias1, weight2, bias2 = leaves
    h = common.activate(F.batch_norm(F.conv2d(x, w, padding=1), None, None, weight1, bias1, True), slope)
    y = F.relu(F.batch_norm(F.conv2d(h, w, padding=1), None, None, weight2, bias2, True) + x)
    return gradients(y + x if skip else y, leaves, grad)


def step(case: Case, backend: str) -> Run:
    x, grad, w, weight1, bias1, weight2, bias2 = case.tensors.values()
    conv, bn1, bn2 = bench_conv_train.module_of(w, 1), norm_of(weight1, bias1), norm_of(weight2, bias2)
    leaves = [x.detach().requires_grad_(), conv.weight, bn1.weight, bn1.bias, bn2.weight, bn2.bias]
    options = case.options | dict(backend=backend)
    return step_of(lambda: ops.shared_block_train(leaves[0], conv, bn1, bn2, **options), leaves, grad)


NORMS = ops.KERNELS["bn_act_dropout"]
OP = Op("shared_block_train", inputs, step=step, backends=NORMS, reference=reference, factor=WINOGRAD_ERROR)


@replayed
def test_shared_block_train(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
