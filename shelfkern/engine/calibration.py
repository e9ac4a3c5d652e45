"""Calibration: finding the ranges of a network's activations on images, for 8-bit quantization.

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

# Methods for finding a range, the default first: the smallest error, or the largest absolute value.
METHODS = {torch.int8: ("least_error", "largest"), torch.float8_e4m3fn: ("largest",)}
# Images per run: ranges do not depend on the batching, and memory stays that of one image.
BATCH = 1
# Bins of a histogram: 16 per int8 step. Candidate ranges are multiples of 1 / BINS of the largest value.
BINS = 2048
CANDIDATES = 128
# Values counted at a time, so that temporaries are small compared with an activation.
COUNTED = 1 << 18

Images = Tensor | Iterable[Tensor]


def check_calibration(dtype: torch.dtype, calibration: Images | None) -> None:
    """Raises ValueError unless images are given for an 8-bit dtype, and only then."""
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
    """Ranges of the activations that `quantized` quantizes, over some images.

    The plan runs in float32 through torch's own calls.

    Args:
        plan: plan with floating activations.
        images: representative images, uint8 (N, H, W, 3) or normalised floating (N, 3, H, W), or several
            such batches, whose sizes may differ.
        kind: torch.int8 or torch.float8_e4m3fn.
        normalisation: normalisation of raw images; ImageNet's by default.
        method: "largest": the largest absolute value. For int8 the default is "least_error": the fraction
            of the largest value that minimises the sum of squared errors of clipping and rounding, from a
            histogram. float8 is as precise in a wide range as in a narrow one, so clipping would only lose.
        device: device to run on; by default that of the plan's weights.

    Returns:
        The value that the largest 8-bit value represents, by index of the activation.

    Raises:
        ValueError: there are no images; kind or method is unknown; or an activation is not finite
            or only zeros: the message names its layer.
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
    """uint8 quanta of all activations over some images, found like `calibrate`'s default.

    The uint8 range spans the values on both sides of 0 without their tails: if none are negative, all of it
    is used for positive values.

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
    """Whether images may have been raw uint8 images before they were normalised."""
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
    """Histograms of the activations in `names`, over some images."""
    found = {index: Histogram() for index in names}
    reference = _Reference(_unfused(plan), normalisation, device or plan.steps[0].weights()[0].device)
    count = 0
    for batch in batches:
        count += batch.shape[0]
        for index, x in reference.activations(batch, set(names)):
            # Channels last, the order in memory, so that flattening copies nothing.
            found[index].add(x.movedim(1, -1))
        native.give_back()
    if not count:
        raise ValueError("calibration has no images, it needs at least one")
    return found


def _measured(plan: p.Plan) -> dict[int, str]:
    """Indices of the values to be quantized, and names of the layers that produce them."""
    makers = {step.output.index: step.name for step in plan.steps}
    steps = [plan.steps[index] for index in sorted(coded_steps(plan))]
    found = {step.inputs[0].index: makers[step.inputs[0].index] for step in steps}
    return found | {s.hidden.index: s.name for s in steps if isinstance(s, p.SharedBlockStep)}


def _range(histogram: Histogram, name: str, kind: torch.dtype, method: str) -> float:
    """An activation's range, validated."""
    _check_range(histogram, name)
    return histogram.least_error(LARGEST[kind]) if method == "least_error" else histogram.largest


def _check_range(histogram: Histogram, name: str) -> None:
    if not math.isfinite(histogram.largest):
        raise ValueError(f"the activation of {name!r} is not finite for the images of calibration")
    if histogram.largest == 0:
        raise ValueError(f"the activation of {name!r} is nothing but zeros for the images of calibration")


def batches_of(images: Images) -> Iterator[Tensor]:
    """Splits images into batches of at most `BATCH`.

    Raises:
        TypeError: an item is not a tensor, or has the wrong dtype.
        ValueError: one has the wrong shape.
        ValueError: one has the wrong shape.
    """
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor):
            raise TypeError(f"calibration holds a {type(batch).__qualname__}, it must hold tensors")
        if batch.numel():
            image_size(batch)
            yield from batch.split(BATCH)


class Histogram:
    """Histogram of absolute values, over a range that doubles when necessary.

    Attributes:
        counts: (BINS,) int64, without zeros, which every range represents exactly.
        largest: largest absolute value; not finite once any value was not.
        lowest, highest: smallest and largest value; 0 if all values are on the other side of 0.
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
        # This form of comparison keeps NaN.
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
        """The range whose `codes` steps have the smallest sum of squared errors."""
        return self._least_error(lambda ranges: ranges / codes)

    def quantum(self) -> Quantum:
        """uint8 quantization with the smallest error, for the values within a range on both sides of 0."""

        def spans(ranges: Tensor) -> Tensor:
            return ranges.clamp(max=self.highest) + ranges.clamp(max=-self.lowest)

        largest = self._least_error(lambda ranges: spans(ranges) / 255)
        step = spans(self._float64([largest])).item() / 255
        return Quantum(step, round(min(largest, -self.lowest) / step))

    def _float64(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.counts.device)

    def _least_error(self, steps_of: Callable[[Tensor], Tensor]) -> float:
        """The range with the smallest error, of those whose steps are given."""
        ranges = self.largest * self._float64(range(1, CANDIDATES + 1))[:, None] / CANDIDATES
        steps = steps_of(ranges)
        values = (self._float64(range(BINS)) + 0.5) * self._top / BINS
        # Rounding errors are uniform up to half a step; but values nearest to 0 become 0.
        inside = torch.where(values < steps / 2, values.square(), steps.square() / 12)
        errors = torch.where(values > ranges, (values - ranges).square(), inside)
        return ranges[(errors * self.counts).sum(1).argmin()].item()


def _unfused(plan: p.Plan) -> p.Plan:
    """The plan with shared blocks as two convolutions, so that their intermediate can be observed."""
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
    """Runs a plan through torch's own calls in float32, one activation after the other.

    Weights in the layout of the calls are remade for each batch and step: keeping them would take as much
    memory as the model's weights.
    """

    def __init__(self, plan: p.Plan, normalisation: Normalisation, device: torch.device) -> None:
        gpu = gpu_of(device)
        self._plan, self._last_uses = plan, plan.last_uses()
        self._context = Context(gpu, device, torch.float32, "ieee", normalisation, ours=False)

    @torch.no_grad()
    def activations(self, images: Tensor, wanted: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Index and value of each activation in `wanted`."""
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
