"""The published models by name."""

from __future__ import annotations

import pytest
import torch

import shelfkern.nn
from shelfkern.nn import create_model, list_models


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
