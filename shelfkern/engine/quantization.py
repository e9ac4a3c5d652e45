"""Rewrites a plan into one whose convolutions multiply 8-bit values.

An activation has one quantization step; each output channel of the weights has its own. On a GPU 8-bit values
are signed, and residuals and skips stay in 16 bits: `quantized`. On a CPU all activations are uint8: `coded`.
The steps come from `calibration`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..ops.quantize import LARGEST, Quantum
from . import plan as p

# 8-bit dtypes.
KINDS = tuple(LARGEST)


def quantized(
    plan: p.Plan, ranges: Mapping[int, float], kind: torch.dtype, keep: Collection[str] = ()
) -> p.Plan:
    """The plan with quantized convolutions.

    Convolutions and shared blocks that read an activation are quantized, except the last step, which computes
    the scores. A value that only they read exists only as 8 bits, one that others read too in both forms.
    Steps that cannot write 8-bit values are followed by a `Quantize` step.

    Args:
        plan: plan with floating activations.
        ranges: ranges by index of the activation, as from `calibrate`: the value of the largest 8-bit value.
        kind: torch.int8 or torch.float8_e4m3fn.
        keep: names of steps that stay floating.

    Raises:
        ValueError: kind or a name in keep is unknown, or a range is missing, not finite or not above 0.
    """
    check_kind(kind)
    unknown = sorted(set(keep) - {step.name for step in plan.steps})
    if unknown:
        raise ValueError(f"keep has {unknown[0]!r}, which is no step of the plan")
    return _Rewriting(plan, ranges, kind, keep).plan()


class _Rewriting:
    """Quantizes one plan."""

    def __init__(
        self, plan: p.Plan, ranges: Mapping[int, float], kind: torch.dtype, keep: Collection[str]
    ) -> None:
        self._plan, self._ranges, self._kind = plan, ranges, kind
        self._coded = coded_steps(plan, keep)
        self._read_as_codes = {plan.steps[index].inputs[0] for index in self._coded}
        self._read_floating = _read_floating(plan, self._coded)
        self._names = {value: step.name for step in plan.steps for value in step.outputs}
        values = [v for step in plan.steps for v in (*step.outputs, *step.temporaries)]
        self._next = 1 + max(value.index for value in values)
        self._codes: dict[p.Value, p.Value] = {}

    def plan(self) -> p.Plan:
        """The rewritten plan."""
        steps: list[p.Step] = []
        for index, step in enumerate(self._plan.steps):
            steps += self._rewritten(step, index in self._coded)
        return dataclasses.replace(self._plan, steps=tuple(steps))

    def _rewritten(self, step: p.Step, coded: bool) -> list[p.Step]:
        out = step.output
        writes = coded or (isinstance(step, p.Conv) and bool(step.inputs))
        if out not in self._read_as_codes:
            return [self._convolution(step, coded)] if coded else [step]
        self._codes[out] = self._codes_of(out, alone=writes and out not in self._read_floating)
        if writes:
            return [self._convolution(step, coded)]
        return [step, p.Quantize(step.name, (out,), self._codes[out], self._step(out))]

    def _codes_of(self, value: p.Value, alone: bool) -> p.Value:
        """The 8-bit form of a value, replacing it or beside it."""
        index = value.index
        if not alone:
            index, self._next = self._next, self._next + 1
        return dataclasses.replace(value, index=index, codes=self._kind)

    def _convolution(self, step: p.Step, coded: bool) -> p.Step:
        """The step in 8 bits, or if not `coded` a floating step that writes 8-bit values."""
        assert isinstance(step, (p.Conv, p.SharedBlockStep))
        fields = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
        x, *others = step.inputs
        codes = self._codes.get(step.output)
        if codes is not None:
            fields["codes_step"] = self._step(step.output)
            fields["output" if codes.index == step.output.index else "copy"] = codes
        if coded:
            fields |= dict(x_step=self._step(x), inputs=(self._codes[x], *others))
        if isinstance(step, p.Conv):
            return p.QuantizedConv(**fields)
        fields |= dict(inputs=(self._codes[x], x), hidden_step=self._step(step.hidden, step.name))
        fields["hidden"] = dataclasses.replace(step.hidden, codes=self._kind)
        return p.QuantizedBlock(**fields)

    def _step(self, value: p.Value, name: str | None = None) -> float:
        name = name or self._names[value]
        if value.index not in self._ranges:
            raise ValueError(f"ranges has none for the activation of {name!r}")
        found = self._ranges[value.index]
        if not (math.isfinite(found) and found > 0):
            raise ValueError(
                f"ranges has {found} for the activation of {name!r}, it must be a finite number above 0"
            )
        return found / LARGEST[self._kind]


def coded_steps(plan: p.Plan, keep: Collection[str] = ()) -> set[int]:
    """Indices of the steps that can be quantized, except those kept."""
    return {
        index
        for index, step in enumerate(plan.steps[:-1])
        if type(step) in (p.Conv, p.SharedBlockStep) and step.inputs and step.name not in keep
    }


def _read_floating(plan: p.Plan, coded: set[int]) -> set[p.Value]:
    """Values that some step reads in floating form; the scores are among them."""
    found = {plan.scores}
    for index, step in enumerate(plan.steps):
        # A block adds the floating x.
        only_codes = index in coded and isinstance(step, p.Conv)
        found.update(step.inputs[1:] if only_codes else step.inputs)
    return found


def check_kind(kind: torch.dtype) -> None:
    """Raises ValueError unless kind is a supported 8-bit dtype."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind}, it may be {' or '.join(map(str, KINDS))}")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Input of `coded`.

    Attributes:
        quanta: quantization by index of the activation.
        raw: whether every image was a raw image, or a normalised one.
    """

    quanta: dict[int, Quantum]
    raw: bool


def coded(plan: p.Plan, calibration: Calibration) -> p.Plan:
    """The plan in uint8: the same steps, with all activations but the scores quantized.

    Steps without a kernel that writes uint8 stay floating and are followed by a `Quantize` step.
    """
    codes: dict[p.Value, p.Value] = {}
    steps: list[p.Step] = []
    spare = 1 + max(value.index for step in plan.steps for value in (*step.outputs, *step.temporaries))
    for step in plan.steps:
        value = step.output
        if value.index in calibration.quanta:
            codes[value] = _coded_value(value, calibration)
        if not _stays_floating(step):
            steps.append(_on_codes(step, codes, calibration))
            continue
        codes[value] = dataclasses.replace(codes[value], index=spare)
        steps += [step, p.Quantize(step.name, (value,), codes[value])]
        spare += 1
    return dataclasses.replace(plan, steps=tuple(steps))


def _stays_floating(step: p.Step) -> bool:
    """True only where the features before pooling are used too."""
    return isinstance(step, p.MaxPool) or (isinstance(step, p.Conv) and not step.inputs)


def _on_codes(step: p.Step, codes: Mapping[p.Value, p.Value], calibration: Calibration) -> p.Step:
    inputs = tuple(codes.get(value, value) for value in step.inputs)
    changes: dict[str, Any] = dict(inputs=inputs, output=codes.get(step.output, step.output))
    if isinstance(step, p.SharedBlockStep):
        changes["hidden"] = _coded_value(step.hidden, calibration)
    if isinstance(step, p.Stem):
        changes["raw"] = calibration.raw
    return dataclasses.replace(step, **changes)


def _coded_value(value: p.Value, calibration: Calibration) -> p.Value:
    return dataclasses.replace(value, codes=torch.uint8, quantum=calibration.quanta[value.index])
