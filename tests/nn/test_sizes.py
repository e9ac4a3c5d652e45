"""Any height and width from 32: padded inside, cropped after."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shelfkern.nn import shelfnet18_lw

PUBLISHED_KINDS = ["shelfnet18_lw", "shelfnet50"]


@pytest.mark.parametrize("height, width", [(33, 64), (32, 97), (45, 71), (63, 32)])
@pytest.mark.parametrize("name", PUBLISHED_KINDS)
@torch.no_grad()
def test_odd_sizes_are_padded_and_cropped(narrow, name: str, height: int, width: int) -> None:
    model, image = narrow(name), torch.randn(2, 3, height, width)
    padded = F.pad(image, (0, -width % 32, 0, -height % 32))
    assert padded.shape[2] % 32 == 0 and padded.shape[3] % 32 == 0
    out, expected = model.forward_heads(image), model.forward_heads(padded)
    for a, b in zip((out.scores, *out.aux), (expected.scores, *expected.aux), strict=True):
        assert a.shape == (2, 5, height, width)
        assert torch.equal(a, b[:, :, :height, :width])


@pytest.mark.parametrize("name", PUBLISHED_KINDS)
@torch.no_grad()
def test_multiples_of_32_are_untouched(narrow, name: str) -> None:
    model, image = narrow(name), torch.randn(1, 3, 64, 96)
    levels = model.shelf(model.backbone(image)[-model.config.levels :])
    scores = F.interpolate(model.head(levels[0]), (64, 96), mode="bilinear", align_corners=True)
    assert torch.equal(model(image), scores)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", PUBLISHED_KINDS)
@torch.no_grad()
def test_low_resolution_scores_resized_and_cropped_are_the_outputs(narrow, name: str, train: bool) -> None:
    model, image = narrow(name, dropout=0.0).train(train), torch.randn(2, 3, 45, 71)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    low, full = model.forward_scores(image), model.forward_heads(image)
    assert model.padded_size(image.shape) == (64, 96)
    strides = [4, 16] if name == "shelfnet50" else [8, 16, 32]
    pairs = zip((low.scores, *low.aux), (full.scores, *full.aux), strides, strict=True)
    for small, large, stride in pairs:
        assert small.shape == (2, 5, 64 // stride, 96 // stride)
        resized = F.interpolate(small, (64, 96), mode="bilinear", align_corners=model.align_corners)
        assert torch.equal(resized[:, :, :45, :71], large)
    assert low.presence is full.presence is None or torch.equal(low.presence, full.presence)


def test_padded_size() -> None:
    model = shelfnet18_lw(2, backbone_width=4, widths=(4, 4, 4))
    assert model.padded_size((1, 3, 32, 33)) == (32, 64)
    assert model.padded_size(torch.Size((0, 3, 64, 1025))) == (64, 1056)
    with pytest.raises(ValueError, match="31 x 64 pixels"):
        model.padded_size((1, 3, 31, 64))


@pytest.mark.parametrize("scale, multiple", [(1.6, 20), (2, 16), (1.5, 64), (4 / 3, 24)])
@torch.no_grad()
def test_images_are_padded_then_enlarged(narrow, scale: float, multiple: int) -> None:
    plain, model = narrow("shelfnet18_lw"), narrow("shelfnet18_lw", input_scale=scale)
    model.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 45, 71)
    rows, columns = -(-45 // multiple), -(-71 // multiple)
    size = multiple * rows, multiple * columns
    assert model.padded_size(image.shape) == size
    padded = F.pad(image, (0, size[1] - 71, 0, size[0] - 45))
    seen = tuple(round(scale * extent) for extent in size)
    assert seen[0] % 32 == seen[1] % 32 == 0
    low = plain.coarse_scores(F.interpolate(padded, seen, mode="bilinear"))
    assert torch.equal(model.coarse_scores(image), low)
    scores = F.interpolate(low, size, mode="bilinear", align_corners=True)[:, :, :45, :71]
    assert torch.equal(model(image), scores)
    assert torch.equal(model.forward_heads(image).scores, scores)


def test_an_enlarged_image_reaches_the_loss_at_its_own_size(narrow) -> None:
    model = narrow("shelfnet18_lw", input_scale=1.6).train()
    out = model(torch.randn(2, 3, 45, 71))
    assert [scores.shape for scores in (out.scores, *out.aux)] == [(2, 5, 45, 71)] * 3


@pytest.mark.parametrize("name", PUBLISHED_KINDS)
def test_train_outputs_have_the_inputs_size(narrow, name: str) -> None:
    out = narrow(name).train()(torch.randn(2, 3, 50, 70))
    assert out.scores.shape == (2, 5, 50, 70)
    assert [a.shape for a in out.aux] == [(2, 5, 50, 70)] * (1 if name == "shelfnet50" else 2)
    assert (out.presence is None) if name == "shelfnet18_lw" else (out.presence.shape == (2, 5))


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ((1, 3, 31, 64), "x is 31 x 64 pixels, height and width must be at least 32"),
        ((1, 3, 64, 0), "x is 64 x 0 pixels, height and width must be at least 32"),
        ((1, 4, 64, 64), r"x is \(1, 4, 64, 64\), it must be \(N, 3, H, W\)"),
        ((3, 64, 64), r"x is \(3, 64, 64\), it must be \(N, 3, H, W\)"),
    ],
)
def test_other_inputs_are_refused(narrow, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        narrow("shelfnet18_lw")(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (1, 3, 64, 64)])
@pytest.mark.parametrize("train", [False, True])
def test_raw_images_are_for_predict(narrow, shape: tuple[int, ...], train: bool) -> None:
    model = narrow("shelfnet18_lw").train(train)
    with pytest.raises(
        TypeError, match=r"^x is torch\.uint8, it must be floating \(N, 3, H, W\): predict takes"
    ):
        model(torch.zeros(shape, dtype=torch.uint8))


@torch.no_grad()
def test_empty_batch(narrow) -> None:
    assert narrow("shelfnet18_lw")(torch.zeros(0, 3, 40, 64)).shape == (0, 5, 40, 64)
