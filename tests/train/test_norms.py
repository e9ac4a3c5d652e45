"""Norms' statistics taken anew, against torch's own and against means by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from stages import SMALLEST
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from shelfkern.data.dataset import Sample
from shelfkern.nn import ShelfNet, shelfnet18_lw, shelfnet50
from shelfkern.train.norms import estimate_norms
from shelfkern.train.run import normalised


class Frames:
    """Random images, each much darker or lighter than the next."""

    def __init__(self, count: int, sizes: tuple[tuple[int, int], ...] = ((40, 48),)) -> None:
        generator = np.random.default_rng(3)
        self.arrays = [
            generator.integers(0, 60 + 190 * (index % 2), (*sizes[index % len(sizes)], 3), np.uint8)
            for index in range(count)
        ]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        image = Image.fromarray(self.arrays[index])
        return Sample(str(index), image, Image.new("L", image.size))

    def batch(self, indices: list[int], model: ShelfNet) -> Tensor:
        return normalised(torch.from_numpy(np.stack([self.arrays[index] for index in indices])), model)


def network(build=shelfnet18_lw, **changes) -> ShelfNet:
    torch.manual_seed(0)
    fields = SMALLEST if build is shelfnet18_lw else dict(backbone_width=8, widths=[4, 8, 16, 32])
    model = build(5, **{**fields, "dropout": 0.0, **changes}).double().eval()
    for norm in norms_of(model):
        # What is there before must not matter.
        norm.running_mean.fill_(7.0)
        norm.running_var.fill_(9.0)
    return model


def norms_of(model: ShelfNet) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("build", [shelfnet18_lw, shelfnet50])
def test_they_are_those_of_update_bn(build) -> None:
    """Where all batches are alike, and without dropout: of torch's own pass over the same batches."""
    frames, model, expected = Frames(9), network(build), network(build)
    estimate_norms(model, frames, batch=3)
    order = frames.read
    assert sorted(order) == list(range(9)) and order != sorted(order)
    # ShelfNet50's auxiliary head drops whatever its config says.
    for module in expected.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    update_bn([frames.batch(order[start : start + 3], expected) for start in (0, 3, 6)], expected)
    assert_close(model.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-12)


def test_batches_count_by_their_images() -> None:
    """The first norm's, by hand in float64: of five images in batches of two, which are three and two."""
    frames, model = Frames(5), network()
    estimate_norms(model, frames, batch=2)
    with torch.no_grad():
        parts = [model.backbone.conv1(model._prepared(frames.batch(part, model)))
                 for part in (frames.read[:3], frames.read[3:])]  # fmt: skip
    norm = model.backbone.bn1
    assert_close(norm.running_mean, torch.cat(parts).mean((0, 2, 3)), rtol=0, atol=1e-12)
    variances = [part.var((0, 2, 3), correction=1) for part in parts]
    assert_close(norm.running_var, (3 * variances[0] + 2 * variances[1]) / 5, rtol=1e-9, atol=0)
    assert not torch.allclose(norm.running_mean, sum(part.mean((0, 2, 3)) for part in parts) / 2)
    assert norm.num_batches_tracked == 2


def test_dropout_takes_no_part() -> None:
    plain, dropped = network(), network(dropout=0.5)
    before = torch.get_rng_state()
    for model in (plain, dropped):
        estimate_norms(model, Frames(4), batch=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(dropped.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_nothing_else_is_changed() -> None:
    model = network().train()
    model.backbone.eval()
    norms = norms_of(model)
    for index, norm in enumerate(norms):
        norm.momentum = 0.01 * index
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    estimate_norms(model, Frames(4), batch=2)
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in norms] == [0.01 * index for index in range(len(norms))]
    for name, value in model.named_parameters():
        assert torch.equal(value, weights[name]) and value.grad is None and value.requires_grad
    assert not any((norm.running_mean == 7).any() for norm in norms)


def test_progress_counts_the_images() -> None:
    found: list[tuple[int, int]] = []
    estimate_norms(network(), Frames(7), 3, lambda *numbers: found.append(numbers))
    assert found == [(4, 7), (7, 7)]


@pytest.mark.parametrize(
    "frames, batch, message",
    [
        (Frames(4), 1, "^batch is 1, it may be any integer from 2$"),
        (Frames(1), 8, "^source has 1 images, norms need 2 or more$"),
        (Frames(4, ((40, 48), (48, 40))), 4, "^source has images of 40 x 48 and 48 x 40, .* of one size$"),
    ],
)
def test_what_is_refused(frames: Frames, batch: int, message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        estimate_norms(model, frames, batch)
    assert not model.training and all(norm.momentum == 0.1 for norm in norms_of(model))
    for norm in norms_of(model):
        assert (norm.running_mean == 7).all() and (norm.running_var == 9).all()
