"""stem: an image, raw or normalised, through a 7x7 convolution, its norm, and pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from harness import Case, Inputs, Kernel, Op, Outcome, Run, Tensors, replayed
from library import fused_conv
from shapes import Problem
from torch.nn import functional as F

from shelfkern.normalisation import Normalisation
from shelfkern.ops.conv_bn_act import product_dtype
from shelfkern.ops.stem import normalise, normalised_values, pack_stem, pack_stem_rows


def inputs(problem: Problem, random: Inputs) -> tuple[Tensors, dict[str, Any]]:
    (shape,) = problem.reads
    image = random.image(shape) if problem.raw else random.activation(shape).contiguous()
    usual = Normalisation()
    tensors = {
        "image": image,
        "w": random.weight(problem.weight, math.prod(problem.weight[1:])),
        **random.vectors(problem),
        "mean": torch.tensor(usual.mean, device=random.device),
        "std": torch.tensor(usual.std, device=random.device),
    }
    size = shape[1:3] if problem.raw else shape[2:]
    return tensors, dict(size=size, slope=problem.slope)


def native(case: Case, kernel: Kernel) -> Run:
    image, w, scale, shift, mean, std = case.tensors.values()
    packed = pack_stem_rows(w, product_dtype(case.dtype, case.dtype))
    values = normalised_values(mean, std)
    out = case.poisoned()

    def run():
        kernel(image, packed, scale, shift, values, out, case.options["slope"])
        return out

    return run


def cuda(case: Case, kernel: Kernel) -> Run:
    image, w, scale, shift, mean, std = case.tensors.values()
    packed, values = pack_stem(w, scale, shift), normalised_values(mean, std)
    out = case.poisoned()

    def run():
        kernel(image, packed, values, out, case.options["slope"])
        return out

    return run


def library(case: Case, name: str) -> Run:
    image, w, scale, shift, mean, std = case.tensors.values()
    conv = fused_conv(name, w, scale, shift, 2, case.problem.slope)
    mean, std = mean.to(w.dtype), std.to(w.dtype)

    def run():
        x = normalise(image, mean, std) if case.problem.raw else image
        return F.max_pool2d(conv(x.contiguous(memory_format=torch.channels_last)), 3, 2, 1)

    return run


OP = Op("stem", inputs, {"native": native, "cuda": cuda}, library)


@replayed
def test_stem(outcome: Outcome, benchmark) -> None:
    outcome.replay(benchmark)
