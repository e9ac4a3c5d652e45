"""What a tuner times: a step's algorithms on random tensors of its shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .. import plan as p
from ..tuning import Candidate, GpuClock, TuneCache, Tuner, default_path, environment_of, shipped_path
from .algorithm import Algorithm, Context, Size
from .device import empty_bytes

# Of random codes.
CODES_DEVIATION = 40
# Of `tune=True`.
TUNING_SECONDS = 60.0


def key_of(step: p.Step, size: Size, context: Context) -> str:
    """A problem's name: equal for steps that do the same work."""
    shapes = [value.shape(*size) for value in (*step.inputs, *step.outputs)]
    shapes += [tuple(t.shape) for t in step.weights() if t.ndim > 1]
    kind = str(context.dtype).removeprefix("torch.")
    kind += f" {context.precision}" if context.dtype is torch.float32 else ""
    return " ".join([step.op, step.detail(), *("x".join(map(str, shape)) for shape in shapes), kind])


def candidate(step: p.Step, algorithm: Algorithm, size: Size, context: Context) -> Candidate:
    """One algorithm on tensors of its own, for a tuner."""

    def prepare() -> Callable[[], object]:
        inputs = [_random(value, size, context) for value in step.inputs] or [_image(size, context)]
        outputs = [_random(value, size, context) for value in step.outputs] if algorithm.in_arena else []
        scratch = empty_bytes(algorithm.scratch, context.device) if algorithm.scratch else None
        run = algorithm.prepare()
        return lambda: run(inputs, outputs, scratch, False)

    return Candidate(algorithm.name, algorithm.microseconds, prepare)


def _random(value: p.Value, size: Size, context: Context) -> Tensor:
    """Random values, for zeros draw less power and run faster."""
    shape, dtype = value.shape(*size), value.dtype(context.dtype)
    if value.stride is None:
        return torch.rand(shape, dtype=dtype, device=context.device)
    n, c, h, w = shape
    values = torch.randn((n, h, w, c), device=context.device)
    if value.codes is not None:
        # As codes of activations spread: one step of a normal deviate would make most of int8's zeros.
        values = (CODES_DEVIATION * values).round().clamp(-127, 127)
    return values.to(dtype).permute(0, 3, 1, 2)


def _image(size: Size, context: Context) -> Tensor:
    n, h, w = size
    return torch.randn((n, 3, h, w), device=context.device).to(context.dtype)


def compile_ahead(candidates: Sequence[Candidate], device: torch.device, threads: int) -> None:
    """Runs each candidate once, several at a time, so that Triton compiles them beside each other.

    One that fails is not complained of here: whoever runs it next is told.
    """

    def run(candidate: Candidate) -> None:
        with torch.no_grad(), torch.cuda.device(device), contextlib.suppress(Exception):
            candidate.prepare()()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, candidates))
    torch.cuda.synchronize(device)


def tuner_of(device: torch.device, tune: bool | float) -> Tuner:
    """A tuner for a device, which times if `tune`; for emulated kernels one that remembers nothing.

    tune: whether it may, or seconds for which it may.
    """
    if device.type != "cuda":
        return Tuner(TuneCache(None, {}), None)
    environment = environment_of(device)
    cache = TuneCache(default_path(environment), environment, shipped_path(environment))
    seconds = TUNING_SECONDS if tune is True else float(tune)
    return Tuner(cache, GpuClock(device) if tune else None, seconds=seconds)
