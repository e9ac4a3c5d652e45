"""What codes of 8 bits stand for: ranges of a network's activations, found on images.

`calibrate` is for `quantization.quantized`, `calibrate_unsigned` for `quantization.coded`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import native
from ..normalisation import Normalisation
from ..ops.quantize import LARGEST, Quantum
from . import plan as p
from .gpu.algorithm import Context, Run
from .gpu.algorithms import algorithms
from .gpu.device import gpu_of
from .image import image_size, seen_image, statistics
from .problem import Packed, Size
from .quantization import KINDS, Calibration, check_kind, coded_steps

# How a range is found, the default first: what loses least, or the largest absolute value.
METHODS = {torch.int8: ("least_error", "largest"), torch.float8_e4m3fn: ("largest",)}
# Images that run at once: ranges do not depend on how they come, and memory stays that of one.
BATCH = 1
# Of a histogram: 16 bins to a step of int8 codes. A range is one of as many parts of the largest value.
BINS = 2048
CANDIDATES = 128
# Values that are counted at once: what that makes is small beside an activation.
COUNTED = 1 << 18

Images = Tensor | Iterable[Tensor]


def check_calibration(dtype: torch.dtype, calibration: Images | None) -> None:
    """Raises ValueError unless images are given for a dtype of 8 bits, and for no other."""
    if dtype in KINDS and calibration is None:
        raise ValueError(f"calibration is None, dtype {dtype} needs images such as those to come")
    if dtype not in KINDS and calibration is not None:
        raise ValueError(f"calibration is given and dtype {dtype}, it is for {' and '.join(map(str, KINDS))}")


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
    check_kind(kind)
    methods = METHODS[kind]
    if method not in (None, *methods):
        raise ValueError(f"method is {method!r}, for {kind} it may be {' or '.join(map(repr, methods))}")
    names = _measured(plan)
    found = _histograms(plan, batches_of(images), names, normalisation or Normalisation(), device)
    return {index: _range(found[index], names[index], kind, method or methods[0]) for index in names}


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
    mean, std = (torch.tensor(v, device="cpu").view(3, 1, 1) for v in (normalisation.mean, normalisation.std))
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
            # Channels last, as they lie in memory, so that flattening copies nothing.
            found[index].add(x.movedim(1, -1))
        native.give_back()
    if not count:
        raise ValueError("calibration has no images, it needs at least one")
    return found


def _measured(plan: p.Plan) -> dict[int, str]:
    """Indices of the values that become codes, and the layers that make them."""
    makers = {step.output.index: step.name for step in plan.steps}
    steps = [plan.steps[index] for index in sorted(coded_steps(plan))]
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
        self.counts = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.largest = self.lowest = self.highest = 0.0
        self._top = 0.0

    def add(self, x: Tensor) -> None:
        """Counts the values of a tensor."""
        if not math.isfinite(self.largest):
            return
        x = x.detach().flatten()
        lowest, highest = (bound.item() for bound in x.aminmax())
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        largest = max(-lowest, highest)
        # Written so that NaN is taken up.
        self.largest = self.largest if largest <= self.largest else largest
        if not math.isfinite(self.largest) or largest == 0:
            return
        self._widen(largest)
        for part in x.split(COUNTED):
            counts = torch.histc(part.abs().float(), BINS, 0, self._top)
            self.counts += counts.to("cpu", torch.int64)
            self.counts[0] -= part.numel() - part.count_nonzero().item()

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
        step = spans(self._float64([largest])).item() / 255
        return Quantum(step, round(min(largest, -self.lowest) / step))

    def _float64(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.counts.device)

    def _least_error(self, steps_of: Callable[[Tensor], Tensor]) -> float:
        """The range that loses least, of those whose steps are given."""
        ranges = self.largest * self._float64(range(1, CANDIDATES + 1))[:, None] / CANDIDATES
        steps = steps_of(ranges)
        values = (self._float64(range(BINS)) + 0.5) * self._top / BINS
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
    """A plan through torch's own calls in float32, one activation after the other.

    Weights in the form that the calls take are made anew for each batch and step: kept, they would be as many
    as the model's.
    """

    def __init__(self, plan: p.Plan, normalisation: Normalisation, device: torch.device) -> None:
        gpu = gpu_of(device)
        self._plan, self._last_uses = plan, plan.last_uses()
        self._context = Context(gpu, device, torch.float32, "ieee", normalisation, ours=False)

    @torch.no_grad()
    def activations(self, images: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Index and value of every activation that is wanted."""
        n, h, w = image_size(images)
        extents = self._plan.extents
        size = (n, *extents.seen(h, w))
        images = images.to(self._context.device)
        if extents.enlarges:
            images = seen_image(images, extents, *statistics(self._context.normalisation, images.device))
        values: dict[p.Value, Tensor] = {}
        for index, step in enumerate(self._plan.steps):
            inputs = [values[value] for value in step.inputs] or [images]
            own = self._run(step, size)(inputs, [], None, False)
            assert own is not None
            values[step.output] = own
            if step.output.index in wanted:
                yield step.output.index, own
            values = {value: x for value, x in values.items() if self._last_uses.get(value, -1) > index}

    def _run(self, step: p.Step, size: Size) -> Run:
        found = algorithms(step, size, self._context, Packed())
        plain = next(one for one in found if one.name in (self._context.library, "torch"))
        return plain.prepare()
