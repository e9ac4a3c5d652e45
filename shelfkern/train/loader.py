"""Batches of a run: every choice in them follows from the seed and the step, so that a run can be resumed."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from ..data.dataset import Dataset
from ..data.transforms import Augmentation, mixed
from .recipe import Stage


@dataclasses.dataclass(frozen=True)
class Key:
    """The `position`-th image of a step, of all processes together: which it is, and its random seed."""

    index: int
    seed: tuple[int, int, int]


class Keys:
    """The parts of a run's steps that fall to a process, in order, each a list of `Key`.

    Every image is seen once an epoch, each epoch in an order of its own.
    """

    def __init__(self, stage: Stage, images: int, steps: range, rank: int = 0, count: int = 1) -> None:
        self.stage, self.images, self.steps = stage, images, steps
        self.rank, self.count = rank, count
        self._order = functools.lru_cache(2)(self._new_order)

    def __iter__(self) -> Iterator[list[Key]]:
        parts = self.count * self.stage.accumulate
        size = self.stage.batch // parts
        for step in self.steps:
            for part in range(self.rank, parts, self.count):
                yield [self._key(step, position) for position in range(part * size, (part + 1) * size)]

    def _key(self, step: int, position: int) -> Key:
        epoch, place = divmod(step * self.stage.batch + position, self.images)
        return Key(int(self._order(epoch)[place]), (self.stage.seed, step, position))

    def _new_order(self, epoch: int) -> np.ndarray:
        # Of its own stream: (seed, step, position) seeds the augmentation.
        return np.random.default_rng((self.stage.seed, 77, epoch)).permutation(self.images)


# An augmented image (height, width, 3) and its mask (height, width), both uint8; or why there is none: an
# error raised in a worker would come with the worker's traceback as its text.
Pair = tuple[np.ndarray, np.ndarray] | OSError | ValueError


class Augmented(data.Dataset[Pair]):
    """Augmented images by `Key`.

    Where the augmentation mixes, any image of the source is augmented alike for it.
    """

    def __init__(self, source: Dataset, augmentation: Augmentation) -> None:
        self.source, self.augmentation = source, augmentation

    def __getitem__(self, key: Key) -> Pair:
        try:
            return self._pair(key)
        except (OSError, ValueError) as error:
            return error

    def _pair(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(key.seed)
        image, mask = self._augmented(key.index, rng)
        # Without mixing nothing is drawn for it: such recipes give what they gave before there was any.
        if self.augmentation.mix and rng.random() < self.augmentation.mix:
            other = self._augmented(int(rng.integers(len(self.source))), rng)
            image, mask = mixed(image, mask, *other, rng)
        return image, mask

    def _augmented(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sample = self.source[index]
        return self.augmentation(sample.image, sample.mask, rng)


def batches(
    source: Dataset, stage: Stage, steps: range, rank: int = 0, count: int = 1, workers: int = 0
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The parts of each step that fall to a process.

    Args:
        steps: which to give.
        rank, count: the process and how many there are.
        workers: processes that decode and augment; 0 for this one. It does not change what is given.

    Yields:
        for each step `stage.accumulate` pairs of images (N, h, w, 3) and labels (N, h, w), both uint8.

    Raises:
        OSError, ValueError: as the source, at the step of the sample.
    """
    loader = data.DataLoader(
        Augmented(source, stage.augmentation),
        batch_sampler=Keys(stage, len(source), steps, rank, count),
        num_workers=workers,
        collate_fn=_stacked,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_deaf_to_ctrl_c,
    )
    parts = iter(loader)
    for _ in steps:
        yield [_read(next(parts)) for _ in range(stage.accumulate)]


def _read(part: tuple[Tensor, Tensor] | OSError | ValueError) -> tuple[Tensor, Tensor]:
    if isinstance(part, Exception):
        raise part
    return part


def _deaf_to_ctrl_c(worker: int) -> None:
    # The training process ends its step first, and then its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _stacked(samples: list[Pair]) -> tuple[Tensor, Tensor] | OSError | ValueError:
    pairs = []
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        pairs.append(sample)
    images, labels = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))
