"""Weights files: what is stored, what comes back, and files that do not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from shelfkern.nn import from_weights, save_weights, shipped_weights, transfer_weights, weights
from shelfkern.normalisation import Normalisation

CLASSES = ("sky", "road", "tree", "car", "person")
PALETTE = ((0, 0, 0), (1, 2, 3), (255, 0, 255), (9, 9, 9), (4, 5, 6))


@pytest.fixture
def model(narrow):
    return narrow("shelfnet18_lw")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_float32_round_trip_is_exact(model, path) -> None:
    model.to(memory_format=torch.channels_last)
    save_weights(model, path, dtype=torch.float32)
    again = from_weights(path)
    assert again.config == model.config and not again.training
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


@torch.no_grad()
def test_float16_file_gives_a_float32_model(model, path) -> None:
    save_weights(model, path)
    stored = load_file(path)
    assert stored["backbone.conv1.weight"].dtype == torch.float16
    assert stored["backbone.bn1.running_var"].dtype == torch.float32
    again = from_weights(path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in again.parameters())
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    assert_close(again(image), expected, rtol=0, atol=0.02 * expected.std().item())


def test_names_and_colours_come_back_and_stay(model, path) -> None:
    save_weights(model, path, classes=CLASSES, palette=PALETTE, extra={"mIoU": "61.2"})
    again = from_weights(path)
    for copied in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert (copied.classes, copied.palette) == (CLASSES, PALETTE)
    assert metadata(path)["mIoU"] == "61.2"
    save_weights(again, path)
    assert from_weights(path).palette == PALETTE


def test_normalisation_comes_back(model, path) -> None:
    model = copy.deepcopy(model)
    model.normalisation = Normalisation((0.5, 0.25, 0.125), (1, 2, 3))
    save_weights(model, path)
    assert from_weights(path).normalisation == model.normalisation != Normalisation()


def test_unknown_names_and_colours_are_none(model, path) -> None:
    save_weights(model, path)
    assert from_weights(path).classes is None and from_weights(path).palette is None


def test_building_imports_no_compiler(model, path) -> None:
    save_weights(model, path)
    build = f"import sys, shelfkern; shelfkern.nn.from_weights({str(path)!r})"
    code = f"{build}; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_leaves_the_random_state(model, path) -> None:
    save_weights(model, path)
    before = torch.random.get_rng_state()
    from_weights(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_model_does_not_follow_the_file(model, path) -> None:
    save_weights(model, path, dtype=torch.float32)
    again = from_weights(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(again.backbone.conv1.weight, model.backbone.conv1.weight)


def test_unknown_name_lists_the_shipped(monkeypatch) -> None:
    monkeypatch.setattr(weights, "shipped_weights", lambda: ["camvid", "city"])
    with pytest.raises(FileNotFoundError, match=r"'nosuch' .* nor a shipped name \(camvid, city\)$"):
        from_weights("nosuch")


@pytest.mark.parametrize("name", shipped_weights())
def test_shipped_weights_load(name: str) -> None:
    model = from_weights(name)
    assert len(model.classes) == len(model.palette) == model.config.num_classes
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"classes": ["a"]}, "classes has 1 names, the model has 5 classes"),
        ({"classes": "abcde"}, "classes is 'abcde', it must be a list of names"),
        ({"palette": [(0, 0, 0)]}, "palette has 1 colours, the model has 5 classes"),
        ({"palette": [(0, 0, 256)] * 5}, r"palette has the colour \(0, 0, 256\), it must be \(r, g, b\)"),
        ({"extra": {"config": "x"}}, "extra has the key 'config', it may be any but config, "),
    ],
)
def test_what_does_not_fit_is_not_written(model, path, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        save_weights(model, path, **options)
    assert list(path.parent.iterdir()) == []


def test_overflow_in_half_precision_is_named(model, path) -> None:
    model.head.classify.weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"^head\.classify\.weight reaches 1e\+06, .* ends at 65504$"):
        save_weights(model, path)
    save_weights(model, path, dtype=torch.bfloat16)


def test_an_interrupted_write_leaves_the_old_file(model, path, monkeypatch) -> None:
    save_weights(model, path)
    before = path.read_bytes()

    def half_written(state, temporary, metadata) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_weights(model, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["shelfnet18_lw", "shelfnet50"])
def test_other_classes_get_new_heads(narrow, path, name: str) -> None:
    first = narrow(name)
    first.normalisation = Normalisation((0.5, 0.25, 0.125), (1, 2, 3))
    save_weights(first, path, dtype=torch.float32, classes=CLASSES, palette=PALETTE)
    model = from_weights(path, num_classes=3)
    assert model.config == dataclasses.replace(first.config, num_classes=3) and not model.training
    assert (model.classes, model.palette, model.normalisation) == (None, None, first.normalisation)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    own, stored = model.state_dict(), first.state_dict()
    new = {n for n in own if own[n].shape != stored[n].shape or not torch.equal(own[n], stored[n])}
    assert new == {n for n in own if ".classify." in n}
    assert all(own[n].std() > 0 for n in new if n.endswith("weight"))
    out = model.train()(torch.randn(2, 3, 32, 32))
    assert {scores.shape[1] for scores in (out.scores, *out.aux)} == {3}


def test_the_same_number_of_classes_keeps_all(model, path) -> None:
    save_weights(model, path, dtype=torch.float32, classes=CLASSES)
    before = torch.random.get_rng_state()
    again = from_weights(path, num_classes=5)
    assert torch.equal(torch.random.get_rng_state(), before) and again.classes == CLASSES
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())


def test_other_settings_with_the_files_weights(model, path) -> None:
    save_weights(model, path, dtype=torch.float32, classes=CLASSES)
    again = from_weights(path, aux=False, dropout=0.0, input_scale=2.0, fused=True)
    assert again.config == dataclasses.replace(model.config, aux=False, dropout=0.0, input_scale=2.0)
    assert again.classes == CLASSES and not again.training
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())
    assert type(again.head).__name__ == "FusedConvHead"


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"num_classes": 0}, ValueError, "^num_classes is 0, it may be any integer from 1"),
        ({"depth": None}, TypeError, "depth"),
        ({"widths": (8, 16, 32)}, ValueError, r"has .* of \(24.*\), the model needs it of \(32"),
        ({"backbone": "resnet34"}, ValueError, r"lacks backbone\.layer1\.2.*, the model needs it of"),
        ({"pairs": 1}, ValueError, r"has shelf\.columns\.1.*, which the model does not have"),
        ({"head": "linear"}, ValueError, r"has head\.features.*, which the model does not have"),
    ],
)
def test_changes_that_the_weights_do_not_fit(model, path, changes: dict, error: type, words: str) -> None:
    save_weights(model, path)
    with pytest.raises(error, match=words):
        from_weights(path, **changes)


def test_a_transfer_that_does_not_fit_changes_nothing(narrow, model) -> None:
    other = narrow("shelfnet18_lw", 9, head_width=16)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"^state_dict has head\.features\.conv\.weight of \(8, 8, 3, 3\), the model needs"
    ):
        transfer_weights(other, model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_transfer_names_what_kept_its_values(narrow, model) -> None:
    kept = transfer_weights(narrow("shelfnet18_lw", 9), model.state_dict())
    assert set(kept) == {f"{head}.classify.weight" for head in ("head", "aux_heads.0", "aux_heads.1")}
    assert transfer_weights(narrow("shelfnet18_lw", 5), model.state_dict()) == []


def corrupted(path, **changes: str | None) -> None:
    """Rewrites a weights file with some of its metadata changed, or removed for None."""
    known = metadata(path) | changes
    save_file(load_file(path), path, {key: value for key, value in known.items() if value is not None})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"config": None}, "has no model config in its metadata"),
        ({"config": "{"}, "does not fit its own metadata"),
        ({"config": "[1]"}, "does not fit its own metadata"),
        ({"config": '{"nosuch": 1}'}, "does not fit its own metadata: .*nosuch"),
        ({"config": json.dumps({"num_classes": 5})}, "does not fit its own metadata: state_dict lacks"),
        ({"classes": '["a"]'}, "does not fit its own metadata: classes has 1 names"),
        ({"normalisation": '{"std": [0, 1, 1]}'}, "does not fit its own metadata: normalisation has the std"),
        ({"normalisation": '{"mean": [0.5]}'}, "does not fit its own metadata: normalisation has the mean"),
    ],
)
def test_unfit_files_are_named(model, path, changes: dict, sentence: str) -> None:
    save_weights(model, path, classes=CLASSES)
    corrupted(path, **changes)
    with pytest.raises(RuntimeError, match=sentence) as info:
        from_weights(path)
    assert str(info.value).startswith(str(path)) and "\n" not in str(info.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_files_cut_short_are_named(model, path, keep: int) -> None:
    save_weights(model, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match="is cut short or no safetensors file") as info:
        from_weights(path)
    assert str(info.value).startswith(str(path))
