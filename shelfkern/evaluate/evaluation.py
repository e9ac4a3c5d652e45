"""Evaluation of a network on a data set, in one process or several."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from ..data.dataset import Dataset
from ..engine import FastShelfNet
from ..nn import ShelfNet
from ..nn.shelfnet import eval_mode
from .boundary import BoundaryF1, kd_tree
from .labels import Labeller
from .metrics import ConfusionMatrix
from .protocol import Protocol

# What a data set raises for files that are missing, damaged, or not what they should be.
UNREADABLE = (OSError, ValueError)


_NAMES = {
    "mean_iou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "boundary_f1": "boundary F1",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
}


@dataclasses.dataclass
class Evaluation:
    """What was measured.

    Attributes:
        matrix: pixels by true and predicted class.
        boundary: the boundary F1 score; None if it was not asked for.
        classes: a name per class.
        protocol: how labels were made.
        images: that were labelled.
        seconds: that it took; of several processes the slowest.
        skipped: name and reason of each image that could not be read.
    """

    matrix: ConfusionMatrix
    boundary: BoundaryF1 | None
    classes: tuple[str, ...]
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    images: int = 0
    seconds: float = 0.0
    skipped: tuple[tuple[str, str], ...] = ()

    def figures(self) -> dict[str, float]:
        """The overall figures by name, as fractions; NaN without labelled pixels."""
        figures = {
            "mean_iou": self.matrix.mean_iou(),
            "pixel_accuracy": self.matrix.pixel_accuracy(),
            "frequency_weighted_iou": self.matrix.frequency_weighted_iou(),
        }
        return figures | ({} if self.boundary is None else {"boundary_f1": self.boundary.mean()})

    def class_figures(self) -> dict[str, np.ndarray]:
        """Figures of every class by name, each (classes,), as fractions; NaN where a class never occurs."""
        figures = {name: getattr(self.matrix, name)() for name in ("iou", "precision", "recall")}
        return figures | ({} if self.boundary is None else {"boundary_f1": self.boundary.f1()})

    def table(self) -> Table:
        """Percentages of every class, its share of the pixels, and the means over classes."""
        figures = self.class_figures()
        counts = self.matrix.counts.sum(1)
        table = Table(title=f"{self.images} images, {_spoken(self.protocol)}")
        table.add_column("")
        for name in ("pixels", *figures):
            table.add_column(
                f"{name.replace('_', ' ').replace('iou', 'IoU').replace('f1', 'F1')} %", justify="right"
            )
        for index, name in enumerate(self.classes):
            share = counts[index] / max(counts.sum(), 1)
            table.add_row(
                name, *(_percent(x) for x in (share, *(column[index] for column in figures.values())))
            )
        table.add_section()
        means = (
            _percent(np.nanmean(column)) if not np.isnan(column).all() else "" for column in figures.values()
        )
        table.add_row("mean", "", *means, style="bold")
        return table

    def summary(self) -> str:
        """One line: mIoU, pixel accuracy, frequency-weighted IoU, boundary F1, images and time."""
        figures = {name: value for name, value in self.figures().items() if not np.isnan(value)}
        parts = [f"{_NAMES[name]} {100 * value:.2f} %" for name, value in figures.items()]
        if not self.matrix.counts.sum():
            parts = ["no labelled pixels"]
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{', '.join(parts)}; {self.images} images{skipped} in {self.seconds:.1f} s"

    def to_json(self) -> str:
        """All of it as JSON, with the figures that follow from it; null for NaN."""
        boundary = self.boundary and {
            "sums": self.boundary.sums.tolist(),
            "images": self.boundary.images.tolist(),
        }
        columns = {name: _nullable(column) for name, column in self.class_figures().items()}
        everything = {
            "figures": dict(zip(self.figures(), _nullable(list(self.figures().values())), strict=True)),
            "by_class": columns,
            "classes": self.classes,
            "protocol": dataclasses.asdict(self.protocol),
            "images": self.images,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "confusion": self.matrix.counts.tolist(),
            "boundary": boundary,
        }
        return json.dumps(everything)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """What `to_json` gave.

        Raises:
            ValueError: it is no JSON of an evaluation.
        """
        try:
            read = json.loads(text)
            protocol = Protocol(**read["protocol"])
            matrix = ConfusionMatrix.of(read["confusion"])
            boundary = None
            if read["boundary"] is not None:
                boundary = BoundaryF1(matrix.num_classes, protocol.tolerance)
                boundary.sums += np.array(read["boundary"]["sums"], float)
                boundary.images += np.array(read["boundary"]["images"], np.int64)
            skipped = tuple((str(name), str(reason)) for name, reason in read["skipped"])
            return cls(
                matrix, boundary, tuple(read["classes"]), protocol, read["images"], read["seconds"], skipped
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"text is no evaluation in JSON: {type(error).__name__} {error}") from error


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.2f}"


def _nullable(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _spoken(protocol: Protocol) -> str:
    scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
    parts = [f"scale {scales}" if len(protocol.scales) == 1 else f"scales {scales}"]
    parts += ["mirrored too"] if protocol.mirror else []
    if protocol.crop_size is not None:
        parts.append(f"windows of {protocol.crop_size} at {protocol.base_size}")
    return ", ".join(parts)


def evaluate(
    model: ShelfNet | FastShelfNet,
    dataset: Dataset,
    protocol: Protocol = Protocol(),  # noqa: B008  # frozen
    *,
    device: torch.device | str | None = None,
    batch: int = 1,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    save: Callable[[str, np.ndarray], None] | None = None,
) -> Evaluation:
    """Labels every image of a data set and compares them with its masks.

    Where torch.distributed is initialised every process must call it: each takes its share of the images,
    and all get the same sums, of which the confusion matrix is exactly that of one process.

    Args:
        model: a ShelfNet, or what `accelerate` gives. It runs in eval mode; afterwards each of its modules
            is in the mode in which it was.
        dataset: images, and masks of class indices with `IGNORE` for what does not count; images of test
            data, whose masks hold nothing else, are labelled for `save`.
        protocol: how labels are made; see `PROTOCOLS` for the usual ones.
        device: where a ShelfNet is moved first; by default it stays where it is.
        batch: images that the network sees at once, at most: neighbours in the data set, of one size. More
            than one needs a protocol that shows it each image once and whole, and gives the same labels, but
            for pixels of which rounding cannot tell two classes apart: a library may choose another
            algorithm for another batch.
        workers: processes that read images ahead; 0 reads them here.
        progress: called after every batch with the images done and those to do, of this process.
        save: called with the name and the labels (H, W) uint8 of every image, such as a submission's.

    An image that cannot be read is left out, and named in `skipped` with the reason.

    Raises:
        TypeError: model is neither of the two.
        ValueError: model and data set have different numbers of classes, there is no image, batch is none or
            does not go with the protocol, or an accelerated model is on another device.
        RuntimeError: no image could be read, or scipy is missing, which the boundary F1 score needs; or as
            the model itself.
    """
    labeller = Labeller(_moved(model, device), protocol)
    _check(labeller, dataset, batch, workers)
    found = _nothing_yet(tuple(dataset.classes), protocol)
    rank, processes = _place()
    share = range(rank, len(dataset), processes)
    began, done = time.monotonic(), 0
    with eval_mode(model):
        for items in _together(_read(dataset, share, workers), batch):
            _take(found, items, labeller, save)
            done += len(items)
            if progress is not None:
                progress(done, len(share))
    found.seconds = time.monotonic() - began
    if processes > 1:
        _gather(found, labeller.device)
    if not found.images:
        name, reason = found.skipped[0]
        raise RuntimeError(f"none of the {len(dataset)} images can be read: {name}: {reason}")
    return found


def _moved(model: ShelfNet | FastShelfNet, device: torch.device | str | None) -> ShelfNet | FastShelfNet:
    if device is None or not isinstance(model, FastShelfNet):
        return model if device is None else model.to(device)
    wanted = torch.device(device)
    if wanted.type != model.device.type or wanted.index not in (None, model.device.index):
        raise ValueError(f"device is {str(wanted)!r}, the accelerated model is on {str(model.device)!r}")
    return model


def _check(labeller: Labeller, dataset: Dataset, batch: int, workers: int) -> None:
    classes = len(dataset.classes)
    if labeller.num_classes != classes:
        raise ValueError(f"model has {labeller.num_classes} classes, dataset has {classes}")
    if not len(dataset):
        raise ValueError("dataset has no images, it must have at least 1")
    if batch < 1:
        raise ValueError(f"batch is {batch}, it may be any integer from 1")
    if batch > 1 and not labeller.protocol.is_plain:
        raise ValueError(f"batch is {batch}, it must be 1 with other scales than 1, mirror images or windows")
    if workers < 0:
        raise ValueError(f"workers is {workers}, it may be any integer from 0")
    if labeller.protocol.boundary:
        kd_tree()


def _nothing_yet(classes: tuple[str, ...], protocol: Protocol) -> Evaluation:
    boundary = BoundaryF1(len(classes), protocol.tolerance) if protocol.boundary else None
    return Evaluation(ConfusionMatrix(len(classes)), boundary, classes, protocol)


@dataclasses.dataclass
class _Item:
    """An image as it was read, uint8 (H, W, 3), and its mask (H, W); or, without them, why it was not."""

    name: str
    pixels: Tensor | None = None
    mask: Tensor | None = None
    error: str = ""

    @property
    def size(self) -> torch.Size | None:
        """Of the image, None without one."""
        return None if self.pixels is None else self.pixels.shape


class _Reader:
    """Part of a data set as arrays, for DataLoader; files that cannot be read give their errors."""

    def __init__(self, dataset: Dataset, share: range) -> None:
        self.dataset, self.share = dataset, share

    def __len__(self) -> int:
        return len(self.share)

    def __getitem__(self, position: int) -> _Item:
        index = self.share[position]
        try:
            sample = self.dataset[index]
            pixels, mask = (torch.from_numpy(np.array(image)) for image in (sample.image, sample.mask))
            return _Item(sample.name, pixels, mask)
        except UNREADABLE as error:
            return _Item(self.dataset.names[index], error=_sentence(error))


def _sentence(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(dataset: Dataset, share: range, workers: int) -> Iterator[_Item]:
    reader: Any = _Reader(dataset, share)
    # Items as they are: images of one batch would need one size. A generator of its own, for the loader draws
    # a seed, and training goes on with the global one.
    loader = DataLoader(
        reader, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
    )
    return iter(loader)


def _as_it_is(item: Any) -> Any:
    return item


def _together(items: Iterator[_Item], batch: int) -> Iterator[list[_Item]]:
    """Neighbours of one size, or that could not be read, up to `batch` of them."""
    group: list[_Item] = []
    for item in items:
        if group and item.size != group[0].size:
            yield group
            group = []
        group.append(item)
        if len(group) == batch:
            yield group
            group = []
    if group:
        yield group


def _take(
    found: Evaluation, items: list[_Item], labeller: Labeller, save: Callable[[str, np.ndarray], None] | None
) -> None:
    """Labels and measures images of one size, or notes those that could not be read."""
    images = [item.pixels.numpy() for item in items if item.pixels is not None]
    if not images:
        found.skipped += tuple((item.name, item.error) for item in items)
        return
    for item, labels in zip(items, labeller.of_batch(np.stack(images)), strict=True):
        assert item.mask is not None
        found.images += 1
        if save is not None:
            save(item.name, labels)
        truth = item.mask.numpy()
        found.matrix.update(truth, labels)
        if found.boundary is not None:
            found.boundary.update(truth, labels)


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _gather(found: Evaluation, device: torch.device) -> None:
    """Sums what the processes found, for all of them."""
    # NCCL sums on GPUs only, gloo on the CPU.
    where = device if distributed.get_backend() == "nccl" else torch.device("cpu")

    def total(values: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(values).to(where)
        distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    found.matrix.counts = total(found.matrix.counts)
    if found.boundary is not None:
        found.boundary.sums = total(found.boundary.sums)
        found.boundary.images = total(found.boundary.images)
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, (found.images, found.seconds, found.skipped))
    found.images = sum(images for images, _, _ in parts)
    found.seconds = max(seconds for _, seconds, _ in parts)
    found.skipped = tuple(sorted(one for _, _, skipped in parts for one in skipped))
