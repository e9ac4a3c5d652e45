"""A plan bound to a CPU: algorithms chosen for each size and number of threads, and memory that is reused."""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import native, ops
from ...normalisation import Normalisation
from .. import arena
from .. import plan as p
from ..image import Extent, image_size
from ..problem import Packed, Size
from ..tuning import Call, Tuner
from ..workspace import WorkspacePool
from . import library
from .algorithm import Algorithm, Context, Run
from .algorithms import algorithms, why_not_ours
from .choice import Names, choose, named
from .timing import Tuners, images_of

log = logging.getLogger(__name__)

# Sizes whose algorithms are remembered.
KEPT_CHOICES = 64


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A forward pass at one size: for each step what runs it, and where.

    Attributes:
        arena: all activations that our kernels write.
        runs: what runs each step.
        outputs: of each step, in the arena; empty where its result is a tensor of the library's.
        scratch: of each step; empty where it needs none.
    """

    arena: Tensor
    runs: list[Run]
    outputs: list[list[Tensor]]
    scratch: list[Tensor]


class Program:
    """Algorithms for each step of a plan, and the final resize. May run in several threads.

    Attributes:
        plan: with the names of the algorithms that run it.
    """

    def __init__(
        self,
        plan: p.Plan,
        dtype: torch.dtype,
        backend: str,
        normalisation: Normalisation,
        align_corners: bool,
        tuners: Tuners,
        made: Callable[[p.Step], None] = lambda step: native.give_back(),
    ) -> None:
        """Binds the plan.

        made: called when weights of a step were packed: gives back the memory that this took.
        """
        self.dtype = dtype
        self.align_corners = align_corners
        self.normalisation = normalisation
        self.context = Context(dtype, normalisation, plan.extents, backend != "library", backend != "native")
        self.plan = dataclasses.replace(plan, dtype=dtype, algorithms=self.algorithm_names)
        self._check()
        self._tuners = tuners
        self._made = made
        self._packed = self._unpacked()
        last_uses = plan.last_uses()
        self._dead_after = [
            [value.index for value in set(step.inputs) if last_uses[value] == index]
            for index, step in enumerate(plan.steps)
        ]
        self._choosing = threading.Lock()
        self._choices = functools.lru_cache(KEPT_CHOICES)(self._choose)
        self.pool: WorkspacePool[tuple[Size, int], Workspace] = WorkspacePool(self._workspace)

    def _check(self) -> None:
        """Says why the library runs what has kernels of ours, or raises where it may not."""
        if not self.context.ours:
            return
        for step in self.plan.steps:
            reason = why_not_ours(step, self.context)
            if reason is None:
                continue
            if not self.context.theirs:
                raise RuntimeError(f"backend is 'native', which cannot run {step.op}: {reason}")
            _log_once(f"{step.op} runs on the library backend: {reason}")

    def chosen(self, size: Size) -> list[Algorithm]:
        """The algorithm of each step for n images seen as h x w and the present number of threads."""
        return self._chosen(size, torch.get_num_threads())

    def _chosen(self, size: Size, threads: int) -> list[Algorithm]:
        with self._choosing:
            return self._choices(size, threads)

    def _choose(self, size: Size, threads: int) -> list[Algorithm]:
        tuner = self._tuners.of(threads)
        spent = tuner.spent
        names = self._names(size, tuner)
        if tuner.spent > spent:
            # Timing takes much more than what is kept.
            native.give_back()
        return self._named(names, size, self._packed)

    def _unpacked(self) -> list[Packed]:
        return [Packed(functools.partial(self._made, step)) for step in self.plan.steps]

    def _names(self, size: Size, tuner: Tuner) -> Names:
        def passes(ways: Sequence[Names]) -> list[Callable[[], Call]]:
            # Their own, and gone with them; they run one after the other, so one arena serves them all.
            packed = self._unpacked()
            found = [self._named(names, size, packed) for names in ways]
            memory = native.empty((max(self._layout(each, size).size for each in found),), torch.uint8)
            return [functools.partial(self._tried, chosen, size, memory) for chosen in found]

        return choose(self.plan, size, self.context, tuner, passes)

    def _tried(self, chosen: Sequence[Algorithm], size: Size, memory: Tensor) -> Call:
        """A pass to be timed."""
        # It needs more than any layer alone, and other pieces.
        native.give_back()
        workspace = self._workspace_of(chosen, size, memory)
        images = images_of(size, self.context)
        return lambda: self.low_resolution_scores(images, workspace)

    def _named(self, names: Names, size: Size, packed: Sequence[Packed]) -> list[Algorithm]:
        steps = zip(self.plan.steps, names, packed, strict=True)
        return [named(algorithms(step, size, self.context, own), name) for step, name, own in steps]

    def algorithm_names(self, n: int, h: int, w: int) -> list[str]:
        """What runs each step for n images seen as h x w, on the present number of threads."""
        return [algorithm.name for algorithm in self.chosen((n, h, w))]

    def _workspace(self, key: tuple[Size, int]) -> Workspace:
        size, threads = key
        return self._workspace_of(self._chosen(size, threads), size)

    def _layout(self, chosen: Sequence[Algorithm], size: Size) -> arena.Layout:
        placed = [step.outputs for step, a in zip(self.plan.steps, chosen, strict=True) if a.in_arena]
        values = {value for outputs in placed for value in outputs}
        scratch = {index: algorithm.scratch for index, algorithm in enumerate(chosen)}
        return arena.lay_out(self.plan, values, *size, self.dtype, scratch=scratch)

    def _workspace_of(
        self, chosen: Sequence[Algorithm], size: Size, memory: Tensor | None = None
    ) -> Workspace:
        layout = self._layout(chosen, size)
        if memory is None:
            memory = native.empty((layout.size,), torch.uint8)

        def placed(step: p.Step, algorithm: Algorithm) -> list[Tensor]:
            values = step.outputs if algorithm.in_arena else ()
            return [arena.view(memory, layout, value, *size, self.dtype) for value in values]

        def worked_in(index: int, algorithm: Algorithm) -> Tensor:
            start = layout.offsets.get(arena.Scratch(index), 0)
            return memory[start : start + algorithm.scratch]

        return Workspace(
            memory,
            [algorithm.prepare() for algorithm in chosen],
            [placed(step, algorithm) for step, algorithm in zip(self.plan.steps, chosen, strict=True)],
            [worked_in(index, algorithm) for index, algorithm in enumerate(chosen)],
        )

    def scores(self, images: Tensor) -> Tensor:
        """Scores (N, classes, H, W) of images, contiguous, in the program's dtype."""
        return self._run(images, self.resize)

    def labels(self, images: Tensor) -> Tensor:
        """Labels (N, H, W) uint8 of images."""
        return self._run(images, self.argmax)

    def coarse_scores(self, images: Tensor) -> Tensor:
        """Scores (N, classes, h, w) of images before the final resize, in memory of their own."""
        return self._run(images, lambda scores, full, size: scores.clone())

    def _run(self, images: Tensor, finish: Callable[[Tensor, Extent, Extent], Tensor]) -> Tensor:
        # The caller's autocast and default device are not for what the program makes and calls.
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._run(images, finish)
        if torch.get_default_device().type != "cpu":
            with torch.device("cpu"):
                return self._run(images, finish)
        n, h, w = image_size(images)
        full, seen = self.plan.extents.padded(h, w), self.plan.extents.seen(h, w)
        with self.pool.borrow(((n, *seen), torch.get_num_threads())) as workspace:
            return finish(self.low_resolution_scores(images, workspace), full, (h, w))

    def low_resolution_scores(self, images: Tensor, workspace: Workspace) -> Tensor:
        """Scores (N, classes, H / stride, W / stride) of checked images, in the workspace's memory."""
        values: dict[int, Tensor] = {}
        for index, (step, run) in enumerate(zip(self.plan.steps, workspace.runs, strict=True)):
            inputs = [values[value.index] for value in step.inputs] or [images]
            outputs = workspace.outputs[index]
            own = run(inputs, outputs, workspace.scratch[index])
            results = outputs if own is None else [own]
            values.update(zip((value.index for value in step.outputs), results, strict=True))
            for dead in self._dead_after[index]:
                del values[dead]
        return values[self.plan.scores.index]

    def resize(self, scores: Tensor, full: Extent, size: Extent) -> Tensor:
        """Scores resized to `full` (padded) pixels and cropped to `size`, contiguous, in `dtype`."""
        out = native.empty((*scores.shape[:2], *size), self.dtype)
        if self.context.unavailable("upsample_bilinear") is None:
            ops.upsample_bilinear_native(scores, full, out, self.align_corners)
        else:
            resized = F.interpolate(scores, full, mode="bilinear", align_corners=self.align_corners)
            out.copy_(resized[:, :, : size[0], : size[1]])
        return out

    def argmax(self, scores: Tensor, full: Extent, size: Extent) -> Tensor:
        """Labels (N, H, W) uint8 of `resize`, without making it."""
        out = native.empty((scores.shape[0], *size), torch.uint8)
        if self.context.unavailable("upsample_argmax") is None:
            ops.upsample_argmax_native(scores, full, out, self.align_corners)
        else:
            library.upsample_argmax_native(scores, full, out, self.align_corners)
        return out


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)
