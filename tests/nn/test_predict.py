"""Labels from the plain model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shelfkern
from shelfkern.nn import ShelfNet
from shelfkern.normalisation import Normalisation

RAW = torch.randint(0, 256, (2, 45, 71, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def by_hand(model: ShelfNet, raw: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(value) for value in dataclasses.astuple(model.normalisation))
    x = ((raw / 255 - mean) / std).permute(0, 3, 1, 2)
    return model.eval()(x.to(next(model.parameters()).dtype)).argmax(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["shelfnet18_lw", "shelfnet50"])
@torch.no_grad()
def test_labels_are_the_argmax_of_the_scores(narrow, name: str, dtype: torch.dtype) -> None:
    model = narrow(name, input_scale=1.6).to(dtype)
    model.normalisation = Normalisation((0.5, 0.1, 0.9), (0.2, 1.0, 0.5))
    expected = by_hand(model, RAW)
    labels = model.predict(RAW)
    assert labels.dtype is torch.uint8 and labels.shape == (2, 45, 71)
    assert (labels == expected).float().mean() >= 0.999
    x = torch.randn(2, 3, 40, 64)
    assert (model.predict(x) == model(x.to(dtype)).argmax(1)).float().mean() >= 0.999


@torch.no_grad()
def test_labels_are_the_accelerated_networks(narrow) -> None:
    model = narrow("shelfnet18_lw")
    assert (model.predict(RAW) == shelfkern.accelerate(model).predict(RAW)).float().mean() >= 0.999


def test_arrays_and_single_images(narrow) -> None:
    model = narrow("shelfnet18_lw")
    labels = model.predict(RAW)
    read_only = RAW.numpy().copy()
    read_only.flags.writeable = False
    for images in (RAW, RAW.numpy(), read_only):
        assert torch.equal(model.predict(images), labels)
        assert model.predict(images[0]).shape == (45, 71)
    assert model.predict(torch.zeros(0, 32, 40, 3, dtype=torch.uint8)).shape == (0, 32, 40)


def test_modes_statistics_and_gradients_stay(narrow) -> None:
    model = narrow("shelfnet18_lw", dropout=0.5)
    expected = model.predict(RAW)
    model.train()
    model.backbone.bn1.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert torch.equal(model.predict(RAW), expected)
    assert not model.predict(x).requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_come_back_after_an_error(narrow) -> None:
    model = narrow("shelfnet18_lw").train()
    model.head = torch.nn.Identity(0).train()
    model.head.forward = lambda: None
    with pytest.raises(TypeError):
        model.predict(RAW)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "images, error, words",
    [
        (
            RAW.movedim(3, 1),
            ValueError,
            r"images is uint8 \(2, 3, 45, 71\), raw images must be \(N, H, W, 3\)",
        ),
        (RAW.int(), TypeError, "images is torch.int32, it may be uint8"),
        (torch.zeros(1, 3, 31, 64), ValueError, "x is 31 x 64 pixels"),
        (torch.zeros(1, 3, 32, 64, device="meta"), ValueError, "images is on meta, it must be on cpu"),
        ([RAW], TypeError, "images is list, it must be a tensor or a numpy array"),
    ],
)
def test_other_images_are_refused(narrow, images, error: type, words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        narrow("shelfnet18_lw").predict(images)


def test_more_classes_than_labels_hold_are_refused(narrow) -> None:
    with pytest.raises(ValueError, match=r"^num_classes is 257, labels are uint8 and take at most 256: "):
        narrow("shelfnet18_lw", 257).predict(RAW)
    assert narrow("shelfnet18_lw", 256).predict(RAW).shape == (2, 45, 71)
