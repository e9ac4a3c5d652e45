"""The problems that the four published models pose to each op, read from the models' plans."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from shelfkern import nn as models
from shelfkern.engine import Plan
from shelfkern.engine.lower import lower
from shelfkern.engine.plan import Conv, SharedBlockStep, Stem, Step, Value, step_macs

MODELS = models.list_models()
SIZES = ((512, 512), (1024, 2048))
Size = tuple[int, int]
Shape = tuple[int, ...]

# Quick problems: for the first of these models that has the op, at the first size, the few with the most
# work.
QUICK_MODELS = ("shelfnet18_lw", "shelfnet50")
QUICK_PROBLEMS = 3

# Bytes per element written, where different from the op's dtype. The sum of softmaxes is also read.
WRITTEN_BYTES = {"upsample_argmax": 1, "attention_gate": 4, "upsample_softmax_sum": 4 + 4}
# Products with the four scores around a pixel.
BILINEAR_MACS = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """One op at one size.

    Attributes:
        op: name of the op.
        reads: shapes of the activations it reads: (N, C, H, W), a gate's (N, C), raw images' (N, H, W, 3),
            labels' (N, H, W).
        writes: shape of its result.
        macs: multiply-adds of its convolutions, products with gates and bilinear weights.
        weight: shape of its weights, empty for none.
        vectors: names of its float32 parameters with one value per output channel.
        stride: stride of the convolution.
        slope: slope of the activation: 0 relu, None no activation.
        residual, skip: whether these are added before and after the last activation.
        raw: whether it reads uint8 images.
    """

    op: str
    reads: tuple[Shape, ...]
    writes: Shape
    macs: int
    weight: Shape = ()
    vectors: tuple[str, ...] = ()
    stride: int = 1
    slope: float | None = None
    residual: bool = False
    skip: bool = False
    raw: bool = False

    @property
    def flop(self) -> int:
        """Floating-point operations."""
        return 2 * self.macs

    def bytes(self, dtype: torch.dtype) -> int:
        """Minimum traffic: each input read once, the result written once. Leaves out mean and std."""
        read = sum(math.prod(shape) * self._read_bytes(shape, dtype) for shape in self.reads)
        read += math.prod(self.weight) * dtype.itemsize if self.weight else 0
        read += 4 * self.writes[1] * len(self.vectors)
        return read + math.prod(self.writes) * WRITTEN_BYTES.get(self.op, dtype.itemsize)

    def _read_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        if self.raw or len(shape) == 3:
            return 1
        return 4 if len(shape) == 2 else dtype.itemsize

    @property
    def trains(self) -> bool:
        """Whether it is a training op beside one for inference; its second input is its result's gradient."""
        return self.op.endswith("_train")

    def __str__(self) -> str:
        result = self.reads[1] if self.trains else self.writes
        parts = ["x".join(map(str, self.reads[0]))]
        if self.raw:
            parts.append("raw")
        if len(self.weight) == 4:
            parts.append(f"{self.weight[2]}x{self.weight[3]}s{self.stride}")
        parts += ["labels_" + "x".join(map(str, shape[1:])) for shape in self.reads if len(shape) == 3]
        parts.append("to_" + "x".join(map(str, result[1:])))
        parts += ["plain"] * (self.op == "conv_bn_act" and "scale" not in self.vectors)
        parts += [] if self.slope is None else [f"leaky{self.slope:g}" if self.slope else "relu"]
        return "-".join(parts + ["residual"] * self.residual + ["skip"] * self.skip)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A problem, how often each model and size has it ("shelfnet50 512x512"), and whether it is quick."""

    problem: Problem
    uses: dict[str, int] = dataclasses.field(hash=False)
    quick: bool


def plan_of(model: str) -> Plan:
    """The plan of a bundled model, or of a published one, with shapes but no values."""
    if model in models.shipped_weights():
        return lower(models.from_weights(model))
    with torch.device("meta"):
        return lower(models.create_model(model).eval())


def problems_of(plan: Plan, batch: int, size: Size) -> Iterator[Problem]:
    """The problem of every step, and of the resizes that follow the plan."""
    seen = plan.extents.seen(*size)
    normed = _normed(plan)
    for step in plan.steps:
        yield from _problems_of_step(step, batch, seen)
        yield from _training_of_step(step, normed.get(step.inputs[0]) if step.inputs else None, batch, seen)
    yield from _problems_of_scores(plan.scores.shape(batch, *seen), size)


def _problems_of_step(step: Step, batch: int, size: Size) -> Iterator[Problem]:
    fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
    problem = Problem(
        op=step.op,
        reads=tuple(value.shape(batch, *size) for value in step.inputs) or ((batch, 3, *size),),
        writes=step.output.shape(batch, *size),
        macs=step_macs(step, batch, *size),
        weight=tuple(fields["weight"].shape) if "weight" in fields else (),
        vectors=tuple(
            name for name, value in fields.items() if isinstance(value, Tensor) and value.ndim == 1
        ),
        stride=fields.get("stride", 2 if step.op in ("stem", "deconv_add") else 1),
        slope=fields["act"].slope if "act" in fields else None,
        residual=fields.get("residual", False),
        skip=fields.get("skip", False),
    )
    yield problem
    if "scale" in problem.vectors and problem.op == "conv_bn_act":
        yield _norm_of(problem)
    if not step.inputs:
        yield dataclasses.replace(problem, reads=((batch, *size, 3),), raw=True)


def _norm_of(conv: Problem) -> Problem:
    """The norm that replaces a convolution's epilogue in training: its gradient is read too."""
    reads = (conv.writes,) * (3 if conv.residual else 2)
    return Problem(
        "bn_act_dropout",
        reads,
        conv.writes,
        0,
        vectors=("weight", "bias"),
        slope=conv.slope,
        residual=conv.residual,
    )


def _normed(plan: Plan) -> dict[Value, Conv]:
    """Convolutions whose norm and activation a single convolution reads, by their output."""
    readers = collections.Counter(value for step in plan.steps for value in step.inputs)
    convs = [step for step in plan.steps if isinstance(step, Conv) and step.scale is not None]
    alone = [step for step in convs if not step.residual and not step.skip]
    return {step.output: step for step in alone if readers[step.output] == 1}


def _training_of_step(step: Step, before: Conv | None, batch: int, size: Size) -> Iterator[Problem]:
    """Ops that train a step with its gradient, which multiplies twice as often as the step.

    before: the convolution whose norm and activation the step reads, for `bn_act_conv_train`.
    """
    result = step.output.shape(batch, *size)
    if isinstance(step, Stem):
        x = (batch, step.output.channels, *(side // 2 for side in size))
        yield Problem("max_pool_train", (x, result), x, 0)
    if not isinstance(step, Conv | SharedBlockStep) or not step.inputs:
        return
    x = step.inputs[0].shape(batch, *size)
    op, fields = "conv_train", {}
    if isinstance(step, SharedBlockStep):
        op, fields = "shared_block_train", dict(slope=step.act.slope, skip=step.skip)
        fields["vectors"] = ("weight1", "bias1", "weight2", "bias2")
    elif before:
        op, fields = "bn_act_conv_train", dict(slope=before.act.slope, vectors=("weight", "bias"))
    stride = step.stride if isinstance(step, Conv) else 1
    macs = 3 * step_macs(step, batch, *size)
    yield Problem(op, (x, result), x, macs, tuple(step.weight.shape), stride=stride, **fields)


def _problems_of_scores(scores: Shape, size: Size) -> Iterator[Problem]:
    n, classes = scores[:2]
    macs = BILINEAR_MACS * n * classes * math.prod(size)
    for op in ("upsample_bilinear", "upsample_softmax_sum"):
        yield Problem(op, (scores,), (n, classes, *size), macs)
    yield Problem("upsample_argmax", (scores,), (n, *size), macs)
    # In training, with its gradient: the resize is computed forward and backward.
    yield Problem("upsample_cross_entropy", (scores, (n, *size)), scores, 2 * macs)


@functools.cache
def table(batch: int = 1) -> tuple[Entry, ...]:
    """Every distinct problem of the published models at `SIZES`, in order of first occurrence."""
    uses: dict[Problem, collections.Counter[str]] = {}
    for model in MODELS:
        plan = plan_of(model)
        for size in SIZES:
            for problem in problems_of(plan, batch, size):
                uses.setdefault(problem, collections.Counter())[use(model, size)] += 1
    quick = {problem for op in {problem.op for problem in uses} for problem in _quick(op, uses)}
    return tuple(Entry(problem, dict(found), problem in quick) for problem, found in uses.items())


def use(model: str, size: Size) -> str:
    """The key in `Entry.uses`."""
    return f"{model} {size[0]}x{size[1]}"


def _quick(op: str, uses: dict[Problem, collections.Counter[str]]) -> list[Problem]:
    for model in QUICK_MODELS:
        name = use(model, SIZES[0])
        found = [problem for problem in uses if problem.op == op and uses[problem][name]]
        if found:
            # Without multiplications, the traffic decides.
            work = [(problem.macs or problem.bytes(torch.float32)) * uses[problem][name] for problem in found]
            order = sorted(range(len(found)), key=lambda i: -work[i])
            return [found[i] for i in order[:QUICK_PROBLEMS]]
    return []
