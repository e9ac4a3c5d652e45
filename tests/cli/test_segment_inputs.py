"""`shelfkern segment`: pictures of every kind, and those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmenting import assert_labels, complaints, names, picture, results, scores_of

from shelfkern.cli import inputs


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
