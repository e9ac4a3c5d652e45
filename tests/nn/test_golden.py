"""The models against the authors' numbers, and against the equations written out a second time."""

from __future__ import annotations

import re

import equations
import numpy as np
import pytest
import torch
from golden import fill
from torch.testing import assert_close

import shelfkern.nn
from shelfkern.nn import ShelfNetOutput


def outputs_in_golden_order(out: ShelfNetOutput) -> list[torch.Tensor]:
    presence = [] if out.presence is None else [out.presence]
    return [out.scores, *presence, *out.aux]


def published_model(name: str, dtype: torch.dtype) -> shelfkern.nn.ShelfNet:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fill.published_state(name).items()}
    model = getattr(shelfkern.nn, name)().to(dtype)
    model.load_state_dict(state)
    return model.eval()


def golden_cases(name: str) -> tuple[np.lib.npyio.NpzFile, set[str]]:
    golden = np.load(fill.FOLDER / f"golden_{name}.npz")
    return golden, {key.partition("_o")[0] for key in golden.files}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("name", ["shelfnet18_lw", "shelfnet50"])
@torch.no_grad()
def test_meets_the_authors_outputs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = published_model(name, dtype)
    golden, cases = golden_cases(name)
    for case in cases:
        image = fill.golden_input(*map(int, re.findall(r"\d+", case))).to(dtype)
        outputs = outputs_in_golden_order(model.forward_heads(image))
        assert {f"{case}_o{i}_val" for i in range(len(outputs))} == {k for k in golden.files if "_val" in k}
        for i, output in enumerate(outputs):
            expected = torch.from_numpy(golden[f"{case}_o{i}_val"]).double()
            assert tuple(output.shape) == tuple(golden[f"{case}_o{i}_shape"])
            error = (fill.sampled(output).double() - expected).abs().max()
            assert error <= tolerance * expected.std()
            norm = golden[f"{case}_o{i}_norm"].item()
            assert output.double().norm().item() == pytest.approx(norm, rel=tolerance)
        if dtype is torch.float64:
            labels = outputs[0].argmax(1).flatten().bincount(minlength=outputs[0].shape[1])
            assert labels.tolist() == golden[f"{case}_o0_labelhist"].tolist()


@torch.no_grad()
def test_meets_the_equations(model_name: str) -> None:
    state = {k: v.double() for k, v in fill.published_state(model_name).items()}
    image = fill.golden_input(3, 2, 64, 96).double()
    outputs = outputs_in_golden_order(published_model(model_name, torch.float64).forward_heads(image))
    forward = equations.shelfnet_lw if model_name.endswith("lw") else equations.shelfnet_50
    for output, expected in zip(outputs, forward(state, image), strict=True):
        assert_close(output, expected, rtol=0, atol=1e-11 * expected.std().item())


def test_eval_forward_gives_the_scores_of_all_heads(narrow, model_name: str) -> None:
    model, image = narrow(model_name), torch.randn(2, 3, 64, 32)
    assert torch.equal(model(image), model.forward_heads(image).scores)


@pytest.mark.parametrize(
    "name, millions",
    [("shelfnet18_lw", 14.60), ("shelfnet34_lw", 33.75), ("shelfnet50", 41.10), ("shelfnet101", 60.09)],
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    shapes = fill.published_shapes(name)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    published = sum(np.prod(s) for k, s in shapes.items() if not k.endswith(buffers))
    unused = sum(
        np.prod(s)
        for k, s in shapes.items()
        if not k.endswith(buffers) and ("decoder.inconv." in k or "pretrained.fc." in k)
    )
    with torch.device("meta"):
        model = getattr(shelfkern.nn, name)()
    assert sum(p.numel() for p in model.parameters()) == published - unused
    assert round(published / 1e6, 2) == pytest.approx(millions)
