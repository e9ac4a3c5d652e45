"""Candidates for a tuner: a step's algorithms on random tensors of its shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .. import plan as p
from .. import problem
from ..problem import TUNING_SECONDS, Size
from ..tuning import Candidate, GpuClock, TuneCache, Tuner, default_path, environment_of, shipped_path
from .algorithm import Algorithm, Context
from .device import empty_bytes


def key_of(step: p.Step, size: Size, context: Context) -> str:
    """A problem's name: equal for steps that do the same work."""
    precision = context.precision if context.dtype is torch.float32 else ""
    return problem.key_of(step, size, context.dtype, precision)


def candidate(step: p.Step, algorithm: Algorithm, size: Size, context: Context) -> Candidate:
    """One algorithm with its own tensors, for a tuner."""

    def drawn(value: p.Value) -> Tensor:
        return problem.random_value(value, size, context.dtype, context.device)

    def prepare() -> Callable[[], object]:
        inputs = [drawn(value) for value in step.inputs]
        if not inputs:
            inputs = [problem.random_image(size, context.dtype, context.device)]
        outputs = [drawn(value) for value in step.outputs] if algorithm.in_arena else []
        scratch = empty_bytes(algorithm.scratch, context.device) if algorithm.scratch else None
        run = algorithm.prepare()
        return lambda: run(inputs, outputs, scratch, False)

    return Candidate(algorithm.name, algorithm.microseconds, prepare)


def compile_ahead(candidates: Sequence[Candidate], device: torch.device, threads: int) -> None:
    """Runs each candidate once, several at a time, so that Triton compiles them in parallel.

    Failures are ignored here: they will be raised again by the next run.
    """

    def run(candidate: Candidate) -> None:
        with torch.no_grad(), torch.cuda.device(device), contextlib.suppress(Exception):
            candidate.prepare()()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, candidates))
    torch.cuda.synchronize(device)


def tuner_of(device: torch.device, tune: bool | float) -> Tuner:
    """A tuner for a device, which times if `tune` is set; for emulated kernels without a cache.

    tune: whether it may time, or for how many seconds.
    """
    if device.type != "cuda":
        return Tuner(TuneCache(None, {}), None)
    environment = environment_of(device)
    cache = TuneCache(default_path(environment), environment, shipped_path(environment))
    seconds = TUNING_SECONDS if tune is True else float(tune)
    return Tuner(cache, GpuClock(device) if tune else None, seconds=seconds)
