"""Shared by the op benchmarks: inputs, variants, and the check before timing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from clocks import Stopwatch, Times
from shapes import Entry, Problem
from torch import Tensor, nn

from shelfkern import ops
from shelfkern.ops._backends import unavailable

# Our backends on each device; emulated and interpreted kernels are for tests.
BACKENDS = {"cpu": ("native",), "cuda": ("cuda", "triton")}
LIBRARIES = {"cpu": ("oneDNN",), "cuda": ("cuDNN", "cuDNN fused")}
EAGER, COMPILED = "eager channels_last", "torch.compile"
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}

# Random labels come in squares of this many pixels per side, because adjacent pixels of images mostly agree.
LABEL_BLOCK = 16

# Of Winograd's filtering in training, in multiples of eager's error, as in tests/ops/test_conv_train.py.
WINOGRAD_ERROR = 4.5

Tensors = dict[str, "Tensor | None"]
# Computes its op once and returns the result.
Run = Callable[[], Tensor]
# The unchecked function of an op's backend, such as shelfkern.ops.upsample_add_native.
Kernel = Callable[..., None]


class Wrong(AssertionError):
    """A variant's result differs too much from float64."""


class ContextLost(Exception):
    """A kernel broke the CUDA context: this process can measure no more. The argument is the variant."""


def random_labels(shape: tuple[int, int, int], classes: int, generator: torch.Generator) -> Tensor:
    """uint8 (N, H, W) in blocks of `LABEL_BLOCK` pixels, a twentieth of them 255, which is ignored."""
    n, height, width = shape
    blocks = (n, -(-height // LABEL_BLOCK), -(-width // LABEL_BLOCK))
    device = generator.device
    labels = torch.randint(0, classes, blocks, generator=generator, device=device)
    labels[torch.rand(blocks, generator=generator, device=device) < 0.05] = 255
    whole = labels.to(torch.uint8).repeat_interleave(LABEL_BLOCK, 1).repeat_interleave(LABEL_BLOCK, 2)
    return whole[:, :height, :width].contiguous()


class Inputs:
    """Random tensors of one dtype on one device, the same in every run."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def activation(self, shape: tuple[int, ...]) -> Tensor:
        """Normally distributed, (N, C, H, W) in NHWC storage."""
        return self._normal(shape).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def weight(self, shape: tuple[int, ...], terms: int) -> Tensor:
        """Normally distributed, scaled so that `terms` products with normal activations have a normal sum."""
        weight = (self._normal(shape) / math.sqrt(terms)).to(self.dtype)
        return weight.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else weight

    def vector(self, length: int) -> Tensor:
        """Normally distributed float32."""
        return self._normal((length,))

    def vectors(self, problem: Problem) -> Tensors:
        """The problem's float32 parameters by name."""
        return {name: self.vector(problem.writes[1]) for name in problem.vectors}

    def image(self, shape: tuple[int, ...]) -> Tensor:
        """uint8."""
        return torch.randint(0, 256, shape, generator=self._generator, device=self.device, dtype=torch.uint8)

    def labels(self, shape: tuple[int, int, int], classes: int) -> Tensor:
        """Labels from `random_labels`."""
        return random_labels(shape, classes, self._generator)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with its tensors, by the names of the op's parameters, and the op's other arguments."""

    problem: Problem
    dtype: torch.dtype
    tensors: Tensors
    options: dict[str, Any]

    def fresh(self) -> Case:
        """The same case, with a separate `out` if the op adds to one."""
        if "out" not in self.tensors:
            return self
        return dataclasses.replace(self, tensors=self.tensors | {"out": self.tensors["out"].clone()})

    def call(self, function: Callable[..., Tensor | None], **options: Any) -> Tensor:
        """The function's result, or the `out` that it adds to."""
        result = function(**self.tensors, **self.options, **options)
        return self.tensors["out"] if result is None else result

    def poisoned(self, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for the result, filled with NaN (255 if uint8), in NHWC storage if it has 4 dimensions."""
        dtype = dtype or self.dtype
        device = next(t.device for t in self.tensors.values() if t is not None)
        value = float("nan") if dtype.is_floating_point else 255
        out = torch.full(self.problem.writes, value, dtype=dtype, device=device)
        return out.contiguous(memory_format=torch.channels_last) if out.ndim == 4 else out


def gradients(result: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> Tensor:
    """Computes the gradients of all leaves, and returns the first."""
    return torch.autograd.grad(result, leaves, grad)[0]


def step_of(call: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Run:
    """A call in training, followed by `gradients`."""

    @torch.enable_grad()
    def run():
        return gradients(call(), leaves, grad)

    return run


def one_rounding(case: Case, truth: Tensor) -> float:
    """An error allowed where eager happens to be exact: one rounding of the largest value."""
    return torch.finfo(case.dtype).eps * float(truth.abs().max())


def resize_rounding(case: Case, truth: Tensor) -> float:
    """The same for resizes, whose source coordinates are rounded to float32."""
    scores = case.tensors["scores"]
    coordinate = torch.finfo(torch.float32).eps * max(scores.shape[2:])
    return (torch.finfo(case.dtype).eps + 4 * coordinate) * float(scores.abs().max())


def as_exact(result: Tensor, truth: Tensor, eager: Tensor, floor: float, factor: float = 2.0) -> float:
    """The root-mean-square error relative to the truth's root mean square.

    Raises:
        Wrong: it is more than `factor` times eager's, or the largest error more than twice as many times.
    """
    if result.shape != truth.shape:
        raise Wrong(f"the result is {tuple(result.shape)}, it must be {tuple(truth.shape)}")
    errors, allowed = (result.double() - truth).abs(), (eager.double() - truth).abs()
    for name, found, limit in (
        ("root-mean-square", errors.square().mean().sqrt(), factor * allowed.square().mean().sqrt()),
        ("largest", errors.max(), 2 * factor * allowed.max()),
    ):
        # This form of comparison treats NaN as wrong.
        if not found <= max(float(limit), floor):
            raise Wrong(f"the {name} error is {found:.3g}, at most {max(float(limit), floor):.3g} is allowed")
    return float(errors.square().mean().sqrt() / truth.square().mean().sqrt())


def against_float64(op: Op, case: Case) -> Callable[[Tensor], float]:
    """`as_exact` for results of the case."""
    truth, eager = op.truth(case.fresh()), op.refer(case.fresh())
    floor = op.floor(case, truth)
    return lambda result: as_exact(result, truth, eager, floor, op.factor)


@dataclasses.dataclass(frozen=True)
class Op:
    """How an op is benchmarked.

    Attributes:
        name: name of the op.
        inputs: maps a problem to its tensors, by the names of the op's parameters, and other arguments.
        kernels: by backend, maps a case and the kernel to a call with packed weights and preallocated
            result, as in the engine. Backends without an entry are called through the public op.
        step: maps a case and one of `backends` to a call of the public op and its gradient, in training.
        backends: those that implement the op, by default `ops.KERNELS` of its name.
        library: maps a case and one of `LIBRARIES` to the library's own fused call.
        reference: the op in torch calls, by default its own reference.
        floor: the error that is always allowed.
        factor: the root-mean-square error that is allowed, in multiples of eager's.
        judge: maps a case to a check of a result, which returns its error or raises `Wrong`.
    """

    name: str
    inputs: Callable[[Problem, Inputs], tuple[Tensors, dict[str, Any]]]
    kernels: Mapping[str, Callable[[Case, Kernel], Run]] = dataclasses.field(default_factory=dict)
    step: Callable[[Case, str], Run] | None = None
    backends: tuple[str, ...] | None = None
    library: Callable[[Case, str], Run] | None = None
    reference: Callable[..., Tensor | None] | None = None
    floor: Callable[[Case, Tensor], float] = one_rounding
    factor: float = 2.0
    judge: Callable[[Op, Case], Callable[[Tensor], float]] = against_float64

    def case(self, problem: Problem, dtype: torch.dtype, device: str) -> Case:
        """The problem with random inputs."""
        return Case(problem, dtype, *self.inputs(problem, Inputs(dtype, device)))

    def refer(self, case: Case) -> Tensor:
        """The result in torch calls."""
        return case.call(self.reference or getattr(ops, f"{self.name}_reference"))

    def truth(self, case: Case) -> Tensor:
        """The result in float64."""
        wide = {name: t.double() if _is_floating(t) else t for name, t in case.tensors.items()}
        return self.refer(dataclasses.replace(case, tensors=wide))

    def ours(self, device: str) -> list[str]:
        """Names of the variants that are this library's."""
        return [backend for backend in BACKENDS[device] if self.is_ours(backend)]

    def is_ours(self, variant: str) -> bool:
        """Whether a variant is one of this library's backends."""
        return variant in (ops.KERNELS[self.name] if self.backends is None else self.backends)

    def variants(self, device: str) -> list[str]:
        """Names of all variants that are compared on a device; none where none is ours."""
        ours, libraries = self.ours(device), LIBRARIES[device] if self.library else ()
        return [*ours, EAGER, *libraries, COMPILED] if ours else []

    def why_not(self, backend: str, case: Case) -> str | None:
        """Reason why a backend has no kernel for the case; None if it has."""
        if self.step:
            return unavailable(self.name, backend)
        can_run = self._module.can_run
        names = inspect.signature(can_run).parameters
        return can_run(*(case.tensors[name] for name in names if name in case.tensors))[backend]

    @property
    def _module(self) -> Any:
        # As an attribute of shelfkern.ops, the name refers to the public op.
        return importlib.import_module(f"shelfkern.ops.{self.name}")

    def build(self, variant: str, case: Case, compile_options: dict[str, Any]) -> Run:
        """One variant of the case, ready to be called."""
        case = case.fresh()
        if variant == EAGER:
            return lambda: self.refer(case)
        if variant == COMPILED:
            return _compiled(self, case, compile_options)
        if variant in self.kernels:
            return self.kernels[variant](case, getattr(self._module, f"{self.name}_{variant}"))
        if self.step and self.is_ours(variant):
            return self.step(case, variant)
        if self.is_ours(variant):
            return lambda: case.call(getattr(ops, self.name), backend=variant)
        return self.library(case, variant)


def _is_floating(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


class Composition(nn.Module):
    """The reference with its weights as parameters, which torch.compile can freeze."""

    def __init__(self, op: Op, case: Case) -> None:
        super().__init__()
        self._op, self._case = op, case
        self._moving = {"x", "image", "scores", "target", "skip", "residual", "gate", "grad", "out"} & set(
            case.tensors
        )
        for name in set(case.tensors) - self._moving:
            value = case.tensors[name]
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    def forward(self, **moving: Tensor | None) -> Tensor:
        fixed = {name: getattr(self, name) for name in self._case.tensors if name not in self._moving}
        return self._op.refer(dataclasses.replace(self._case, tensors=fixed | moving))

    def moving(self) -> Tensors:
        """The tensors that change from call to call."""
        return {name: self._case.tensors[name] for name in self._moving}


def _compiled(op: Op, case: Case, options: dict[str, Any]) -> Run:
    # Otherwise torch.compile would stop compiling after eight shapes of one function.
    torch.compiler.reset()
    composition = Composition(op, case).eval()
    compiled = torch.compile(composition, dynamic=False, options=options)
    moving = composition.moving()
    return lambda: compiled(**moving)


class Replay:
    """A clock that replays measured seconds.

    pytest-benchmark times one variant after the other; ours were timed interleaved, and are passed to it this
    way.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: Iterator[float]) -> None:
        """Advances the clock by the next of the seconds."""
        self.now += next(seconds)


REPLAY = Replay()
replayed = pytest.mark.benchmark(timer=REPLAY)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of one variant: its error and times; or why it was refused, or could not run."""

    error: float | None = None
    times: Times | None = None
    refused: str | None = None
    unavailable: str | None = None

    def replay(self, benchmark: Any) -> None:
        """Passes times to pytest-benchmark; fails if the variant was refused, skips if it could not run."""
        if self.refused is not None:
            pytest.fail(self.refused, pytrace=False)
        if self.unavailable is not None:
            pytest.skip(self.unavailable)
        seconds = (self.times.cold or self.times.warm).seconds
        benchmark.extra_info["error"] = self.error
        benchmark.pedantic(REPLAY.play, args=(iter(seconds),), rounds=len(seconds))


@torch.no_grad()
def compare(
    op: Op, entry: Entry, dtype: torch.dtype, stopwatch: Stopwatch, variants: list[str]
) -> dict[str, Outcome]:
    """Every variant's outcome: all are checked against float64, then correct ones are timed interleaved."""
    case = op.case(entry.problem, dtype, stopwatch.device)
    outcomes, runs = _checked(op, case, variants, stopwatch)
    for name, times in (stopwatch.measure(runs) if runs else {}).items():
        outcomes[name] = dataclasses.replace(outcomes[name], times=times)
    return outcomes


def _checked(
    op: Op, case: Case, variants: list[str], stopwatch: Stopwatch
) -> tuple[dict[str, Outcome], dict[str, Run]]:
    error_of = op.judge(op, case)
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Run] = {}
    for name in variants:
        ours = op.is_ours(name)
        if ours and (why := op.why_not(name, case)):
            outcomes[name] = Outcome(unavailable=why)
            continue
        try:
            run = op.build(name, case, stopwatch.compile_options)
            outcomes[name] = Outcome(error=error_of(run()))
            runs[name] = run
        except Wrong as error:
            outcomes[name] = Outcome(refused=f"{name} is wrong, not timed: {error}")
        except Exception as error:
            if stopwatch.context_lost():
                raise ContextLost(name) from error
            # A peer missing from this torch is not our failure; a failing kernel of ours is.
            message = f"{name} failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            outcomes[name] = Outcome(refused=message) if ours else Outcome(unavailable=message)
    return outcomes, runs
