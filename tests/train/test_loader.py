"""Which images a step sees, and that only the seed and the step decide."""

from __future__ import annotations

import pickle

import pytest
import torch
from stages import tiny
from torch import Tensor

from shelfkern.data import open_dataset
from shelfkern.data.transforms import Augmentation
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


def test_workers_change_nothing(data) -> None:
    source, stage = open_dataset("camvid", data, "train"), tiny()
    assert same(list(batches(source, stage, range(3))), list(batches(source, stage, range(3), workers=2)))
    assert len(pickle.dumps(Augmented(source, stage.augmentation))) > 0


def test_an_image_is_cropped_anew_each_time(data) -> None:
    source = open_dataset("camvid", data, "train")
    stage = tiny(batch=4, augmentation=Augmentation((32, 48), scales=(1.5, 2.0)))
    crops = [image for step in batches(source, stage, range(3)) for image in step[0][0]]
    assert len({crop.numpy().tobytes() for crop in crops}) == 12
