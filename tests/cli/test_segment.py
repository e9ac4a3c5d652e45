"""`shelfkern segment`: every kind of input, every option, and what happens when something is wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from shelfkern import accelerate, cli, load, native, visualise
from shelfkern.cli import commands, inputs
from shelfkern.cli import segment as command
from shelfkern.nn import ShelfNet, ShelfNetConfig, from_weights, save_weights, shipped_weights
from shelfkern.normalisation import Normalisation

CLASSES = ("road", "sky", "tree", "car", "sign")
PALETTE = ((200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200))
CONFIG = ShelfNetConfig(
    num_classes=len(CLASSES),
    backbone="resnet18",
    backbone_width=4,
    widths=(4, 8, 12),
    merge="attention",
    negative_slope=0.01,
    head="conv",
    head_width=4,
    presence=False,
)

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")

# The module itself: the package's name for it is the command.
segment_module = sys.modules[command.callback.__module__]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model = ShelfNet(CONFIG).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(model, path, classes=CLASSES, palette=PALETTE)
    return path


@pytest.fixture(scope="module")
def model(weights) -> ShelfNet:
    return from_weights(weights)


@pytest.fixture
def run(weights, tmp_path):
    """Runs `segment` into tmp_path/out with the tiny weights; anything but an exit is a failure."""

    def run(*args: object, out: Path = tmp_path / "out") -> Result:
        words = ["segment", "--weights", weights, "-o", out, *args]
        result = CliRunner().invoke(commands, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def scores_of(model: ShelfNet, image: Image.Image) -> torch.Tensor:
    mean, std = torch.tensor(model.normalisation.mean), torch.tensor(model.normalisation.std)
    x = torch.from_numpy(np.array(image)).float() / 255
    return model(((x - mean) / std).permute(2, 0, 1)[None])[0]


def assert_labels(path: Path, scores: torch.Tensor) -> None:
    """The argmax, but for pixels whose two best scores are equal up to rounding."""
    best = scores.topk(2, dim=0).values
    clear = (best[0] - best[1] > 1e-3 * scores.std()).numpy()
    labels, expected = np.asarray(Image.open(path)), scores.argmax(0).numpy()
    assert labels.shape == expected.shape and clear.mean() > 0.98
    assert np.array_equal(labels[clear], expected[clear])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def results(*stems: str) -> set[str]:
    return {f"{stem}_{kind}.png" for stem in stems for kind in ("overlay", "labels")}


def complaints(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.strip()]


def test_the_tiny_model_sees_several_classes(model) -> None:
    assert len(scores_of(model, picture()).argmax(0).unique()) >= 3


def test_an_image(run, model, tmp_path) -> None:
    image, out = picture(), tmp_path / "out"
    image.save(tmp_path / "street.png")
    result = run(tmp_path / "street.png", "--save-scores")
    assert result.exit_code == 0 and names(out) == {*results("street"), "street_scores.npy"}
    assert result.stdout.startswith("1 image in ") and str(out) in result.stdout
    scores = scores_of(model, image)
    assert_labels(out / "street_labels.png", scores)
    saved = np.load(out / "street_scores.npy")
    assert saved.dtype == np.float32
    np.testing.assert_allclose(saved, scores, rtol=0, atol=1e-4 * scores.std().item())


def test_the_labels_file_is_painted_with_the_palette(run, tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    run(tmp_path / "a.png")
    labels = Image.open(tmp_path / "out" / "a_labels.png")
    assert labels.mode == "P"
    assert labels.getpalette()[: 3 * len(PALETTE)] == [value for colour in PALETTE for value in colour]


def test_the_overlay_is_the_blend_above_its_legend(run, tmp_path) -> None:
    image, out = picture(200, 80), tmp_path / "out"
    image.save(tmp_path / "a.png")
    run(tmp_path / "a.png")
    overlay = Image.open(out / "a_overlay.png")
    labels = np.asarray(Image.open(out / "a_labels.png"))
    blend = visualise.blend(image, labels, PALETTE, 0.55)
    assert np.array_equal(np.asarray(overlay.crop((0, 0, 200, 80))), np.asarray(blend))
    strip = np.asarray(overlay)[80:].reshape(-1, 3)
    for index, colour in enumerate(PALETTE):
        assert (strip == colour).all(1).any() == (index in labels)


@pytest.mark.parametrize("backend", ["auto", "native", "library", "eager"])
def test_backends_give_the_same_labels(backend: str, run, model, tmp_path) -> None:
    if backend == "native" and native.why_not is not None:
        pytest.skip(f"no native kernels: {native.why_not}")
    image = picture(75, 101, seed=2)
    image.save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--backend", backend).exit_code == 0
    assert_labels(tmp_path / "out" / "a_labels.png", scores_of(model, image))


def test_the_backend_asked_for_is_the_one_that_runs(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(native, "why_not", "it was never compiled")
    picture().save(tmp_path / "a.png")
    result = run(tmp_path / "a.png", "--backend", "native")
    assert result.exit_code == 1 and "it was never compiled" in result.stderr
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "a.png").exit_code == 0


@pytest.mark.parametrize(
    "size, width, height, seen",
    [
        ("64x96", 90, 70, (64, 96)),
        ("96x64", 90, 70, (96, 64)),
        ("48", 90, 70, (37, 48)),
        ("180", 90, 70, (140, 180)),
        ("48", 100, 50, (32, 64)),
        (None, 200, 20, (32, 320)),
    ],
)
def test_size(size, width: int, height: int, seen: tuple, run, model, tmp_path) -> None:
    image, out = picture(width, height), tmp_path / "out"
    image.save(tmp_path / "a.png")
    options = ["--size", size] if size else []
    assert run(tmp_path / "a.png", "--save-scores", "--backend", "eager", *options).exit_code == 0
    scores = scores_of(model, image.resize(seen[::-1], Image.Resampling.BILINEAR))
    saved = np.load(out / "a_scores.npy")
    assert saved.shape == (len(CLASSES), *seen)
    np.testing.assert_allclose(saved, scores, rtol=0, atol=1e-4 * scores.std().item())
    small = Image.fromarray(scores.argmax(0).to(torch.uint8).numpy())
    expected = small.resize((width, height), Image.Resampling.NEAREST)
    assert np.mean(np.asarray(Image.open(out / "a_labels.png")) == np.asarray(expected)) > 0.999


@pytest.mark.parametrize("size", ["16", "64x16", "64x", "x64", "0", "-64", "big", "64x64x64", "64.5"])
def test_wrong_sizes_are_refused(size: str, run, tmp_path) -> None:
    result = run(tmp_path / "a.png", f"--size={size}")
    assert result.exit_code == 2 and f"'{size}' must be" in result.stderr
    assert not (tmp_path / "out").exists()


def test_bfloat16(run, model, tmp_path) -> None:
    image, out = picture(), tmp_path / "out"
    image.save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--dtype", "bfloat16", "--save-scores").exit_code == 0
    scores, saved = scores_of(model, image), torch.from_numpy(np.load(out / "a_scores.npy"))
    assert saved.dtype is torch.float32 and torch.equal(saved, saved.bfloat16().float())
    assert (saved - scores).abs().max() < 0.3 * scores.std()
    labels = torch.from_numpy(np.array(Image.open(out / "a_labels.png")))
    assert (labels == scores.argmax(0)).float().mean() > 0.9


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--backend", "eager", "--dtype", "bfloat16"], "--backend eager runs in float32 on the cpu"),
        (["--device", "cuda"], "device is 'cuda'"),
        (["--dtype", "float16"], "dtype is torch.float16, on a CPU it may be"),
        (["--dtype", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'float16'"),
        (["--backend", "turbo"], "'turbo' is not one of"),
        (["--backend", "eager", "--tune"], "--tune is for accelerated networks, --backend is eager"),
    ],
)
def test_what_cannot_run_is_said(options: list, sentence: str, run, tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    result = run(tmp_path / "a.png", *options)
    assert result.exit_code != 0 and sentence in complaints(result)[-1]
    assert not (tmp_path / "out").exists()


@needs_native
@pytest.mark.parametrize("accelerated", [False, True])
def test_tuning_is_kept(accelerated: bool, run, saved, tmp_path, monkeypatch) -> None:
    tuned = tmp_path / "tuned"
    monkeypatch.setenv("SHELFKERN_CACHE", str(tuned))
    picture(40, 40).save(tmp_path / "a.png")
    options = ["--weights", saved] if accelerated else []
    assert run(tmp_path / "a.png", *options).exit_code == 0 and not tuned.exists()
    assert run(tmp_path / "a.png", *options, "--tune").exit_code == 0
    assert list(tuned.glob("tuning-*.json"))


def test_a_folder(run, tmp_path) -> None:
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    picture().save(tmp_path / "in" / "a.v1.png")
    picture().save(tmp_path / "in" / "deep" / "B.JPG")
    picture().save(tmp_path / "in" / "deep" / "er" / "a.v1.bmp")
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    assert run(tmp_path / "in").exit_code == 0
    assert names(tmp_path / "out") == results("a.v1", "deep/B", "deep/er/a.v1")


def test_a_pattern_and_several_paths(run, tmp_path) -> None:
    for name in ("a1.png", "a2.png", "b.png", "c[1].png", "c1.png"):
        picture(40, 40).save(tmp_path / name)
    assert run(tmp_path / "a*.png", tmp_path / "c[1].png", tmp_path / "b.png").exit_code == 0
    assert names(tmp_path / "out") == results("a1", "a2", "b", "c[1]")


def test_equal_names_do_not_overwrite_each_other(run, model, tmp_path) -> None:
    images = [picture(60, 60, seed) for seed in range(4)]
    (tmp_path / "other").mkdir()
    paths = [tmp_path / name for name in ("a.png", "a-2.png", "a.bmp", "other/a.png")]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    assert run(*paths).exit_code == 0
    stems = ["a", "a-2", "a-3", "a-4"]
    assert names(tmp_path / "out") == results(*stems)
    for image, stem in zip(images, stems, strict=True):
        assert_labels(tmp_path / "out" / f"{stem}_labels.png", scores_of(model, image))


def test_weights_without_names_and_colours(run, tmp_path) -> None:
    save_weights(ShelfNet(CONFIG), tmp_path / "plain.safetensors")
    picture(40, 40).save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--weights", tmp_path / "plain.safetensors").exit_code == 0
    palette = Image.open(tmp_path / "out" / "a_labels.png").getpalette()
    assert palette[:15] == [value for colour in visualise.default_palette(5) for value in colour]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_weights_with_a_normalisation_of_their_own(backend: str, run, weights, tmp_path) -> None:
    image, model = picture(), from_weights(weights)
    model.normalisation = Normalisation((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    save_weights(model, tmp_path / "other.safetensors")
    image.save(tmp_path / "a.png")
    options = ["--weights", tmp_path / "other.safetensors", "--backend", backend, "--save-scores"]
    assert run(tmp_path / "a.png", *options).exit_code == 0
    scores = scores_of(from_weights(tmp_path / "other.safetensors"), image)
    saved = np.load(tmp_path / "out" / "a_scores.npy")
    np.testing.assert_allclose(saved, scores, rtol=0, atol=1e-4 * scores.std().item())
    assert_labels(tmp_path / "out" / "a_labels.png", scores)


# --- pictures of every kind


def upright(path: Path) -> np.ndarray:
    return np.asarray(inputs.read_image(path))


def test_16_bit_pictures_keep_their_upper_half(tmp_path) -> None:
    values = np.arange(0, 65536, 257 * 4, np.uint16)[:64].reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(upright(tmp_path / "a.png"), np.repeat((values // 257)[..., None], 3, 2))


def test_transparency_is_on_white(tmp_path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = [[(10, 20, 30), (255, 255, 255)], [(204, 204, 204)] * 2]
    assert upright(tmp_path / "a.png").tolist() == np.array(expected).tolist()
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "b.png")
    assert (upright(tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize(
    "mode, suffix", [("L", "png"), ("1", "png"), ("CMYK", "tif"), ("F", "tif"), ("P", "gif")]
)
def test_other_modes(mode: str, suffix: str, tmp_path) -> None:
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    image = (
        grey.convert("RGB").convert(mode)
        if mode != "F"
        else Image.fromarray(np.array(grey, np.float32) / 255)
    )
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(upright(tmp_path / f"a.{suffix}"), np.asarray(grey.convert("RGB")))


def test_palettes(tmp_path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert upright(tmp_path / "a.png").tolist() == [[[1, 2, 3], [40, 50, 60]]]
    image.save(tmp_path / "b.png", transparency=1)
    assert upright(tmp_path / "b.png").tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_exif_turns_the_picture(tmp_path) -> None:
    image, exif = picture(60, 40), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(upright(tmp_path / "a.png"), expected)


def test_odd_pictures_through_the_network(run, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 40).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (3, 50)).save(tmp_path / "thin.png")
    Image.fromarray(np.full((40, 60), 4000, np.uint16)).save(tmp_path / "deep.png")
    picture(60, 40).convert("RGBA").save(tmp_path / "clear.png")
    picture(60, 40).convert("L").save(tmp_path / "grey.png")
    sizes = dict(turned=(40, 60), dot=(1, 1), thin=(3, 50), deep=(60, 40), clear=(60, 40), grey=(60, 40))
    assert run(*tmp_path.glob("*.*")).exit_code == 0
    for name, size in sizes.items():
        assert Image.open(tmp_path / "out" / f"{name}_labels.png").size == size
        assert Image.open(tmp_path / "out" / f"{name}_overlay.png").width == size[0]


# --- what cannot be read


def unreadable(folder: Path) -> dict[str, str]:
    """Makes one of each kind; gives the paths with what is said of them."""
    picture().save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "whole.jpg").unlink()
    (folder / "text.png").write_text("not a picture\nat all\n")
    (folder / "empty.png").touch()
    (folder / "hollow").mkdir()
    said = {
        "cut.jpg": "truncated",
        "text.png": "cannot identify",
        "empty.png": "cannot identify",
        "hollow": "it is a folder without images and videos",
        "missing.png": "No such file",
        "no*match.png": "No such file",
        "n" * 300 + ".png": "name too long",
    }
    return {str(folder / name): sentence for name, sentence in said.items()}


def test_unreadable_files_are_named_and_skipped(run, model, tmp_path) -> None:
    said = unreadable(tmp_path)
    picture().save(tmp_path / "good.png")
    paths = list(said)
    result = run(*paths[:3], tmp_path / "good.png", *paths[3:])
    assert result.exit_code == 1 and result.stdout.startswith("1 image in ")
    lines = complaints(result)
    assert len(lines) == len(said)
    for line, (path, sentence) in zip(lines, said.items(), strict=True):
        assert line.startswith(f"{path} is skipped: ") and sentence in line
    assert names(tmp_path / "out") == results("good")
    assert_labels(tmp_path / "out" / "good_labels.png", scores_of(model, picture()))


def test_nothing_to_read_leaves_no_folder(run, tmp_path) -> None:
    for name in ("missing.png", "missing.mp4"):
        result = run(tmp_path / name)
        assert result.exit_code == 1 and result.stdout == "" and not (tmp_path / "out").exists()


def test_an_empty_folder_alone(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "hollow").mkdir()
    result = run(tmp_path / "hollow")
    assert result.exit_code == 1 and f"{tmp_path / 'hollow'} is skipped: it is a folder" in result.stderr
    monkeypatch.chdir(tmp_path / "hollow")
    result = run(".")
    assert result.exit_code == 1 and ". is skipped: it is a folder" in result.stderr


@pytest.mark.parametrize("error", [RuntimeError("damaged"), EOFError("damaged"), MemoryError("damaged")])
def test_whatever_decoders_raise_skips_the_file(error: Exception, run, tmp_path, monkeypatch) -> None:
    read = inputs.read_image

    def fragile(path: Path) -> Image.Image:
        if path.name == "a.png":
            raise error
        return read(path)

    monkeypatch.setattr(inputs, "read_image", fragile)
    for name in ("a.png", "b.png"):
        picture(40, 40).save(tmp_path / name)
    result = run(tmp_path / "a.png", tmp_path / "b.png")
    assert result.exit_code == 1 and complaints(result) == [f"{tmp_path / 'a.png'} is skipped: damaged"]
    assert names(tmp_path / "out") == results("b")


# --- outputs that cannot be written


def test_an_output_that_is_a_file(run, tmp_path) -> None:
    picture(40, 40).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run(tmp_path / "a.png", out=out)
        assert result.exit_code == 1
        assert len(complaints(result)) == 1 and f"--output {out} cannot be made: " in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_leaves_nothing_half_written(run, tmp_path, monkeypatch) -> None:
    picture(40, 40).save(tmp_path / "a.png")

    def save(self: Image.Image, path: Path, *args: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        result = run(tmp_path / "a.png")
        assert result.exit_code == 1 and "a.png is skipped: No space left on device" in result.stderr
        assert names(tmp_path / "out") == set()
    assert run(tmp_path / "a.png", "--save-scores").exit_code == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    monkeypatch.setattr(Image.Image, "save", save)
    assert run(tmp_path / "a.png").exit_code == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before


def test_a_read_only_output(run, tmp_path, monkeypatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    picture(40, 40).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Image.Image, "save", refuse)
    result = run(tmp_path / "a.png")
    assert result.exit_code == 1 and complaints(result) == [
        f"{tmp_path / 'a.png'} is skipped: Permission denied"
    ]
    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run(tmp_path / "a.png", out=tmp_path / "new")
    assert f"--output {tmp_path / 'new'} cannot be made: Permission denied" in result.stderr


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from shelfkern.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
whole, calls = Image.Image.save, []
def save(self, path, *args):
    calls.append(path)
    if len(calls) < 4:
        return whole(self, path, *args)
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGINT)
Image.Image.save = save
main()
"""


def test_control_c(weights, tmp_path) -> None:
    for name in "abc":
        picture(40, 40).save(tmp_path / f"{name}.png")
    words = ["segment", *sorted(tmp_path.glob("*.png")), "--weights", weights, "-o", tmp_path / "out"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGINT == 130
    assert done.stderr.split() == ["interrupted"]
    assert names(tmp_path / "out") == {*results("a"), "b_overlay.png"}
    Image.open(tmp_path / "out" / "b_overlay.png").load()


def test_the_program_around_the_commands(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["shelfkern", "segment"])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 2 and "Missing argument 'PATHS...'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["shelfkern", "--help"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("segment", "bench", "doctor"))


# --- weights


def wrong_weights(folder: Path, weights: Path) -> dict[str, Path]:
    data = weights.read_bytes()
    (folder / "text.safetensors").write_text("not weights\nat all\n")
    (folder / "text.pth").write_text("not weights\nat all\n")
    (folder / "empty.pth").touch()
    (folder / "head.safetensors").write_bytes(data[:200])
    (folder / "cut.safetensors").write_bytes(data[:-1])
    (folder / "folder.pth").mkdir()
    many = ShelfNet(dataclasses.replace(CONFIG, num_classes=300))
    save_weights(many, folder / "many.safetensors")
    return {path.name: path for path in [*folder.iterdir(), folder / "nosuch.safetensors"]}


def test_wrong_weights_are_one_sentence(weights, run, tmp_path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    picture(40, 40).save(tmp_path / "a.png")
    for name, path in wrong_weights(folder, weights).items():
        result = run(tmp_path / "a.png", "--weights", path)
        (line,) = complaints(result)
        assert result.exit_code == 1 and line.startswith("Error: ") and result.stdout == ""
        assert ("many.safetensors has 300 classes" if name == "many.safetensors" else str(path)) in line
        assert not (tmp_path / "out").exists()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A file of the tiny model, accelerated in 8 bits."""
    images = torch.from_numpy(np.stack([np.array(picture(seed=seed)) for seed in range(4)]))
    path = tmp_path / "saved.safetensors"
    accelerate(model, torch.int8, calibration=images).save(path)
    return path


def test_an_accelerated_network(saved, run, tmp_path) -> None:
    image, out = picture(), tmp_path / "out"
    image.save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", "--weights", saved, "--save-scores").exit_code == 0
    labels, fast = Image.open(out / "a_labels.png"), load(saved, "cpu")
    x = torch.from_numpy(np.array(image))[None]
    assert np.array_equal(np.asarray(labels), fast.predict(x)[0])
    assert labels.getpalette()[:15] == [value for colour in PALETTE for value in colour]
    scores = torch.from_numpy(np.load(out / "a_scores.npy"))
    assert (scores.argmax(0) == torch.from_numpy(np.array(labels))).float().mean() > 0.98


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--dtype", "float32"], "--dtype is float32, {} is an accelerated network with its own"),
        (["--model", "shelfnet50"], "--model is shelfnet50, {} is an accelerated network with its own"),
        (["--backend", "eager"], "backend is 'eager', it may be one of"),
        (["--device", "cuda"], "device is 'cuda'"),
    ],
)
def test_what_an_accelerated_network_cannot(options: list, sentence: str, saved, run, tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    result = run(tmp_path / "a.png", "--weights", saved, *options)
    assert result.exit_code == 1 and sentence.format(saved) in complaints(result)[-1]
    assert not (tmp_path / "out").exists()


def test_an_accelerated_network_that_is_cut_short(saved, run, tmp_path) -> None:
    picture().save(tmp_path / "a.png")
    saved.write_bytes(saved.read_bytes()[:-1])
    (line,) = complaints(run(tmp_path / "a.png", "--weights", saved))
    assert line.startswith("Error: ") and str(saved) in line


@pytest.mark.skipif(not shipped_weights(), reason="this tree ships no weights")
def test_the_shipped_weights_with_no_option(tmp_path, monkeypatch) -> None:
    image = picture(128, 96)
    image.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, ["segment", "a.png"])
    assert result.exit_code == 0 and names(tmp_path / "shelfkern_out") == results("a")
    model = from_weights("camvid")
    assert model.classes and model.palette
    assert_labels(tmp_path / "shelfkern_out" / "a_labels.png", scores_of(model, image))


# --- videos


def write_video(
    path: Path, frames: list[Image.Image], rate: Fraction = Fraction(5), codec: str = "ffv1"
) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for image in frames:
            target.mux(stream.encode(av.VideoFrame.from_image(image)))
        target.mux(stream.encode())


def read_video(path: Path) -> tuple[Fraction, list[np.ndarray]]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as source:
        rate = source.streams.video[0].average_rate
        return rate, [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]


def test_a_video(run, model, tmp_path) -> None:
    frames = [picture(65, 49, seed) for seed in range(3)]
    write_video(tmp_path / "drive.mkv", frames)
    result = run(tmp_path / "drive.mkv")
    assert result.exit_code == 0 and result.stdout.startswith("3 images in ")
    assert names(tmp_path / "out") == {"drive_overlay.mp4"}
    rate, painted = read_video(tmp_path / "out" / "drive_overlay.mp4")
    assert rate == 5 and len(painted) == 3
    for image, found in zip(frames, painted, strict=True):
        labels = scores_of(model, image).argmax(0).numpy()
        expected = np.asarray(visualise.blend(image, labels, PALETTE, 0.55))[:48, :64]
        assert found.shape == expected.shape
        # MPEG-4 loses some, most where colours change; a frame of another time would differ by far more.
        assert np.abs(found.astype(int) - expected).mean() < 12


@pytest.mark.parametrize("rate", [Fraction(359550, 11987), Fraction(240000, 1001)])
def test_rates_that_mpeg4_cannot_say(rate: Fraction, run, tmp_path) -> None:
    write_video(tmp_path / "a.mp4", [picture(64, 48)] * 4, rate, "libx264")
    assert run(tmp_path / "a.mp4").exit_code == 0
    found, frames = read_video(tmp_path / "out" / "a_overlay.mp4")
    assert len(frames) == 4 and found == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize(
    "rate", [1, 24, Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001), 240]
)
def test_usual_rates_are_kept(rate: Fraction) -> None:
    assert segment_module.frame_rate(Fraction(rate)) == rate


@pytest.mark.parametrize("rate", [None, Fraction(0), Fraction(1, 10**6), Fraction(10**6)])
def test_senseless_rates_are_replaced(rate: Fraction | None) -> None:
    assert segment_module.frame_rate(rate) == 25


def test_a_video_held_upright(run, tmp_path) -> None:
    write_video(tmp_path / "a.mp4", [picture(64, 48)], codec="libx264")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    identity = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    turned = b"".join(v.to_bytes(4, "big") for v in (0, 1 << 16, 0, 0xFFFF0000, 0, 0, 0, 0, 1 << 30))
    start = data.index(identity, data.index(b"tkhd"))
    data[start : start + len(turned)] = turned
    (tmp_path / "a.mp4").write_bytes(data)
    assert run(tmp_path / "a.mp4").exit_code == 0
    _, (frame,) = read_video(tmp_path / "out" / "a_overlay.mp4")
    assert frame.shape == (64, 48, 3)


def damaged_videos(folder: Path, av) -> list[Path]:
    write_video(folder / "whole.mp4", [picture(64, 48)] * 2, codec="libx264")
    data = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "unknown.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    (folder / "start.mp4").write_bytes(data[:20])
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty.mp4").touch()
    with av.open(str(folder / "sound.mkv"), "w") as target:
        stream = target.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        target.mux(stream.encode(frame))
    return sorted([*folder.iterdir(), folder / "missing.mp4"])


def test_damaged_videos_are_named_and_skipped(run, tmp_path) -> None:
    av = pytest.importorskip("av")
    (tmp_path / "in").mkdir()
    paths = damaged_videos(tmp_path / "in", av)
    picture(40, 40).save(tmp_path / "good.png")
    result = run(*paths, tmp_path / "good.png")
    assert result.exit_code == 1 and names(tmp_path / "out") == results("good")
    lines = [line for line in complaints(result) if " is skipped: " in line]
    assert [line.split(" is skipped: ")[0] for line in lines] == [str(path) for path in paths]
    assert all(line.split(" is skipped: ")[1].strip() for line in lines)
    assert any("sound.mkv is skipped: it has no video stream" in line for line in lines)


def test_a_video_that_ends_badly_leaves_nothing(run, tmp_path, monkeypatch) -> None:
    write_video(tmp_path / "a.mkv", [picture(64, 48)] * 3)
    blend, calls = visualise.blend, []

    def fragile(*args: object) -> Image.Image:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return blend(*args)

    monkeypatch.setattr(visualise, "blend", fragile)
    result = run(tmp_path / "a.mkv")
    assert result.exit_code == 1 and "a.mkv is skipped: No space left on device" in result.stderr
    assert names(tmp_path / "out") == set()


def test_videos_without_pyav(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    picture(40, 40).save(tmp_path / "b.png")
    result = run(tmp_path / "a.mp4", tmp_path / "b.png")
    assert result.exit_code == 1 and names(tmp_path / "out") == results("b")
    assert "a.mp4 is skipped: videos need PyAV: pip install 'shelfkern[video]'" in result.stderr
