"""A plan bound to a GPU: algorithms chosen for each size, and forward passes that are reused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...normalisation import Normalisation
from ...ops import _conv_triton as conv
from ...ops.upsample_argmax import upsample_argmax_cuda
from ...ops.upsample_bilinear import upsample_bilinear_triton
from .. import plan as p
from ..image import image_size, seen_image, statistics
from ..problem import Packed, Size
from ..tuning import Candidate, Tuner
from ..workspace import WorkspacePool
from .algorithm import Algorithm, Context
from .algorithms import algorithms
from .device import Runtime, gpu_of, runtime_of
from .forward import Forward, Recipe, recipes
from .timing import candidate, compile_ahead, key_of

# The number of forward passes kept with their graphs and arenas, and of sizes whose algorithms are kept.
KEPT_PASSES = 8
KEPT_RECIPES = 64
# Threads for Triton's compiler, which spends most of its time outside Python.
COMPILING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """How a program runs.

    Attributes:
        device: a GPU; or the CPU, where kernels are emulated.
        dtype: dtype of activations and scores.
        ours, theirs: whether our kernels and the library's calls may run.
        graphs: whether passes are recorded as CUDA graphs.
        streams: 2 lets independent steps run side by side.
    """

    device: torch.device
    dtype: torch.dtype
    ours: bool = True
    theirs: bool = True
    graphs: bool = True
    streams: int = 2


@dataclasses.dataclass(frozen=True)
class _Key:
    """Key of a forward pass: shape and dtype of the images, and whether it computes labels."""

    n: int
    h: int
    w: int
    dtype: torch.dtype
    labels: bool

    @property
    def shape(self) -> tuple[int, ...]:
        if self.dtype is torch.uint8:
            return (self.n, self.h, self.w, 3)
        return (self.n, 3, self.h, self.w)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A step at one size, for the tuner."""

    key: str
    size: Size
    candidates: list[Candidate]
    cold: bool


class GpuProgram:
    """Runs a plan on a GPU. Safe to use from several threads and streams at once.

    Attributes:
        plan: the plan, including the names of its algorithms.
    """

    def __init__(
        self,
        plan: p.Plan,
        options: Options,
        normalisation: Normalisation,
        align_corners: bool,
        tuner: Tuner,
        runtime: Runtime | None = None,
    ) -> None:
        self.options = options
        self.normalisation = normalisation
        self.align_corners = align_corners
        self.tuner = tuner
        self.runtime = runtime or runtime_of(options.device)
        self.context = Context(
            gpu_of(options.device),
            options.device,
            options.dtype,
            conv.default_precision(options.dtype),
            normalisation,
            options.ours,
            options.theirs,
        )
        # Cached, because checking for a GPU takes longer than a launch.
        self._resizes = self.context.unavailable("upsample_bilinear", "triton") is None
        self._labels = self.context.unavailable("upsample_argmax", self.context.cuda) is None
        self._statistics = statistics(normalisation, options.device)
        self.plan = dataclasses.replace(plan, dtype=options.dtype, algorithms=self.algorithm_names)
        self._packed = [Packed(self._settle) for _ in plan.steps]
        self._choosing = threading.Lock()
        self._recipe = functools.lru_cache(KEPT_RECIPES)(self._make_recipe)
        self._passes = WorkspacePool(self._forward, KEPT_PASSES)

    def scores(self, images: Tensor) -> Tensor:
        """Scores (N, classes, H, W) of images on the device, contiguous, in the program's dtype."""
        key = self._key(images, labels=False)
        with self._on_device(), self._passes.borrow(key) as forward:
            self._run(forward, images)
            # Outside the graph, into new memory: inside it would need a full-size copy.
            out = torch.empty(self._scores_shape(key), dtype=self.options.dtype, device=images.device)
            self._resize(key, forward.scores, out)
            forward.done()
        return out

    def labels(self, images: Tensor) -> Tensor:
        """Labels (N, H, W) uint8 of images on the device."""
        with self._on_device(), self._passes.borrow(self._key(images, labels=True)) as forward:
            self._run(forward, images)
            assert forward.result is not None
            out = forward.result.clone()
            forward.done()
        return out

    def coarse_scores(self, images: Tensor) -> Tensor:
        """Scores (N, classes, h, w) of images on the device before the final resize."""
        with self._on_device(), self._passes.borrow(self._key(images, labels=False)) as forward:
            self._run(forward, images)
            out = forward.scores.clone()
            forward.done()
        return out

    def _settle(self) -> None:
        self.runtime.synchronize(self.runtime.mark())

    def _run(self, forward: Forward, images: Tensor) -> None:
        forward.wait()
        forward.images.copy_(images)
        forward.launch()

    def bind(self, images: Tensor, labels: bool, result: Tensor | None = None) -> Forward:
        """A forward pass that reads the images in place and writes to `result`, by default a new tensor."""
        key = self._key(images, labels)
        if result is None:
            kind = torch.uint8 if labels else self.options.dtype
            shape = (key.n, key.h, key.w) if labels else self._scores_shape(key)
            result = torch.empty(shape, dtype=kind, device=images.device)
        finish = self._argmax if labels else self._resize
        with self._on_device():
            return self._recorded(key, images, functools.partial(finish, key), result)

    def recipe(self, size: Size) -> Recipe:
        """The recipe for n images seen as h x w, chosen once."""
        with self._choosing:
            return self._recipe(size)

    def algorithm_names(self, n: int, h: int, w: int) -> list[str]:
        """The name of each step's algorithm for n images seen as h x w."""
        return [bound.algorithm.name for bound in self.recipe((n, h, w)).steps]

    def algorithms(self, step: int, size: Size) -> list[Algorithm]:
        """The ways to run a step, the one that should be fastest first."""
        return algorithms(self.plan.steps[step], size, self.context, self._packed[step])

    def _make_recipe(self, size: Size) -> Recipe:
        with self._on_device():
            problems = [self._problem(index, size) for index in range(len(self.plan.steps))]
            self._compile(problems)
            chosen = [self._choose(index, problem) for index, problem in enumerate(problems)]
            overlap = self.context.gpu.capability >= (9, 0)
            found = recipes(self.plan, size, self.options.dtype, chosen, self.options.streams, overlap)
            return self._choose_recipe(found) if len(found) > 1 else found[0]

    def _problem(self, index: int, size: Size) -> _Problem:
        step = self.plan.steps[index]
        # With a separate `Packed`, so that weights packed for the losers are freed.
        tried = algorithms(step, size, self.context, Packed())
        candidates = [candidate(step, algorithm, size, self.context) for algorithm in tried]
        # Weights that do not fit into L2 come from memory in every pass.
        cold = self.plan.weight_bytes() * self.options.dtype.itemsize / 4 > self.context.gpu.l2_bytes
        return _Problem(key_of(step, size, self.context), size, candidates, cold)

    def _compile(self, problems: list[_Problem]) -> None:
        """Compiles the kernels that are about to be timed or run: each takes a second."""
        if self.options.device.type != "cuda":
            return
        distinct = {problem.key: problem for problem in problems}.values()
        needed = [
            c
            for problem in distinct
            for c in self.tuner.expected(problem.key, problem.candidates, problem.cold)
        ]
        compile_ahead(needed, self.options.device, min(COMPILING_THREADS, os.cpu_count() or 1))

    def _choose(self, index: int, problem: _Problem) -> Algorithm:
        found = self.algorithms(index, problem.size)
        if len(found) == 1:
            return found[0]
        winner = self.tuner.choose(problem.key, problem.candidates, problem.cold)
        return next(algorithm for algorithm in found if algorithm.name == winner)

    def _choose_recipe(self, found: list[Recipe]) -> Recipe:
        """The fastest way to launch the chosen algorithms, found by timing whole passes."""
        first = found[0]
        names = " ".join(chosen.algorithm.name for chosen in first.steps)
        problems = " ".join(key_of(chosen.step, first.size, self.context) for chosen in first.steps)
        key = f"forward {hashlib.sha256(f'{names} {problems}'.encode()).hexdigest()[:16]}"

        def run_of(one: Recipe) -> Callable[[], Callable[[], None]]:
            images = torch.randn((one.size[0], 3, *one.size[1:]), dtype=one.dtype, device=self.options.device)
            return lambda: Forward(one, images, self.runtime).run

        candidates = [Candidate(one.name, one.microseconds, run_of(one)) for one in found]
        winner = self.tuner.choose(key, candidates)
        return next(one for one in found if one.name == winner)

    def _key(self, images: Tensor, labels: bool) -> _Key:
        n, h, w = image_size(images)
        # A stem reads raw images, or normalised ones in the program's dtype: others are converted by the
        # copy.
        return _Key(n, h, w, torch.uint8 if images.dtype is torch.uint8 else self.options.dtype, labels)

    def _forward(self, key: _Key) -> Forward:
        images = torch.zeros(key.shape, dtype=key.dtype, device=self.options.device)
        if not key.labels:
            return self._recorded(key, images, None, None)
        result = torch.empty((key.n, key.h, key.w), dtype=torch.uint8, device=self.options.device)
        return self._recorded(key, images, functools.partial(self._argmax, key), result)

    def _recorded(self, key: _Key, images: Tensor, finish: Any, result: Tensor | None) -> Forward:
        size = key.n, *self.plan.extents.seen(key.h, key.w)
        prepare = self._enlarged if self.plan.extents.enlarges else None
        forward = Forward(self.recipe(size), images, self.runtime, finish, result, prepare)
        if self.options.graphs:
            forward.record()
        return forward

    def _enlarged(self, images: Tensor) -> Tensor:
        return seen_image(images, self.plan.extents, *self._statistics).to(self.options.dtype)

    def _scores_shape(self, key: _Key) -> tuple[int, ...]:
        return (key.n, self.plan.num_classes, key.h, key.w)

    def _resize(self, key: _Key, scores: Tensor, out: Tensor) -> None:
        full = self.plan.extents.padded(key.h, key.w)
        if self._resizes:
            upsample_bilinear_triton(scores, full, out, self.align_corners, overlap=True)
        else:
            size = (key.h, key.w)
            out.copy_(ops.upsample_bilinear_reference(scores, full, size, self.align_corners))

    def _argmax(self, key: _Key, scores: Tensor, out: Tensor) -> None:
        full = self.plan.extents.padded(key.h, key.w)
        if self._labels:
            upsample_argmax_cuda(scores, full, out, self.align_corners, self.context.cuda)
        else:
            size = (key.h, key.w)
            out.copy_(ops.upsample_argmax_reference(scores, full, size, self.align_corners))

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """The program's device, without the caller's autocast: torch's convolutions would follow it."""
        kind = self.options.device.type
        with contextlib.ExitStack() as stack:
            if kind == "cuda":
                stack.enter_context(torch.cuda.device(self.options.device))
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
