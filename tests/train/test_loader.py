"""Which images a step sees, and that only the seed and the step decide."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stages import tiny
from torch import Tensor

from shelfkern.data import open_dataset
from shelfkern.data.dataset import Sample
from shelfkern.data.transforms import Augmentation, mixed
from shelfkern.train.loader import Augmented, Keys, batches


def flat(keys: Keys) -> list[int]:
    return [key.index for part in keys for key in part]


@pytest.mark.parametrize("images, batch", [(4, 2), (5, 2), (5, 7)])
def test_every_image_is_seen_once_an_epoch(images: int, batch: int) -> None:
    seen = flat(Keys(tiny(batch=batch), images, range(6 * images)))
    epochs = [seen[start : start + images] for start in range(0, len(seen) - images + 1, images)]
    assert len(epochs) == 6 * batch
    assert all(sorted(epoch) == list(range(images)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3


def test_a_step_is_the_same_wherever_the_run_begins() -> None:
    whole = list(Keys(tiny(), 5, range(9)))
    assert list(Keys(tiny(), 5, range(4, 9))) == whole[4:]
    assert len({key.seed for part in whole for key in part}) == 18
    assert flat(Keys(tiny(seed=1), 5, range(9))) != flat(Keys(tiny(), 5, range(9)))


@pytest.mark.parametrize("count, accumulate", [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_processes_and_parts_cut_the_same_batch(count: int, accumulate: int) -> None:
    whole = list(Keys(tiny(batch=8), 5, range(3)))
    stage = tiny(batch=8, accumulate=accumulate)
    shared = [list(Keys(stage, 5, range(3), rank, count)) for rank in range(count)]
    for step, expected in enumerate(whole):
        of_step = [parts[step * accumulate : (step + 1) * accumulate] for parts in shared]
        found = [key for index in range(accumulate) for rank in range(count) for key in of_step[rank][index]]
        assert found == expected


Steps = list[list[tuple[Tensor, Tensor]]]


def same(one: Steps, other: Steps) -> bool:
    flat_one, flat_other = ([x for step in steps for part in step for x in part] for steps in (one, other))
    return all(torch.equal(a, b) for a, b in zip(flat_one, flat_other, strict=True))


def test_batches(data) -> None:
    source, stage = open_dataset("camvid", data, "train"), tiny(batch=4, accumulate=2)
    found = list(batches(source, stage, range(3)))
    assert [len(parts) for parts in found] == [2, 2, 2]
    images, labels = found[0][0]
    assert images.shape == (2, 32, 48, 3) and labels.shape == (2, 32, 48)
    assert images.dtype is labels.dtype is torch.uint8
    assert set(labels.unique().tolist()) <= {*range(11), 255} and len(labels.unique()) > 5
    assert same(found, list(batches(source, stage, range(3))))
    assert same(found[1:], list(batches(source, stage, range(1, 3))))
    assert not same(found[:1], found[1:2])


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_workers_change_nothing(mix: float, data) -> None:
    source, stage = open_dataset("camvid", data, "train"), tiny(augmentation=Augmentation((32, 48), mix=mix))
    assert same(list(batches(source, stage, range(3))), list(batches(source, stage, range(3), workers=2)))
    assert len(pickle.dumps(Augmented(source, stage.augmentation))) > 0


def test_an_image_is_cropped_anew_each_time(data) -> None:
    source = open_dataset("camvid", data, "train")
    stage = tiny(batch=4, augmentation=Augmentation((32, 48), scales=(1.5, 2.0)))
    crops = [image for step in batches(source, stage, range(3)) for image in step[0][0]]
    assert len({crop.numpy().tobytes() for crop in crops}) == 12


MIXING = Augmentation((32, 48), scales=(0.75, 1.5), jitter=(0.5, 0.5, 0.5), light=1.0, mix=1.0)


def samples(source, stage) -> list[tuple[np.ndarray, np.ndarray]]:
    images = Augmented(source, stage.augmentation)
    return [images[key] for part in Keys(stage, len(source), range(5)) for key in part]


def test_without_mixing_nothing_is_drawn_for_it(data) -> None:
    """The augmentation alone, of the image alone: what recipes gave before there was mixing."""
    source, stage = open_dataset("camvid", data, "train"), tiny(augmentation=replace(MIXING, mix=0.0))
    keys = [key for part in Keys(stage, len(source), range(5)) for key in part]
    for key, found in zip(keys, samples(source, stage), strict=True):
        sample, rng = source[key.index], np.random.default_rng(key.seed)
        assert all(map(np.array_equal, found, stage.augmentation(sample.image, sample.mask, rng)))


def test_mixing_draws_after_the_augmentation(data) -> None:
    """By hand: whether, which other image, its augmentation, and its classes, from one generator in turn."""
    source, stage = open_dataset("camvid", data, "train"), tiny(augmentation=replace(MIXING, mix=0.6))
    keys = [key for part in Keys(stage, len(source), range(5)) for key in part]
    outcomes = set()
    for key, found in zip(keys, samples(source, stage), strict=True):
        rng = np.random.default_rng(key.seed)
        expected = stage.augmentation(source[key.index].image, source[key.index].mask, rng)
        outcomes.add(mixes := rng.random() < 0.6)
        if mixes:
            other = source[int(rng.integers(len(source)))]
            expected = mixed(*expected, *stage.augmentation(other.image, other.mask, rng), rng)
        assert all(map(np.array_equal, found, expected))
    assert outcomes == {False, True}


class Plain:
    """Four images, each of its own red and its own two classes, side by side."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        mask = Image.fromarray(np.repeat(np.uint8([[2 * index, 2 * index + 1]]), 24, 1).repeat(32, 0))
        return Sample(str(index), Image.new("RGB", (48, 32), (60 * index, 0, 0)), mask)


def test_what_mixing_brings_in_is_of_another_image() -> None:
    stage = tiny(augmentation=Augmentation((32, 48), mix=1.0))
    others = 0
    for image, labels in samples(Plain(), stage):
        assert np.array_equal(image[..., 0], 60 * (labels // 2)) and not image[..., 1:].any()
        shown = set(np.unique(labels // 2).tolist())
        assert len(shown) <= 2
        others += len(shown) == 2
    # One in four takes of the image itself.
    assert 4 <= others <= 10


def test_mixing_is_the_same_wherever_the_run_begins(data) -> None:
    source, stage = open_dataset("camvid", data, "train"), tiny(augmentation=MIXING)
    whole = list(batches(source, stage, range(4)))
    assert same(whole[2:], list(batches(source, stage, range(2, 4))))
    assert not same(whole, list(batches(source, tiny(augmentation=replace(MIXING, mix=0.0)), range(4))))
