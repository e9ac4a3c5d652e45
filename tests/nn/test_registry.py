"""The published models by name."""

from __future__ import annotations

import pytest
import torch

import shelfkern.nn
from shelfkern.nn import create_model, from_weights, list_models, save_weights


def test_the_names_are_the_functions() -> None:
    assert list_models() == ("shelfnet18_lw", "shelfnet34_lw", "shelfnet50", "shelfnet101")
    with torch.device("meta"):
        for name in list_models():
            assert create_model(name).config == getattr(shelfkern.nn, name)().config
            changed = create_model(name, 7, dropout=0.5).config
            assert changed == getattr(shelfkern.nn, name)(7, dropout=0.5).config
            assert (changed.num_classes, changed.dropout) == (7, 0.5)


def test_a_created_model_is_as_built_by_hand(model_name: str) -> None:
    with torch.device("meta"):
        model = create_model(model_name, fused=True)
    assert model.training and type(model.backbone).__name__ == "FusedResNet"


def test_unknown_names_and_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^name is 'shelfnet18', it may be one of shelfnet18_lw, "):
        create_model("shelfnet18")
    with pytest.raises(TypeError, match="depth"):
        create_model("shelfnet50", depth=3)
    with pytest.raises(ValueError, match="num_classes is 0, it may be any integer from 1"):
        create_model("shelfnet50", 0)


@pytest.fixture
def five(narrow, tmp_path) -> str:
    """A file of a narrow ShelfNet18-lw of five classes."""
    save_weights(narrow("shelfnet18_lw"), tmp_path / "five.safetensors", classes=tuple("abcde"))
    return str(tmp_path / "five.safetensors")


def test_a_created_model_has_the_weights_widths(five: str) -> None:
    model, stored = create_model("shelfnet18_lw", weights=five), from_weights(five)
    assert model.config == stored.config and model.classes == tuple("abcde") and not model.training
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in model.state_dict().items())
    other = create_model("shelfnet18_lw", 9, five, fused=True, dropout=0.5)
    assert (other.config.num_classes, other.config.dropout, other.classes) == (9, 0.5, None)
    assert torch.equal(other.backbone.conv1.weight, stored.backbone.conv1.weight)
    assert type(other.backbone).__name__ == "FusedResNet"


def test_weights_of_another_model_are_refused(five: str) -> None:
    with pytest.raises(ValueError, match=r"five.* has backbone 'resnet18', shelfnet34_lw has 'resnet34'$"):
        create_model("shelfnet34_lw", weights=five)
    with pytest.raises(FileNotFoundError, match="weights 'nosuch'"):
        create_model("shelfnet18_lw", weights="nosuch")
