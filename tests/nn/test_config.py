"""What a ShelfNet can be built of, its cost, and configurations that are refused."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import shelfkern.nn
from shelfkern.nn import ShelfNet, ShelfNetConfig, shelfnet18_lw, shelfnet34_lw
from shelfkern.nn.backbone import RESNET_STAGES, ResNet

SMALL = ShelfNetConfig(num_classes=5, backbone="resnet18", backbone_width=4, widths=(4, 4, 8))


@pytest.mark.parametrize(
    "name, gmac",
    [("shelfnet18_lw", 12.5), ("shelfnet34_lw", 30.3), ("shelfnet50", 42.1), ("shelfnet101", 61.5)],
)
@torch.no_grad()
def test_published_cost_at_512(name: str, gmac: float) -> None:
    with torch.device("meta"):
        model, image = getattr(shelfkern.nn, name)().eval(), torch.empty(1, 3, 512, 512)
    with FlopCounterMode(display=False) as counter:
        model.forward_heads(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.05)


@pytest.mark.parametrize("name", shelfkern.nn.list_models())
@torch.no_grad()
def test_docstrings_state_parameters_and_cost(name: str) -> None:
    with torch.device("meta"):
        model, image = shelfkern.nn.create_model(name).eval(), torch.empty(1, 3, 512, 512)
    with FlopCounterMode(display=False) as counter:
        model(image)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    used = sum(size for n, size in sizes.items() if not n.startswith(("aux_heads.", "presence_head.")))
    parameters, cost = f"{sum(sizes.values()) / 1e6:.1f} M", counter.get_total_flops() / 2e9
    stated = f"{parameters} parameters, {used / 1e6:.1f} M of them used in eval mode; {cost:.1f} GMAC."
    assert stated in getattr(shelfkern.nn, name).__doc__


@pytest.mark.parametrize("backbone", list(RESNET_STAGES))
@torch.no_grad()
def test_every_backbone(backbone: str) -> None:
    with torch.device("meta"):
        full = ShelfNet(ShelfNetConfig(backbone=backbone)).eval()
        assert full(torch.empty(2, 3, 64, 96)).shape == (2, 21, 64, 96)
    model = ShelfNet(dataclasses.replace(SMALL, backbone=backbone)).eval()
    assert model(torch.randn(1, 3, 32, 64)).isfinite().all()


@pytest.mark.parametrize(
    "name, parameters",
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032),
     ("resnet101", 44_549_160), ("resnet152", 60_192_808)],
)  # fmt: skip
def test_backbones_have_resnets_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(name)
    classifier = backbone.channels[-1] * 1000 + 1000
    assert sum(p.numel() for p in backbone.parameters()) + classifier == parameters


@pytest.mark.parametrize(
    "levels, merge, pairs, head",
    list(itertools.product((2, 3, 4, 5), ("deconv", "attention"), (1, 2, 3), ("linear", "conv"))),
)
@torch.no_grad()
def test_levels_merges_pairs_and_heads(levels: int, merge: str, pairs: int, head: str) -> None:
    widths = (4, 6, 8, 10, 12)[:levels]
    config = dataclasses.replace(SMALL, widths=widths, merge=merge, pairs=pairs, head=head)
    out = ShelfNet(config).eval().forward_heads(torch.randn(2, 3, 64, 32))
    expected_aux = 1 if head == "linear" else min(2, levels - 1)
    assert out.scores.shape == (2, 5, 64, 32) and out.presence.shape == (2, 5)
    assert [a.shape for a in out.aux] == [out.scores.shape] * expected_aux


@pytest.mark.parametrize("head", ["linear", "conv"])
def test_heads_can_be_left_out(head: str) -> None:
    model = ShelfNet(dataclasses.replace(SMALL, head=head, aux=False, presence=False)).train()
    out = model(torch.randn(2, 3, 32, 64))
    assert out.aux == () and out.presence is None
    assert not any(name.startswith(("aux", "presence")) for name in model.state_dict())


def test_every_parameter_gets_a_gradient(narrow, model_name: str) -> None:
    model = narrow(model_name, dropout=0.0).train()
    out = model(torch.randn(2, 3, 64, 64))
    total = out.scores.sum() + sum(a.sum() for a in out.aux)
    (total if out.presence is None else total + out.presence.sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_shared_block_has_one_convolution() -> None:
    block = ShelfNet(SMALL).shelf.columns[0].bottom
    assert [n for n, m in block.named_modules() if isinstance(m, torch.nn.Conv2d)] == ["conv"]


@pytest.mark.parametrize("config", [SMALL, shelfnet18_lw().config, shelfnet34_lw(7).config])
def test_config_survives_json(config: ShelfNetConfig) -> None:
    assert ShelfNetConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_changes_reach_the_config() -> None:
    assert shelfnet34_lw(3, head_width=16, dropout=0.2).config.head_width == 16
    assert shelfkern.nn.shelfnet101(3, backbone="resnet152").config.backbone == "resnet152"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"backbone": "vgg"}, "backbone is 'vgg', it may be one of resnet18, "),
        ({"merge": "sum"}, "merge is 'sum', it may be one of deconv, attention"),
        ({"head": None}, "head is None, it may be one of linear, conv"),
        ({"widths": (4,)}, "widths has 1 levels, it may have 2 to 5"),
        ({"widths": (4,) * 6}, "widths has 6 levels, it may have 2 to 5"),
        ({"widths": (4, 0)}, "widths is 0, it may be any integer from 1"),
        ({"widths": 64}, "widths is 64, it may be 2 to 5 integers"),
        ({"num_classes": 0}, "num_classes is 0, it may be any integer from 1"),
        ({"num_classes": 2.5}, "num_classes is 2.5, it may be any integer from 1"),
        ({"num_classes": True}, "num_classes is True, it may be any integer from 1"),
        ({"widths": (4, True)}, "widths is True, it may be any integer from 1"),
        ({"dropout": False}, "dropout is False, it may be from 0 up to, not including, 1"),
        ({"negative_slope": True}, "negative_slope is True, it may be any number from 0"),
        ({"input_scale": True}, "input_scale is True, it may be a ratio of integers from 1 to 4 .*"),
        ({"pairs": 0}, "pairs is 0, it may be any integer from 1"),
        ({"dropout": 1.0}, "dropout is 1.0, it may be from 0 up to, not including, 1"),
        ({"dropout": "a"}, "dropout is 'a', it may be from 0 up to, not including, 1"),
        ({"negative_slope": -1}, "negative_slope is -1, it may be any number from 0"),
        (
            {"input_scale": 0.5},
            "input_scale is 0.5, it may be a ratio of integers from 1 to 4 with a denom.*",
        ),
        ({"input_scale": 1.01}, "input_scale is 1.01, it may be a ratio .* with a denominator up to 8"),
        ({"input_scale": float("nan")}, "input_scale is nan, it may be a ratio of integers from 1 to 4 .*"),
        ({"input_scale": "2"}, "input_scale is '2', it may be a ratio of integers from 1 to 4 .*"),
        ({"lateral": False}, r"widths is \(4, 4, 8\), without lateral it must be \(8, 16, 32\)"),
    ],
)
def test_refused_configurations(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        ShelfNet(dataclasses.replace(SMALL, **changes))
