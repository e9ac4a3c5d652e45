"""`shelfkern segment`: images and videos to overlays and labels."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from .. import visualise
from ..engine import FastShelfNet
from ..files import replacing
from ..nn import ShelfNet
from . import inputs
from .options import (
    BACKEND_HELP,
    BACKENDS,
    BUNDLED,
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    MODEL_HELP,
    MODELS,
    SIZE_HELP,
    TUNE_HELP,
    Eager,
    Predictor,
    Size,
    make_fast,
    open_model,
    open_saved,
)
from .progress import counted_images, progress_bar


def _count_classes(model: ShelfNet | FastShelfNet) -> int:
    return model.plan.num_classes if isinstance(model, FastShelfNet) else model.config.num_classes


class Segmenter:
    """A network, with the names and colours of its classes."""

    def __init__(
        self,
        model: ShelfNet | FastShelfNet,
        fast: Predictor,
        size: tuple[int, ...] | None,
        device: str = "cpu",
    ) -> None:
        count = _count_classes(model)
        self.fast = fast
        self.size = size
        self.device = device
        self.normalisation = model.normalisation
        self.classes = list(model.classes or (f"class {index}" for index in range(count)))
        self.palette = list(model.palette or visualise.default_palette(count))

    def labels(self, images: Iterable[Image.Image]) -> Iterator[tuple[Image.Image, np.ndarray]]:
        """Every image with its labels (H, W) uint8, at the image's own size."""
        waiting: collections.deque[Image.Image] = collections.deque()

        def frames() -> Iterator[np.ndarray]:
            for image in images:
                waiting.append(image)
                yield np.array(inputs.resized(image, self.size))

        for found in self.fast.predict_frames(frames()):
            image, labels = waiting.popleft(), found.numpy()
            if labels.shape[::-1] != image.size:
                labels = np.asarray(Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST))
            yield image, labels

    def scores(self, image: Image.Image) -> np.ndarray:
        """Scores (classes, h, w) float32 at the size that the network sees."""
        pixels = self.normalisation(np.asarray(inputs.resized(image, self.size)))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return self.fast(x.to(self.device))[0].float().cpu().numpy()

    def overlay(self, image: Image.Image, labels: np.ndarray) -> Image.Image:
        """The painted image with its legend."""
        return visualise.overlay(image, labels, self.palette, self.classes)


@dataclasses.dataclass
class Names:
    """Output names: those of the inputs, in the same place below `folder`, numbered where they collide."""

    folder: Path
    taken: set[Path] = dataclasses.field(default_factory=set)

    def base(self, name: Path) -> Path:
        """Path without suffixes for an input's results; its folder exists afterwards.

        Raises:
            click.ClickException: `folder` cannot be made; one sentence.
            OSError: a folder below it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.ClickException(f"--output {self.folder} cannot be made: {error.strerror}") from error
        plain = self.folder / name.with_suffix("")
        base, number = plain, 2
        while base in self.taken:
            base, number = plain.with_name(f"{plain.name}-{number}"), number + 1
        self.taken.add(base)
        base.parent.mkdir(parents=True, exist_ok=True)
        return base


def segment_image(segmenter: Segmenter, path: Path, base_of: Callable[[], Path], save_scores: bool) -> int:
    """Writes an image's overlay, labels and perhaps scores; returns the number of images, 1.

    Args:
        base_of: returns what `Names.base` does; called once the image has been read.
    """
    ((image, labels),) = segmenter.labels([inputs.read_image(path)])
    base = base_of()
    _save_png(segmenter.overlay(image, labels), base.with_name(f"{base.name}_overlay.png"))
    _save_png(visualise.label_image(labels, segmenter.palette), base.with_name(f"{base.name}_labels.png"))
    if save_scores:
        with replacing(base.with_name(f"{base.name}_scores.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, segmenter.scores(image))
    return 1


def _save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def segment_video(segmenter: Segmenter, path: Path, base_of: Callable[[], Path]) -> int:
    """Writes a video with every frame painted; returns the number of frames.

    Args:
        base_of: as of `segment_image`.
    """
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV: pip install 'shelfkern[video]'") from None
    try:
        with av.open(str(path)) as source:
            if not source.streams.video:
                raise ValueError("it has no video stream")
            base = base_of()
            with (
                replacing(base.with_name(f"{base.name}_overlay.mp4")) as temporary,
                av.open(str(temporary), "w", format="mp4") as target,
            ):
                return _encode(segmenter, source, target, av)
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from error


def frame_rate(rate: Fraction | None) -> Fraction:
    """The rate nearest to a video's that MPEG-4 can hold: its numerator has 16 bits. 25 where unknown."""
    if not rate or not 1 <= rate <= 1000:
        return Fraction(25)
    return rate.limit_denominator(min(1001, int(65535 / rate)))


def _encode(segmenter: Segmenter, source: Any, target: Any, av: Any) -> int:
    rate = frame_rate(source.streams.video[0].average_rate)
    stream, count = None, 0
    frames = source.decode(video=0)
    images = (frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True) for frame in frames)
    for image, labels in segmenter.labels(images):
        painted = visualise.blend(image, labels, segmenter.palette, 0.55)
        # Chroma subsampling needs even sides.
        painted = painted.crop((0, 0, painted.width // 2 * 2, painted.height // 2 * 2))
        if stream is None:
            stream = target.add_stream("mpeg4", rate=rate)
            stream.width, stream.height, stream.pix_fmt = painted.width, painted.height, "yuv420p"
            stream.bit_rate = 8_000_000
        target.mux(stream.encode(av.VideoFrame.from_image(painted)))
        count += 1
    if stream is None:
        raise ValueError("it has no frames")
    target.mux(stream.encode())
    return count


def _tracked(jobs: list[tuple[Path, Path]], done: list[int]) -> Iterator[tuple[Path, Path]]:
    """The jobs, with a progress bar that shows images per second."""
    with progress_bar("segmenting") as show:
        for index, job in enumerate(jobs):
            yield job
            show(index + 1, len(jobs), done[0])


def _segmenter(
    weights: str,
    model: str | None,
    size: tuple[int, ...] | None,
    device: str,
    dtype: str | None,
    backend: str,
    tune: bool,
) -> Segmenter:
    if tune and backend == "eager":
        raise click.ClickException("--tune is for accelerated networks, --backend is eager")
    saved = open_saved(weights, device, backend, tune, model=model, dtype=dtype)
    network = open_model(weights, model) if saved is None else saved
    count = _count_classes(network)
    if count > 256:
        raise click.ClickException(f"--weights {weights} has {count} classes, label images may have 1 to 256")
    if isinstance(network, FastShelfNet):
        return Segmenter(network, network, size, device)
    dtype = dtype or "float32"
    if backend == "eager":
        if dtype != "float32" or device != "cpu":
            raise click.ClickException("--backend eager runs in float32 on the cpu")
        return Segmenter(network, Eager(network), size, device)
    return Segmenter(network, make_fast(network, dtype, device, backend, tune), size, device)


@click.command(short_help="Segment images, folders and videos.")
@click.argument("paths", nargs=-1, required=True)
@click.option("-o", "--output", default="shelfkern_out", type=click.Path(path_type=Path), show_default=True,
              help="Folder for the results.")  # fmt: skip
@click.option("--weights", default="camvid", show_default=True,
              help=f"Bundled weights ({BUNDLED}), a weights file, or a saved network.")  # fmt: skip
@click.option("--model", type=click.Choice(MODELS), help=MODEL_HELP)
@click.option("--size", type=Size(), help=SIZE_HELP)
@click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help=DTYPE_HELP)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True,
              help=BACKEND_HELP.format("; or the plain model (eager)"))  # fmt: skip
@click.option("--tune", is_flag=True, help=TUNE_HELP)
@click.option("--save-scores", is_flag=True, help="Also write the class scores, as .npy of (classes, H, W).")
def segment(
    paths: tuple[str, ...],
    output: Path,
    save_scores: bool,
    **network: Any,
) -> None:
    """Segments the images and videos in PATHS: files, folders and globs.

    For each image NAME it writes OUTPUT/NAME_overlay.png, with a legend, and NAME_labels.png, whose pixels
    are class indices; for each video NAME_overlay.mp4. Images with a side below 32 pixels are enlarged for
    the network. Files that cannot be read are listed and skipped, and the exit status is then 1.
    """
    segmenter = _segmenter(**network)
    jobs = list(inputs.expand(paths))
    names, failures, done = Names(output), [], [0]
    started = time.monotonic()
    for path, name in _tracked(jobs, done):
        try:
            base_of = functools.partial(names.base, name)
            if inputs.is_video(path):
                done[0] += segment_video(segmenter, path, base_of)
            else:
                done[0] += segment_image(segmenter, path, base_of, save_scores)
        except inputs.SKIPPED as error:
            failures.append(path)
            click.echo(f"{path} is skipped: {inputs.sentence_of(error)}", err=True)
    seconds = time.monotonic() - started
    if done[0]:
        rate = f"{done[0] / seconds:.1f} images/s"
        click.echo(f"{counted_images(done[0])} in {seconds:.1f} s, {rate}, in {output}")
    if failures:
        raise SystemExit(1)
