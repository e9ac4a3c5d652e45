from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor
from torch.nn import functional as F

from shelfkern.nn import ShelfNet, ShelfNetConfig, shelfnet18_lw
from shelfkern.train.losses import (
    PARTS,
    Objective,
    class_weights,
    lovasz_softmax,
    presence_loss,
    shares,
)
from shelfkern.train.recipe import Loss

SMALL = dict(backbone_width=8, widths=(4, 8, 16), head_width=4)


def small(**changes) -> ShelfNet:
    return shelfnet18_lw(3, **{**SMALL, "dropout": 0.0, **changes})


def case(seed: int = 0, n: int = 2, size: tuple[int, int] = (40, 48)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (n, *size), generator=generator, dtype=torch.uint8)
    target[:, :5] = 255
    return torch.randn(n, 3, *size, generator=generator), target


def terms(objective: Objective, *arguments) -> dict[str, Tensor]:
    return dict(zip(PARTS, objective(*arguments), strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("auxiliary", [1.0, 0.5, 0.0])
def test_the_sum_of_cross_entropies_at_full_size(backend: str, auxiliary: float) -> None:
    model = small().train()
    weights = torch.tensor([0.5, 1.0, 2.0])
    images, target = case()
    found = terms(Objective(model, Loss(auxiliary=auxiliary), weights, backend=backend), images, target)
    out = model(images)
    expected = [
        F.cross_entropy(scores, target.long(), weights, ignore_index=255) for scores in (out.scores, *out.aux)
    ]
    assert_allclose(found["main"].detach(), expected[0].detach(), rtol=1e-5)
    assert_allclose(found["auxiliary"].detach(), auxiliary * sum(expected[1:]).detach(), rtol=1e-5)
    assert found["presence"] == found["lovasz"] == 0


def test_the_hardest_pixels_alone() -> None:
    model = small().train()
    images, target = case()
    found = terms(Objective(model, Loss("ohem", threshold=0.3, min_kept=0.01)), images, target)
    losses = F.cross_entropy(model(images).scores, target.long(), ignore_index=255, reduction="none")
    hard = losses[losses > -np.log(0.3)]
    assert 0.01 * target.numel() < len(hard) < target.numel()
    assert_allclose(found["main"].detach(), hard.mean().detach(), rtol=1e-5)


def test_presence_and_lovasz_have_their_weights() -> None:
    config = ShelfNetConfig(3, "resnet18", 4, (4, 8, 16), head_width=4, dropout=0.0)
    model = ShelfNet(config).train()
    images, target = case()
    found = terms(Objective(model, Loss(presence=0.2, lovasz=0.7, lovasz_stride=1)), images, target)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    found = terms(Objective(model, Loss(presence=0.2, lovasz=0.7, lovasz_stride=1)), images, target)
    out = model(images)
    assert_allclose(found["presence"].detach(), 0.2 * presence_loss(out.presence, target).detach(), rtol=1e-5)
    assert_allclose(found["lovasz"].detach(), 0.7 * lovasz_softmax(out.scores, target).detach(), rtol=1e-4)


def test_lovasz_sees_every_third_row_and_column() -> None:
    model = small().eval()
    images, target = case()
    objective = Objective(model, Loss(lovasz=1.0))
    with torch.no_grad():
        found = {float(terms(objective, images, target)["lovasz"]) for _ in range(40)}
        full = model(images)
    offsets = itertools.product(range(3), repeat=2)
    every = [float(lovasz_softmax(full[:, :, y::3, x::3], target[:, y::3, x::3])) for y, x in offsets]
    assert len(found) > 3
    assert all(min(abs(one - other) for other in every) < 1e-5 for one in found)


def test_bfloat16_is_the_networks_alone() -> None:
    model = small().train()
    images, target = case()
    exact = terms(Objective(model, Loss()), images, target)
    found = terms(Objective(model, Loss(), autocast=torch.bfloat16), images, target)
    assert found["main"].dtype is torch.float32
    assert found["main"] != exact["main"]
    assert_allclose(found["main"].detach(), exact["main"].detach(), rtol=0.02)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0])])
def test_shares_make_the_mean_of_parts_that_of_the_whole(weights: Tensor | None) -> None:
    scores, target = torch.randn(4, 3, 6, 7), case(n=4, size=(6, 7))[1]
    target[0] = 255
    target[1, :4] = 255

    def loss(part: slice) -> Tensor:
        return F.cross_entropy(scores[part], target[part].long(), weights, ignore_index=255)

    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]
    own = shares(Loss(), [target[part] for part in parts], weights)
    assert own[0] == 0
    mean = sum(share * loss(part) for share, part in zip(own, parts, strict=True) if share) / own.sum()
    assert_allclose(mean, loss(slice(0, 4)), rtol=1e-5)
    assert shares(Loss("ohem"), [target, target], weights).tolist() == [1, 1]


def test_a_part_without_labels_has_no_loss_but_a_gradient() -> None:
    model = small().train()
    images, target = case()
    found = Objective(model, Loss(), None)(images, torch.full_like(target, 255), 0.0)
    found.sum().backward()
    assert found.tolist() == [0, 0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_presence_by_hand() -> None:
    target = torch.tensor([[[0, 2], [255, 0]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    truth = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert_allclose(presence_loss(logits, target), F.binary_cross_entropy_with_logits(logits, truth))
    with pytest.raises(ValueError, match="presence is above 0, the model has no SE head"):
        presence_loss(None, target)


def jaccard_losses(truth: np.ndarray) -> dict[frozenset[int], float]:
    """1 - |truth and prediction| / |truth or prediction| for every set of wrong pixels."""
    pixels = range(len(truth))
    found = {}
    for count in range(len(truth) + 1):
        for wrong in itertools.combinations(pixels, count):
            predicted = truth.copy()
            predicted[list(wrong)] ^= True
            found[frozenset(wrong)] = 1 - (truth & predicted).sum() / max((truth | predicted).sum(), 1)
    return found


def test_lovasz_is_the_extension_of_the_jaccard_loss() -> None:
    """Its definition: the errors sorted, each times what its pixel adds to the loss of the set before it."""
    scores = torch.randn(1, 3, 1, 5, dtype=torch.float64)
    target = torch.tensor([[[0, 1, 1, 0, 1]]], dtype=torch.uint8)
    probabilities = scores.softmax(1)[0, :, 0].numpy()
    losses = []
    for label in (0, 1):
        truth = target[0, 0].numpy() == label
        errors = np.abs(truth - probabilities[label])
        loss, wrong = 0.0, frozenset()
        of_set = jaccard_losses(truth)
        for pixel in np.argsort(-errors):
            more = wrong | {int(pixel)}
            loss += errors[pixel] * (of_set[more] - of_set[wrong])
            wrong = more
        losses.append(loss)
    assert_allclose(float(lovasz_softmax(scores, target)), np.mean(losses), rtol=1e-12)


def test_lovasz_ignores_and_differentiates() -> None:
    scores = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 4, 5), dtype=torch.uint8)
    target[:, 0] = 255
    assert torch.autograd.gradcheck(lovasz_softmax, (scores, target))
    assert torch.equal(lovasz_softmax(scores, target), lovasz_softmax(scores[:, :, 1:], target[:, 1:]))
    nothing = lovasz_softmax(scores, torch.full_like(target, 255))
    nothing.backward()
    assert nothing == 0 and not scores.grad.any()


def test_perfect_scores_cost_nothing() -> None:
    target = torch.randint(0, 3, (1, 6, 6), dtype=torch.uint8)
    scores = 1e3 * F.one_hot(target.long(), 3).permute(0, 3, 1, 2).double()
    assert lovasz_softmax(scores, target) == 0 and lovasz_softmax(-scores, target) > 0.9


def test_an_average_pixel_weighs_one() -> None:
    frequencies = np.array([0.7, 0.25, 0.05])
    weights = class_weights(frequencies, 1.1).numpy()
    assert_allclose(weights @ frequencies, 1, rtol=1e-6)
    assert_allclose(weights[2] / weights[0], np.log(1.8) / np.log(1.15), rtol=1e-6)
