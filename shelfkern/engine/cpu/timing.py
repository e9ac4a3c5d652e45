"""What a tuner times on a CPU, and the tuners, one for each number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .. import plan as p
from ..problem import TUNING_SECONDS, Size, random_image, random_value
from ..tuning import Candidate, CpuClock, TuneCache, Tuner, default_path, environment_of, shipped_path
from .algorithm import Algorithm, Context

CPU = torch.device("cpu")
# Times this close are equal: medians of the same call differ by so much on machines that others use too.
TIE = 1.03


def candidate(step: p.Step, algorithm: Algorithm, size: Size, context: Context) -> Candidate:
    """One algorithm on tensors of its own, for a tuner."""

    def drawn(value: p.Value) -> Tensor:
        return random_value(value, size, context.dtype, CPU)

    def prepare() -> Callable[[], object]:
        inputs = [drawn(value) for value in step.inputs] or [images_of(size, context)]
        outputs = [drawn(value) for value in step.outputs] if algorithm.in_arena else []
        scratch = torch.empty(algorithm.scratch, dtype=torch.uint8)
        run = algorithm.prepare()
        return lambda: run(inputs, outputs, scratch)

    return Candidate(algorithm.name, algorithm.microseconds, prepare)


def images_of(size: Size, context: Context) -> Tensor:
    """Random normalised images that are seen as h x w."""
    n, h, w = size
    return random_image((n, *context.extents.given(h, w)), torch.float32, CPU)


class Tuners:
    """A tuner for each number of threads: what is fastest on one may not be on eight.

    Args:
        tune: whether they may time, or seconds for which they may, all together.
    """

    def __init__(self, tune: bool | float) -> None:
        self._tune = bool(tune)
        self._seconds = TUNING_SECONDS if tune is True else float(tune)
        self._made: dict[int, Tuner] = {}
        self._lock = threading.Lock()

    def of(self, threads: int) -> Tuner:
        """The tuner for calls of torch.get_num_threads() threads, which must be `threads`."""
        with self._lock:
            if threads not in self._made:
                self._made[threads] = self._tuner()
            return self._made[threads]

    def _tuner(self) -> Tuner:
        environment = environment_of(CPU)
        cache = TuneCache(default_path(environment), environment, shipped_path(environment))
        left = self._seconds - sum(tuner.spent for tuner in self._made.values())
        return Tuner(cache, CpuClock() if self._tune else None, seconds=max(0.0, left), tie=TIE)
