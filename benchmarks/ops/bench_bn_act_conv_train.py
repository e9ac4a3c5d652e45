"""bn_act_conv_train: a batch norm, an activation and the convolution that follows, and all gradients."""

from __future__ import annotations

from typing import Any

import bench_conv_train
import torch
from harness import WINOGRAD_ERROR, Case, Inputs, Op, Outcome, Run, Tensors, gradients, replayed, step_of
from shapes import Problem
from torch import Tensor, nn
from torch.nn import functional as F

from shelfkern import ops
from shelfkern.ops import _common as common


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    tensors, options = bench_conv_train.inputs(problem, random)
    return tensors | random.vectors(problem), options | dict(slope=problem.slope)


def norm_of(weight: Tensor, bias: Tensor) -> nn.BatchNorm2d:
    """The batch norm as training has it."""
    bn = nn.BatchNorm2d(len(weight), device=weight.device)
    bn.weight, bn.bias = nn.Parameter(weight), nn.Parameter(bias)
    return bn


@torch.enable_grad()
def reference(
    x: Tensor, grad: Tensor, w: Tensor, weight: Tensor, bias: Tensor, stride: int, slope: float | None
) -> Tensor:
    """The gradient of x; the other gradients are computed too."""
    leaves = [t.detach().requires_grad_() for t in (x, w, weight, bias)]
    x, w, weight, bias = leaves
    h = common.activate(F.batch_norm(x, None, None, weight, bias, True), slope)
    return gradients(F.conv2d(h, w, None, stride, w.shape[2] // 2), leaves, grad)


def step(case: Case, backend: str) -> Run:
    x, grad, w, weight, bias = case.tensors.values()
    conv, bn = bench_conv_train.module_of(w, case.options["stride"]), norm_of(weight, bias)
    leaves = [x.detach().requires_grad_(), conv.weight, bn.weight, bn.bias]
    options = dict(slope=case.options["slope"], backend=backend)
    return step_of(lambda: ops.bn_act_conv_train(leaves[0], bn, conv, **options), leaves, grad)


NORMS = ops.KERNELS["bn_act_dropout"]
OP = Op("bn_act_conv_train", inputs, step=step, backends=NORMS, reference=reference, factor=WINOGRAD_ERROR)


@replayed
def test_bn_act_conv_train(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
