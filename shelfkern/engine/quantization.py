"""From a plan to one whose convolutions multiply codes of 8 bits: calibration, and the rewriting of steps.

An activation's codes share one step; every output channel of the weights has its own. On a GPU codes are
signed, and what is added to a convolution stays in 16 bits: `calibrate`, `quantized`. On a CPU all
activations are unsigned codes: `calibrate_unsigned`, `coded`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..normalisation import Normalisation
from ..ops.quantize import LARGEST, Quantum
from . import plan as p
from .gpu.algorithm import Context, Run
from .gpu.algorithms import algorithms
from .gpu.device import gpu_of
from .image import image_size, padded
from .problem import Packed, Size

# dtypes of codes.
KINDS = tuple(LARGEST)
# How a range is found, the default first: what loses least, or the largest absolute value.
METHODS = {torch.int8: ("least_error", "largest"), torch.float8_e4m3fn: ("largest",)}
# Images that run at once: ranges do not depend on how they come, and memory stays that of one.
BATCH = 1
# Of a histogram: 16 bins to a step of int8 codes. A range is one of as many parts of the largest value.
BINS = 2048
CANDIDATES = 128

Images = Tensor | Iterable[Tensor]


def check_calibration(dtype: torch.dtype, calibration: Images | None) -> None:
    """Raises ValueError unless images are given for a dtype of 8 bits, and for no other."""
    if dtype in KINDS and calibration is None:
        raise ValueError(f"calibration is None, dtype {dtype} needs images such as those to come")
    if dtype not in KINDS and calibration is not None:
        raise ValueError(f"calibration is given and dtype {dtype}, it is for {' and '.join(map(str, KINDS))}")


def quantized(
    plan: p.Plan, ranges: Mapping[int, float], kind: torch.dtype, keep: Collection[str] = ()
) -> p.Plan:
    """The plan with convolutions of codes.

    Convolutions and shared blocks that read an activation become so, the last step, which makes the scores,
    excepted. What only they read exists only as codes, what others read too in both forms. Steps that cannot
    write codes are followed by one that makes them.

    Args:
        plan: of floating activations.
        ranges: of activations by their index, as `calibrate` gives them: the value of the largest code.
        kind: torch.int8 or torch.float8_e4m3fn.
        keep: names of steps that stay floating.

    Raises:
        ValueError: kind or a name in keep is unknown, or a range is missing, not finite or not above 0.
    """
    _check_kind(kind)
    unknown = sorted(set(keep) - {step.name for step in plan.steps})
    if unknown:
        raise ValueError(f"keep has {unknown[0]!r}, which is no step of the plan")
    return _Rewriting(plan, ranges, kind, keep).plan()


class _Rewriting:
    """One plan's way to codes."""

    def __init__(
        self, plan: p.Plan, ranges: Mapping[int, float], kind: torch.dtype, keep: Collection[str]
    ) -> None:
        self._plan, self._ranges, self._kind = plan, ranges, kind
        self._coded = _coded_steps(plan, keep)
        self._read_as_codes = {plan.steps[index].inputs[0] for index in self._coded}
        self._read_floating = _read_floating(plan, self._coded)
        self._names = {value: step.name for step in plan.steps for value in step.outputs}
        values = [v for step in plan.steps for v in (*step.outputs, *step.temporaries)]
        self._next = 1 + max(value.index for value in values)
        self._codes: dict[p.Value, p.Value] = {}

    def plan(self) -> p.Plan:
        """The new plan."""
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
        """A value's codes, in its place or beside it."""
        index = value.index
        if not alone:
            index, self._next = self._next, self._next + 1
        return dataclasses.replace(value, index=index, codes=self._kind)

    def _convolution(self, step: p.Step, coded: bool) -> p.Step:
        """The step on codes, or where it is not coded one that writes them."""
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


def _coded_steps(plan: p.Plan, keep: Collection[str] = ()) -> set[int]:
    """Indices of the steps that can multiply codes, less those kept."""
    return {
        index
        for index, step in enumerate(plan.steps[:-1])
        if type(step) in (p.Conv, p.SharedBlockStep) and step.inputs and step.name not in keep
    }


def _read_floating(plan: p.Plan, coded: set[int]) -> set[p.Value]:
    """Values that something reads as they are; the scores are."""
    found = {plan.scores}
    for index, step in enumerate(plan.steps):
        # A block adds its x as it is.
        only_codes = index in coded and isinstance(step, p.Conv)
        found.update(step.inputs[1:] if only_codes else step.inputs)
    return found


def coded(plan: p.Plan, calibration: Calibration) -> p.Plan:
    """The plan of unsigned codes: the same steps, of which all activations but the scores are codes.

    Steps without a kernel that writes codes stay floating, and one that makes them follows.
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
        steps += [step, p.Quantize(step.name, (value,), codes[value], calibration.quanta[value.index].step)]
        spare += 1
    return dataclasses.replace(plan, steps=tuple(steps))


def _stays_floating(step: p.Step) -> bool:
    """Only where the features before pooling are used too."""
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


def calibrate(
    plan: p.Plan,
    images: Images,
    kind: torch.dtype,
    normalisation: Normalisation | None = None,
    method: str | None = None,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Ranges of the activations that `quantized` makes codes of, over some images.

    The plan runs in float32 through torch's own calls.

    Args:
        plan: of floating activations.
        images: uint8 (N, H, W, 3) or normalised floating (N, 3, H, W), such as those to come, or several
            such batches, whose sizes may differ.
        kind: torch.int8 or torch.float8_e4m3fn.
        normalisation: of raw images; ImageNet's by default.
        method: "largest": the largest absolute value. For int8, by default, "least_error": the part of
            that which makes the sum of squared errors of clipping and rounding least, by a histogram;
            floating codes are as exact in a wide range as in a narrow one, and clipping would only lose.
        device: where it runs; by default where the plan's weights are.

    Returns:
        The value of the largest code, by index of the activation.

    Raises:
        ValueError: there are no images; kind or method is unknown; or an activation is not finite
            or nothing but zeros: the message names its layer.
        TypeError: images are neither uint8 nor floating tensors.
    """
    _check_kind(kind)
    methods = METHODS[kind]
    if method not in (None, *methods):
        raise ValueError(f"method is {method!r}, for {kind} it may be {' or '.join(map(repr, methods))}")
    names = _measured(plan)
    found = _histograms(plan, batches_of(images), names, normalisation or Normalisation(), device)
    return {index: _range(found[index], names[index], kind, method or methods[0]) for index in names}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What `coded` needs to know.

    Attributes:
        quanta: by the index of each activation.
        raw: whether every image was raw, or what a raw one is normalised.
    """

    quanta: dict[int, Quantum]
    raw: bool


def calibrate_unsigned(plan: p.Plan, images: Images, normalisation: Normalisation) -> Calibration:
    """Quanta of all activations over some images, in the way of `calibrate` by default.

    Codes span what there is on either side of 0, the tails left out: where nothing is negative, all of them
    are for what is positive.

    Raises: as `calibrate`.
    """
    made = ((value, step.name) for step in plan.steps for value in (*step.outputs, *step.temporaries))
    names = {v.index: name for v, name in made if v.stride is not None and v != plan.scores}
    raw = True

    def noted() -> Iterator[Tensor]:
        nonlocal raw
        for batch in batches_of(images):
            raw = raw and _is_raw(batch, normalisation)
            yield batch

    found = _histograms(plan, noted(), names, normalisation, None)
    for index, name in names.items():
        _check_range(found[index], name)
    return Calibration({index: found[index].quantum() for index in names}, raw)


def _is_raw(images: Tensor, normalisation: Normalisation) -> bool:
    """Whether images may have been raw, before they were normalised."""
    if images.dtype is torch.uint8:
        return True
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalisation.mean, normalisation.std))
    values = 255 * (images.float() * std + mean)
    return bool((values > -0.5).all() and (values < 255.5).all())


def _histograms(
    plan: p.Plan,
    batches: Iterable[Tensor],
    names: Mapping[int, str],
    normalisation: Normalisation,
    device: torch.device | None,
) -> dict[int, Histogram]:
    """Of the activations that have names, over some images."""
    found = {index: Histogram() for index in names}
    reference = _Reference(_unfused(plan), normalisation, device or plan.steps[0].weights()[0].device)
    count = 0
    for batch in batches:
        count += batch.shape[0]
        for index, x in reference.activations(batch, set(names)):
            found[index].add(x)
    if not count:
        raise ValueError("calibration has no images, it needs at least one")
    return found


def _check_kind(kind: torch.dtype) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind}, it may be {' or '.join(map(str, KINDS))}")


def _measured(plan: p.Plan) -> dict[int, str]:
    """Indices of the values that become codes, and the layers that make them."""
    makers = {step.output.index: step.name for step in plan.steps}
    steps = [plan.steps[index] for index in sorted(_coded_steps(plan))]
    found = {step.inputs[0].index: makers[step.inputs[0].index] for step in steps}
    return found | {s.hidden.index: s.name for s in steps if isinstance(s, p.SharedBlockStep)}


def _range(histogram: Histogram, name: str, kind: torch.dtype, method: str) -> float:
    """An activation's range, checked."""
    _check_range(histogram, name)
    return histogram.least_error(LARGEST[kind]) if method == "least_error" else histogram.largest


def _check_range(histogram: Histogram, name: str) -> None:
    if not math.isfinite(histogram.largest):
        raise ValueError(f"the activation of {name!r} is not finite for the images of calibration")
    if histogram.largest == 0:
        raise ValueError(f"the activation of {name!r} is nothing but zeros for the images of calibration")


def batches_of(images: Images) -> Iterator[Tensor]:
    """Images as batches of at most `BATCH`.

    Raises:
        TypeError: one is not a tensor, or of the wrong dtype.
        ValueError: one has the wrong shape.
    """
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(f"calibration holds a {type(batch).__qualname__}, it must hold tensors")
        if batch.numel():
            image_size(batch)
            yield from batch.split(BATCH)


class Histogram:
    """Absolute values as they come, in bins over a range that doubles when it must.

    Attributes:
        counts: (BINS,) int64 of what is not zero, which every range represents exactly.
        largest: absolute value; not finite once one was not.
        lowest, highest: value, 0 where all are on its other side.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.largest = self.lowest = self.highest = 0.0
        self._top = 0.0

    def add(self, x: Tensor) -> None:
        """Counts the values of a tensor."""
        if not math.isfinite(self.largest):
            return
        x = x.detach().flatten()
        lowest, highest = (bound.item() for bound in x.aminmax())
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        x = x.abs()
        largest = x.max().item()
        # Written so that NaN is taken up.
        self.largest = self.largest if largest <= self.largest else largest
        if not math.isfinite(self.largest) or largest == 0:
            return
        self._widen(largest)
        counts = torch.histc(x[x > 0].float(), BINS, 0, self._top)
        self.counts += counts.to("cpu", torch.int64)

    def _widen(self, largest: float) -> None:
        if self._top == 0:
            self._top = largest
        while self._top < largest:
            pairs = self.counts.view(BINS // 2, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self._top *= 2

    def least_error(self, codes: float) -> float:
        """The range whose `codes` steps lose least, by the sum of squared errors."""
        return self._least_error(lambda ranges: ranges / codes)

    def quantum(self) -> Quantum:
        """Unsigned codes that lose least, over what there is within a range on either side of 0."""

        def spans(ranges: Tensor) -> Tensor:
            return ranges.clamp(max=self.highest) + ranges.clamp(max=-self.lowest)

        largest = self._least_error(lambda ranges: spans(ranges) / 255)
        step = spans(torch.tensor(largest, dtype=torch.float64)).item() / 255
        return Quantum(step, round(min(largest, -self.lowest) / step))

    def _least_error(self, steps_of: Callable[[Tensor], Tensor]) -> float:
        """The range that loses least, of those whose steps are given."""
        ranges = self.largest * torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
        steps = steps_of(ranges)
        values = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self._top / BINS
        # Rounding is off by up to half a step, evenly; but what is nearest to 0 becomes 0.
        inside = torch.where(values < steps / 2, values.square(), steps.square() / 12)
        errors = torch.where(values > ranges, (values - ranges).square(), inside)
        return ranges[(errors * self.counts).sum(1).argmin()].item()


def _unfused(plan: p.Plan) -> p.Plan:
    """The plan with shared blocks as two convolutions, so that what lies between them can be seen."""
    steps: list[p.Step] = []
    for step in plan.steps:
        steps += _two_convolutions(step) if isinstance(step, p.SharedBlockStep) else [step]
    return dataclasses.replace(plan, steps=tuple(steps))


def _two_convolutions(step: p.SharedBlockStep) -> list[p.Step]:
    (x,) = step.inputs
    first = p.Conv(step.name, (x,), step.hidden, step.weight, step.scale1, step.shift1, 1, step.act)
    inputs = (step.hidden, x, x) if step.skip else (step.hidden, x)
    norm, relu = (step.scale2, step.shift2), p.Activation(0.0)
    second = p.Conv(step.name, inputs, step.output, step.weight, *norm, 1, relu, True, step.skip)
    return [first, second]


class _Reference:
    """A plan through torch's own calls in float32, one activation after the other."""

    def __init__(self, plan: p.Plan, normalisation: Normalisation, device: torch.device) -> None:
        gpu = gpu_of(device)
        self._plan, self._last_uses = plan, plan.last_uses()
        self._context = Context(gpu, device, torch.float32, "ieee", normalisation, ours=False)
        self._packed = [Packed() for _ in plan.steps]

    @torch.no_grad()
    def activations(self, images: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Index and value of every activation that is wanted."""
        n, h, w = image_size(images)
        size = (n, padded(h), padded(w))
        images = images.to(self._context.device)
        values: dict[p.Value, Tensor] = {}
        for index, step in enumerate(self._plan.steps):
            inputs = [values[value] for value in step.inputs] or [images]
            own = self._run(index, size)(inputs, [], None, False)
            assert own is not None
            values[step.output] = own
            if step.output.index in wanted:
                yield step.output.index, own
            values = {value: x for value, x in values.items() if self._last_uses.get(value, -1) > index}

    def _run(self, index: int, size: Size) -> Run:
        found = algorithms(self._plan.steps[index], size, self._context, self._packed[index])
        plain = next(one for one in found if one.name in (self._context.library, "torch"))
        return plain.prepare()
