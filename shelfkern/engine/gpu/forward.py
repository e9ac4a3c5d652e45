"""One forward pass at one size: its arena, its steps in their streams, and the graph that records them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._common import channels_innermost
from .. import arena
from ..order import Order, in_sequence, makespan, side_by_side
from ..plan import Plan, Step
from .algorithm import Algorithm, Run, Size
from .device import Graph, Runtime, empty_bytes

# Microseconds hidden per launch where a kernel may start early; and the libraries whose kernels can.
OVERLAP_GAIN = 0.7
OURS = ("cuda", "triton")


@dataclasses.dataclass(frozen=True)
class ChosenStep:
    """A step with its algorithm.

    Attributes:
        step: step of the plan.
        algorithm: algorithm chosen for it.
        overlap: whether it may start before the previous step in its stream has ended.
    """

    step: Step
    algorithm: Algorithm
    overlap: bool

    @property
    def microseconds(self) -> float:
        """Predicted time on an H200."""
        gained = self.overlap and self.algorithm.family in OURS
        return self.algorithm.microseconds - OVERLAP_GAIN * gained


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a forward pass except its memory: shared by all passes of one size.

    Attributes:
        plan: plan to run.
        size: number of images, and the size they are seen as.
        dtype: dtype of activations.
        steps: the steps with their algorithms.
        order: order of the steps, and their streams.
    """

    plan: Plan
    size: Size
    dtype: torch.dtype
    steps: tuple[ChosenStep, ...]
    order: Order

    @property
    def name(self) -> str:
        """Name that distinguishes it from other recipes with the same algorithms."""
        streams = 1 + max(self.order.streams)
        overlapping = any(chosen.overlap for chosen in self.steps)
        return f"{streams} stream{'s' * (streams > 1)}" + ", overlapping" * overlapping

    @property
    def scratch(self) -> dict[int, int]:
        """Bytes of scratch memory by step."""
        return {index: chosen.algorithm.scratch for index, chosen in enumerate(self.steps)}

    @property
    def launches(self) -> int:
        """Number of kernel launches of one forward pass up to the low-resolution scores."""
        return sum(chosen.algorithm.launches for chosen in self.steps)

    @property
    def microseconds(self) -> float:
        """Predicted time on an H200."""
        return makespan(self.order, [chosen.microseconds for chosen in self.steps])


def recipes(
    plan: Plan, size: Size, dtype: torch.dtype, chosen: Sequence[Algorithm], streams: int, overlap: bool
) -> list[Recipe]:
    """Ways to launch the chosen algorithms: in one stream or two, with overlapping launches or not.

    Only the device can tell which is fastest: waiting across streams has a cost, and a step that waits for
    another stream cannot overlap its predecessor. The first is predicted to be.
    """
    times = [algorithm.microseconds for algorithm in chosen]
    orders = [in_sequence(plan)]
    if streams > 1:
        beside = side_by_side(plan, times)
        orders += [beside] if beside != orders[0] else []
    found = [
        Recipe(plan, size, dtype, _chosen_steps(plan, chosen, order, may), order)
        for order in orders
        for may in ([True, False] if overlap else [False])
    ]
    return sorted(found, key=lambda one: one.microseconds)


def _chosen_steps(plan: Plan, chosen: Sequence[Algorithm], order: Order, may: bool) -> tuple[ChosenStep, ...]:
    return tuple(
        ChosenStep(step, algorithm, may and index > 0 and not order.waits[index])
        for index, (step, algorithm) in enumerate(zip(plan.steps, chosen, strict=True))
    )


@dataclasses.dataclass(frozen=True)
class BoundStep:
    """A step of a forward pass that has run.

    Attributes:
        step: step of the plan.
        algorithm: algorithm that runs it.
        shape: shape of its result.
        run: launches it alone, on the current stream.
    """

    step: Step
    algorithm: Algorithm
    shape: tuple[int, ...]
    run: Callable[[], None]


class Forward:
    """A forward pass over an arena of its own, from images in a fixed tensor to low-resolution scores.

    Attributes:
        images: input tensor: uint8 (N, H, W, 3) or normalised float (N, 3, H, W).
        arena: memory of all activations.
        result: tensor that `finish` writes to, if any.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Tensor,
        runtime: Runtime,
        finish: Callable[[Tensor, Any], None] | None = None,
        result: Tensor | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Lays out the arena.

        finish: takes the low-resolution scores and `result` once all steps have run.
        prepare: converts the images for the first step, where it does not take them directly.
        """
        self.recipe, self.images, self.result = recipe, images, result
        self._runtime, self._finish, self._prepare = runtime, finish, prepare
        self._seen = images
        self._runs: list[Run] = [bound.algorithm.prepare() for bound in recipe.steps]
        plan, size, dtype = recipe.plan, recipe.size, recipe.dtype
        values = {value for bound in recipe.steps if bound.algorithm.in_arena for value in bound.step.outputs}
        layout = arena.lay_out(plan, values, *size, dtype, recipe.order, recipe.scratch)
        self.arena = empty_bytes(layout.size, images.device)
        # Values outside the arena are added as they are created.
        self._values = {v.index: arena.view(self.arena, layout, v, *size, dtype) for v in values}
        self._scratch = [self._scratch_of(layout, index, nbytes) for index, nbytes in recipe.scratch.items()]
        self._side = runtime.side_stream() if any(recipe.order.streams) else None
        self._graph: Graph | None = None
        # The memory belongs to this stream, and the first run may be in another.
        self.done()

    def _scratch_of(self, layout: arena.Layout, index: int, nbytes: int) -> Tensor | None:
        if not nbytes:
            return None
        start = layout.offsets[arena.Scratch(index)]
        return self.arena[start : start + nbytes]

    @property
    def scores(self) -> Tensor:
        """The low-resolution scores of the last pass."""
        return self._values[self.recipe.plan.scores.index]

    def record(self) -> None:
        """Records the pass as a graph that `launch` replays."""
        self._graph = self._runtime.capture(self.run)

    def wait(self) -> None:
        """Makes the current stream wait for the last pass, if that ran in another stream."""
        stream = self._runtime.current()
        if self._last[0] != stream:
            self._runtime.wait(self._last[1])
            for memory in (self.arena, self.images, self.result):
                if memory is not None:
                    self._runtime.keep(memory)

    def launch(self) -> None:
        """Runs the pass on the current stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.run()

    def done(self) -> None:
        """Marks that all work that reads this memory has been submitted to the current stream."""
        self._last: tuple[Any, Any] = (self._runtime.current(), self._runtime.mark())

    def run(self) -> None:
        """Launches every step, each in its stream, then `finish`."""
        runtime, streams = self._runtime, self.recipe.order
        awaited = {other for waits in streams.waits for other in waits}
        marks: dict[int, Any] = {}
        if self._prepare is not None:
            self._seen = self._prepare(self.images)
        start = runtime.mark() if self._side is not None else None
        forked = False
        for index, stream in enumerate(streams.streams):
            with runtime.on(self._side) if stream else contextlib.nullcontext():
                if stream and not forked:
                    runtime.wait(start)
                    forked = True
                for other in streams.waits[index]:
                    runtime.wait(marks[other])
                self.run_step(index)
                if index in awaited:
                    marks[index] = runtime.mark()
        if self._finish is not None:
            self._finish(self.scores, self.result)

    def bound_steps(self) -> list[BoundStep]:
        """Every step, with the inputs left by the last pass."""
        return [
            BoundStep(
                chosen.step,
                chosen.algorithm,
                chosen.step.output.shape(*self.recipe.size),
                functools.partial(self.run_step, index),
            )
            for index, chosen in enumerate(self.recipe.steps)
        ]

    def run_step(self, index: int) -> None:
        """Launches one step on the current stream, with the inputs left by the last pass."""
        bound = self.recipe.steps[index]
        inputs = [self._values[value.index] for value in bound.step.inputs] or [self._seen]
        in_arena = bound.algorithm.in_arena
        outputs = [self._values[value.index] for value in bound.step.outputs] if in_arena else []
        own = self._runs[index](inputs, outputs, self._scratch[index], bound.overlap)
        if own is not None:
            # The library may choose another layout where sizes are 1.
            own = channels_innermost(own) if own.ndim == 4 else own
            self._values[bound.step.output.index] = own
