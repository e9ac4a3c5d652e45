"""Where an accelerated network's plan comes from: a model, whose weights may change, or a file."""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from .. import native
from ..nn.shelfnet import ShelfNet
from . import plan as p
from .calibration import calibrate, calibrate_unsigned
from .fingerprint import Fingerprint
from .lower import lower
from .quantization import coded, quantized
from .saved import Facts, read_saved


class State(Protocol):
    """State of an origin when its plan was made."""

    def matches(self) -> bool:
        """Whether the origin is still in this state."""


class Origin(Protocol):
    """Source of a plan, and of other information about the network."""

    @property
    def facts(self) -> Facts: ...

    def state(self) -> State:
        """The current state."""

    def plan(self, dtype: torch.dtype, on_gpu: bool) -> p.Plan:
        """The plan for activations of `dtype`, for a GPU's kernels or a CPU's.

        Raises:
            ValueError: kernels of this dtype cannot run the network.
        """

    def packed(self, step: p.Step) -> None:
        """Called after weights of a step were packed, to free memory that this needed."""


class FromModel:
    """A model; for 8-bit dtypes with calibration images.

    Attributes:
        model: the model, lowered again when its weights change.
    """

    def __init__(self, model: ShelfNet, calibration: list[Tensor] | None) -> None:
        self.model, self._calibration = model, calibration

    @property
    def facts(self) -> Facts:
        model = self.model
        return Facts(model.normalisation, model.align_corners, model.classes, model.palette)

    def state(self) -> Fingerprint:
        return Fingerprint(self.model)

    def plan(self, dtype: torch.dtype, on_gpu: bool) -> p.Plan:
        plan = lower(self.model)
        if self._calibration is None:
            return plan
        if not on_gpu:
            plan = coded(plan, calibrate_unsigned(plan, self._calibration, self.model.normalisation))
            plan.check(torch.uint8)
            return plan
        ranges = calibrate(plan, self._calibration, dtype, self.model.normalisation)
        return quantized(plan, ranges, dtype)

    def packed(self, step: p.Step) -> None:
        native.give_back()


class FromFile:
    """A file written by `FastShelfNet.save`. Its weights stay in the file, and are read when packed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.saved = read_saved(path)

    @property
    def facts(self) -> Facts:
        return self.saved.facts

    def state(self) -> FromFile:
        return self

    def matches(self) -> bool:
        """True: the file's content does not change."""
        return True

    def plan(self, dtype: torch.dtype, on_gpu: bool) -> p.Plan:
        return self.saved.plan

    def packed(self, step: p.Step) -> None:
        native.give_back()
        self.saved.forget(step)
