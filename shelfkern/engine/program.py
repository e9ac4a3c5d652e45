"""A plan bound to kernels: what runs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native, ops
from ..normalisation import Normalisation
from . import arena, library, native_kernels
from .image import image_size, padded
from .kernel import Kernel
from .plan import Plan, Step, Value
from .workspace import Size, Workspace, WorkspacePool

log = logging.getLogger(__name__)

Extent = tuple[int, int]


class Program:
    """Kernels for each step of a plan, and the final resize. Immutable; may run in several threads."""

    def __init__(
        self, plan: Plan, dtype: torch.dtype, backend: str, normalisation: Normalisation, align_corners: bool
    ) -> None:
        self.dtype = dtype
        self.backend = backend
        self.align_corners = align_corners
        self.normalisation = normalisation
        self.kernels = [self._kernel(step) for step in plan.steps]
        self.plan = dataclasses.replace(plan, dtype=dtype, algorithms=self.algorithm_names)
        last_uses = plan.last_uses()
        self._dead_after = [
            [value.index for value in set(step.inputs) if last_uses[value] == index]
            for index, step in enumerate(plan.steps)
        ]
        self.pool: WorkspacePool[Size, Workspace] = WorkspacePool(self._workspace)

    def _kernel(self, step: Step) -> Kernel:
        """The native kernel where it can run and may, the library's otherwise."""
        if self.backend != "library":
            reason = native_kernels.can_prepare(step)
            if reason is None:
                return native_kernels.prepare(step, self.dtype, self.normalisation)
            self._reject(step.op, reason)
        return library.prepare(step, self.dtype, self.normalisation)

    def _reject(self, op: str, reason: str) -> None:
        if self.backend == "native":
            raise RuntimeError(f"backend is 'native', which cannot run {op}: {reason}")
        _log_once(f"{op} runs on the library backend: {reason}")

    def _workspace(self, size: Size) -> Workspace:
        steps = [step for step, kernel in zip(self.plan.steps, self.kernels, strict=True) if kernel.in_arena]
        values = {value for step in steps for value in (step.output, *step.temporaries)}
        layout = arena.lay_out(self.plan, values, *size, self.dtype)
        memory = native.empty((layout.size,), torch.uint8)

        def view(value: Value) -> Tensor:
            return arena.view(memory, layout, value, *size, self.dtype)

        outputs = [step.output for step in self.plan.steps]
        return Workspace(
            memory,
            [view(value) if value in values else value.shape(*size) for value in outputs],
            [[view(value) for value in step.temporaries if value in values] for step in self.plan.steps],
        )

    def algorithm_names(self, n: int, h: int, w: int) -> list[str]:
        """What runs each step for n images padded to h x w."""
        return [
            native_kernels.algorithm(step, n, h, w) if kernel.in_arena else "library"
            for step, kernel in zip(self.plan.steps, self.kernels, strict=True)
        ]

    def scores(self, images: Tensor) -> Tensor:
        """Scores (N, classes, H, W) of images, contiguous, in the program's dtype."""
        return self._run(images, self.resize)

    def labels(self, images: Tensor) -> Tensor:
        """Labels (N, H, W) uint8 of images."""
        return self._run(images, self.argmax)

    def _run(self, images: Tensor, finish: Callable[[Tensor, Extent, Extent], Tensor]) -> Tensor:
        n, h, w = image_size(images)
        full = padded(h), padded(w)
        with self.pool.borrow((n, *full)) as workspace:
            return finish(self.low_resolution_scores(images, workspace), full, (h, w))

    def low_resolution_scores(self, images: Tensor, workspace: Workspace) -> Tensor:
        """Scores (N, classes, H / stride, W / stride) of checked images, in the workspace's memory."""
        values: dict[int, Tensor] = {}
        for index, (step, kernel) in enumerate(zip(self.plan.steps, self.kernels, strict=True)):
            inputs = [values[value.index] for value in step.inputs] or [images]
            if kernel.in_arena:
                inputs += workspace.temporaries[index]
            values[step.output.index] = kernel.run(inputs, workspace.destinations[index])
            for dead in self._dead_after[index]:
                del values[dead]
        return values[self.plan.scores.index]

    def resize(self, scores: Tensor, full: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Scores resized to `full` (padded) pixels and cropped to `size`, contiguous, in `dtype`."""
        out = native.empty((*scores.shape[:2], *size), self.dtype)
        if self._reason("upsample_bilinear") is None:
            ops.upsample_bilinear_native(scores, full, out, self.align_corners)
        else:
            resized = F.interpolate(scores, full, mode="bilinear", align_corners=self.align_corners)
            out.copy_(resized[:, :, : size[0], : size[1]])
        return out

    def argmax(self, scores: Tensor, full: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Labels (N, H, W) uint8 of `resize`, without making it."""
        out = native.empty((scores.shape[0], *size), torch.uint8)
        if self._reason("upsample_argmax") is None:
            ops.upsample_argmax_native(scores, full, out, self.align_corners)
        else:
            library.upsample_argmax_native(scores, full, out, self.align_corners)
        return out

    def _reason(self, op: str) -> str | None:
        return "backend is 'library'" if self.backend == "library" else native_kernels.reason(op)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)
