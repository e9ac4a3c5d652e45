"""`shelfkern segment`: videos, and those that cannot be read."""

from __future__ import annotations

import errno
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from segmenting import PALETTE, complaints, names, picture, results, scores_of

from shelfkern import visualise
from shelfkern.cli import segment as command

# The module itself: the package's name for it is the command.
segment_module = sys.modules[command.callback.__module__]


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
    assert result.exit_code == 1 and "a.mkv is skipped: " in result.stderr
    assert "a_overlay.mp4 cannot be written: No space left on device" in result.stderr
    assert names(tmp_path / "out") == set()


def test_videos_without_pyav(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").touch()
    picture(40, 40).save(tmp_path / "b.png")
    result = run(tmp_path / "a.mp4", tmp_path / "b.png")
    assert result.exit_code == 1 and names(tmp_path / "out") == results("b")
    assert "a.mp4 is skipped: videos need PyAV: pip install 'shelfkern[video]'" in result.stderr
