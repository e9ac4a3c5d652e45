"""`shelfkern segment`: every option, and what happens when something is wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from segmenting import CLASSES, CONFIG, PALETTE, assert_labels, complaints, names, picture, results, scores_of

from shelfkern import cli, load, native, visualise
from shelfkern.cli import commands
from shelfkern.nn import ShelfNet, from_weights, save_weights, shipped_weights
from shelfkern.normalisation import Normalisation

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")


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
        assert result.exit_code == 1 and "a.png is skipped: " in result.stderr
        assert "a_overlay.png cannot be written: No space left on device" in result.stderr
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
