"""`shelfkern quantize`: an 8-bit network from images, and what other commands do with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from shelfkern import load
from shelfkern.cli import commands
from shelfkern.nn import ShelfNet, ShelfNetConfig, from_weights, save_weights

CLASSES = ("road", "sky", "tree", "car", "sign")
CONFIG = ShelfNetConfig(
    num_classes=len(CLASSES), backbone="resnet18", backbone_width=4, widths=(4, 8, 12), merge="attention",
    negative_slope=0.01, head="conv", head_width=4, presence=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(ShelfNet(CONFIG), path, classes=CLASSES)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images of two sizes."""
    (tmp_path / "in").mkdir()
    for index in range(6):
        coarse = np.random.default_rng(index).integers(0, 256, (4, 5, 3), np.uint8)
        size = (80, 48) if index % 2 else (64, 48)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(tmp_path / "in" / f"{index}.png")
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "int8.safetensors"


def run(*words: object) -> Result:
    result = CliRunner().invoke(commands, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_file_that_segment_takes(weights, folder, out, tmp_path) -> None:
    result = run("quantize", weights, "--calibration", folder, "--out", out)
    assert result.exit_code == 0 and result.stdout.startswith(f"{out}: int8, calibrated on 6 images, ")
    assert {path.name for path in tmp_path.iterdir()} == {"in", out.name}
    fast = load(out, "cpu")
    assert fast.dtype is torch.int8 and fast.classes == CLASSES
    done = run("segment", folder / "0.png", "--weights", out, "-o", tmp_path / "labels")
    assert done.exit_code == 0, done.stderr
    labels = torch.from_numpy(np.array(Image.open(tmp_path / "labels" / "0_labels.png")))
    image = np.array(Image.open(folder / "0.png"))
    assert torch.equal(labels, fast.predict(torch.from_numpy(image)[None])[0])
    model = from_weights(weights)
    x = torch.from_numpy(model.normalisation(image)).permute(2, 0, 1)[None]
    with torch.no_grad():
        assert (labels == model(x)[0].argmax(0)).float().mean() > 0.9


@pytest.mark.parametrize(
    "options, read",
    [
        (["--images", 3], ["0.png", "2.png", "4.png"]),
        (["--images", 4], ["0.png", "1.png", "3.png", "4.png"]),
        (["--images", 6], [f"{index}.png" for index in range(6)]),
    ],
)
def test_the_images_are_spread_evenly(options: list, read: list, weights, folder, out, monkeypatch) -> None:
    from shelfkern.cli import inputs

    found, read_image = [], inputs.read_image
    monkeypatch.setattr(inputs, "read_image", lambda path: found.append(path.name) or read_image(path))
    (folder / "drive.mp4").touch()
    assert run("quantize", weights, "--calibration", folder, "--out", out, *options).exit_code == 0
    assert found == read


@pytest.mark.parametrize(
    "size, seen", [(None, [(48, 64), (48, 80)]), ("40", [(32, 43), (32, 53)]), ("40x56", [(40, 56)])]
)
def test_size(size: str | None, seen: list, weights, folder, out, monkeypatch) -> None:
    import sys

    from shelfkern.cli import quantize as command

    module, shapes = sys.modules[command.callback.__module__], set()
    accelerate = module.accelerate

    def spy(*args: object, calibration: list, **rest: object):
        shapes.update(tuple(image.shape[1:3]) for image in calibration)
        return accelerate(*args, calibration=calibration, **rest)

    monkeypatch.setattr(module, "accelerate", spy)
    options = ["--size", size] if size else []
    assert run("quantize", weights, "--calibration", folder, "--out", out, *options).exit_code == 0
    assert sorted(shapes) == seen


def test_an_image_that_cannot_be_read(weights, folder, out) -> None:
    (folder / "3.png").write_text("not a picture")
    result = run("quantize", weights, "--calibration", folder / "[34].png", "--out", out)
    assert result.exit_code == 1 and f"{folder / '3.png'} is skipped: cannot identify" in result.stderr
    assert (
        result.stdout.startswith(f"{out}: int8, calibrated on 1 image, ")
        and load(out, "cpu").dtype is torch.int8
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["{weights}", "--calibration", "{folder}/nosuch", "--out", "{out}"],
            "has no image that can be read",
        ),
        (["nosuch", "--calibration", "{folder}", "--out", "{out}"], "weights 'nosuch' is neither a file nor"),
        (["{weights}", "--calibration", "{folder}", "--out", "nosuch/a"], "--out nosuch/a cannot be written"),
        (["{weights}", "--calibration", "{folder}", "--out", "{out}", "--device", "tpu"], "device is 'tpu'"),
        (
            ["camvid", "--calibration", "{folder}", "--out", "{out}", "--model", "shelfnet50"],
            "WEIGHTS camvid names its own model",
        ),
    ],
)
def test_what_cannot_be_done_is_said(words: list, said: str, weights, folder, out) -> None:
    out.write_text("before")
    result = run("quantize", *(word.format(weights=weights, folder=folder, out=out) for word in words))
    assert result.exit_code == 1 and said in result.stderr.splitlines()[-1]
    assert out.read_text() == "before" and result.stdout == ""


def test_a_network_of_8_bits_is_not_quantized_again(weights, folder, out, tmp_path) -> None:
    assert run("quantize", weights, "--calibration", folder, "--out", out).exit_code == 0
    result = run("quantize", out, "--calibration", folder, "--out", tmp_path / "again.safetensors")
    assert result.exit_code == 1 and f"WEIGHTS {out} is an accelerated network" in result.stderr
