"""What weights and --model mean to every command that takes them."""

from __future__ import annotations

import functools
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from shelfkern import accelerate, checkpoints
from shelfkern import nn as models
from shelfkern.cli import commands, options
from shelfkern.nn import ShelfNet, save_weights, shelfnet18_lw, shelfnet50

NARROW = {
    "shelfnet18_lw": functools.partial(shelfnet18_lw, backbone_width=4, widths=(4, 8, 12), head_width=4),
    "shelfnet50": functools.partial(shelfnet50, backbone_width=4, widths=(4, 8, 12, 16)),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch) -> None:
    """Published models of a few channels."""

    def create(name: str, num_classes: int | None = None) -> ShelfNet:
        return NARROW[name](**({} if num_classes is None else {"num_classes": num_classes}))

    monkeypatch.setattr(options, "create_model", create)


@pytest.fixture
def bare(tmp_path) -> Path:
    """What `torch.save(model.state_dict())` writes."""
    path = tmp_path / "bare.pth"
    torch.save(NARROW["shelfnet18_lw"](7).state_dict(), path)
    return path


def refused(weights: object, model: str | None) -> str:
    with pytest.raises(click.ClickException) as info:
        options.open_model(str(weights), model)
    assert "\n" not in info.value.message
    return info.value.message


@pytest.mark.parametrize("name", list(NARROW))
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_a_bare_state_dict_of_any_number_of_classes(name: str, suffix: str, tmp_path) -> None:
    model, path = NARROW[name](7).eval(), tmp_path / f"bare{suffix}"
    checkpoints.save(model, path)
    found = options.open_model(str(path), name)
    x = torch.randn(1, 3, 32, 32)
    assert found.config.num_classes == 7 and torch.equal(found(x), model(x)) and not found.training


@pytest.mark.parametrize("name", list(NARROW))
@torch.no_grad()
def test_an_authors_checkpoint_of_any_number_of_classes(name: str, tmp_path) -> None:
    model, path = NARROW[name](7).eval(), tmp_path / "authors.pth"
    checkpoints.save_published(model, path)
    found = options.open_model(str(path), name)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert (found(x) - expected).abs().max() <= 1e-4 * expected.std()


def test_another_model_than_the_state_dicts(bare) -> None:
    assert refused(bare, "shelfnet50").startswith(f"{bare} does not fit --model shelfnet50: state_dict ")


def test_weights_that_name_their_model_take_none(tmp_path) -> None:
    path = tmp_path / "own.safetensors"
    save_weights(NARROW["shelfnet18_lw"](7), path)
    for weights in ("camvid", path):
        assert refused(weights, "shelfnet18_lw") == (
            f"--model is for a bare state dict, --weights {weights} names its own model: leave out --model"
        )
    assert options.open_model(str(path), None).config.num_classes == 7


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_bare_state_dict_alone(suffix: str, bare, tmp_path) -> None:
    path = tmp_path / f"bare{suffix}"
    checkpoints.save(checkpoints.load(bare), path)
    assert refused(path, None) == (
        f"{path}: it cannot be told which model this state dict belongs to; pass --model, or save it with "
        "shelfkern.nn.save_weights"
    )


def test_an_accelerated_network_is_no_models_weights(tmp_path) -> None:
    path = tmp_path / "saved.safetensors"
    accelerate(NARROW["shelfnet18_lw"](7), torch.float32).save(path)
    for model in (None, "shelfnet18_lw"):
        assert refused(path, model).startswith(f"--weights {path} is an accelerated network")


def test_the_licence_of_bundled_weights_is_their_cards(bare, capsys) -> None:
    for name in models.shipped_weights():
        options.tell_licence(name)
        told = capsys.readouterr().out.removeprefix(f"Licence of {name}: ").removesuffix(".\n")
        card = (Path(models.__file__).parents[1] / "weights" / f"{name}.md").read_text()
        assert len(told) > 20 and "\n" not in told and f"## Licence {told}. " in " ".join(card.split())
    options.tell_licence(str(bare))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, said",
    [
        ("segment a.png --model shelfnet50", "--weights camvid names its own model"),
        ("export a.onnx --model shelfnet50", "--weights camvid names its own model"),
        ("evaluate camvid --dataset camvid --data . --model shelfnet50", "WEIGHTS camvid names its own"),
        ("segment a.png --weights {bare}", "pass --model, or save it with"),
        ("evaluate {bare} --dataset camvid --data .", "pass --model, or save it with"),
        ("bench --weights {bare}", "belongs to; save it with shelfkern.nn.save_weights"),
        (
            "bench --weights camvid --model shelfnet50",
            "--model shelfnet50 and --weights camvid exclude each other",
        ),
    ],
)
def test_the_commands_say_so(words: str, said: str, bare, tmp_path, monkeypatch) -> None:
    if words.startswith("export"):
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, words.format(bare=bare).split())
    (line,) = filter(str.strip, result.stderr.splitlines())
    assert result.exit_code == 1 and said in line


def test_segment_with_a_bare_state_dict(bare, tmp_path, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((48, 40), 90).convert("RGB").save("a.png")
    words = ["segment", "a.png", "--weights", str(bare), "--model", "shelfnet18_lw"]
    assert CliRunner().invoke(commands, words).exit_code == 0
    assert Image.open("shelfkern_out/a_labels.png").size == (48, 40)
