"""`shelfkern evaluate`: accuracy on a dataset, and predictions for its test server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import distributed, multiprocessing

from ..data import DATASETS, open_dataset
from ..engine import FastShelfNet
from ..evaluate import PROTOCOLS, Evaluation, Protocol
from ..evaluate import evaluate as evaluate_model
from ..evaluate.plot import check_plot, save_confusion
from ..evaluate.submission import KINDS, open_submission
from ..files import replacing
from ..nn import ShelfNet
from ..process_group import process_group
from .options import (
    DEVICE_HELP,
    DTYPE_HELP,
    DTYPES,
    MODEL_HELP,
    MODELS,
    TUNE_HELP,
    check_device,
    make_fast,
    open_model,
    open_saved,
)
from .progress import progress_bar


class Scales(click.ParamType):
    """Numbers separated by commas."""

    name = "scales"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers separated by commas, such as 0.75,1,1.25", param, ctx)


@dataclasses.dataclass(frozen=True)
class Job:
    """What each process needs to evaluate its share of the images."""

    weights: str
    model: str | None
    dataset: str
    data: Path
    split: str
    protocol: Protocol
    device: str
    dtype: str | None
    accelerated: bool
    tune: bool
    batch: int
    workers: int
    submission: str | None
    out: Path | None

    def network(self) -> ShelfNet | FastShelfNet:
        """The model, on its device."""
        saved = open_saved(self.weights, self.device, tune=self.tune, model=self.model, dtype=self.dtype)
        if saved is not None:
            return saved
        if self.tune and not self.accelerated:
            raise click.ClickException("--tune is for accelerated networks, give --accelerate too")
        network, dtype = open_model(self.weights, self.model, "WEIGHTS"), self.dtype or "float32"
        if self.accelerated:
            return make_fast(network, dtype, self.device, tune=self.tune)
        return network.to(self.device, DTYPES[dtype])

    def run(self, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Evaluates this process's share.

        Raises:
            click.ClickException: something does not fit, or cannot be read or written; one sentence.
        """
        try:
            network, data = self.network(), open_dataset(self.dataset, self.data, self.split)
            save = None
            if self.submission is not None and self.out is not None:
                save = open_submission(self.submission, self.out, len(data.classes), self.split)
            return evaluate_model(
                network,
                data,
                self.protocol,
                batch=self.batch,
                workers=self.workers,
                progress=progress,
                save=save,
            )
        except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
            raise click.ClickException(str(error)) from error


def protocol_of(name: str, **changes: Any) -> Protocol:
    """A named protocol with the given changes.

    Raises:
        click.ClickException: they do not fit together; one sentence.
    """
    try:
        given = {field: value for field, value in changes.items() if value is not None}
        return dataclasses.replace(PROTOCOLS[name], **given)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def _joined(job: Job, processes: int) -> Iterator[Job]:
    """Joins torchrun's group of processes, or starts others here; gives this process's job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if job.device == "cuda":
            job = dataclasses.replace(job, device=f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(job.device)
        with process_group("nccl" if job.device.startswith("cuda") else "gloo"):
            yield job
    elif processes > 1:
        with _started(job, processes):
            yield job
    else:
        yield job


@contextlib.contextmanager
def _started(job: Job, processes: int) -> Iterator[None]:
    """Starts processes that each do a share of a job; this one is the first."""
    if job.device != "cpu":
        raise click.ClickException(
            f"--processes is {processes} and --device {job.device}, use torchrun for GPUs"
        )
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        place = (Path(folder, "store"), processes, max(1, threads // processes))
        others = [context.Process(target=_other, args=(rank, *place, job)) for rank in range(1, processes)]
        for other in others:
            other.start()
        try:
            # They end before the group is left, and also where it cannot be joined.
            with _ended(others), _group(0, *place), _ended(others):
                yield
        finally:
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _ended(others: list[SpawnProcess]) -> Iterator[None]:
    """Waits for the other processes, or ends them after an error: leaving the group would wait for them."""
    try:
        yield
        for other in others:
            other.join()
    finally:
        for other in others:
            other.terminate()


def _group(rank: int, store: Path, processes: int, threads: int) -> AbstractContextManager[None]:
    """The group of processes that this command started."""
    torch.set_num_threads(threads)
    shared = distributed.FileStore(str(store), processes)
    return process_group("gloo", store=shared, rank=rank, world_size=processes)


def _other(rank: int, store: Path, processes: int, threads: int, job: Job) -> None:
    """What the other processes do. The first one fails in the same way, and reports why."""
    place = (rank, store, processes, threads)
    with contextlib.suppress(KeyboardInterrupt, click.ClickException), _group(*place):
        job.run()


def _run(job: Job) -> Evaluation:
    """The job with a progress bar, in the first process."""
    if _rank() > 0:
        return job.run()
    with progress_bar("evaluating") as show:
        return job.run(show)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _check_outputs(submission: str | None, out: Path | None, files: dict[str, Path | None]) -> None:
    """Checks before the work that the results can be written."""
    if (submission is None) != (out is None):
        raise click.ClickException("--submission and --out belong together: give both or neither")
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise click.ClickException(f"--{name} {path} cannot be written: {path.parent} is not a folder")
    if files["plot"] is not None:
        try:
            check_plot(files["plot"])
        except (RuntimeError, ValueError) as error:
            raise click.ClickException(str(error)) from error


def _report(found: Evaluation, json_path: Path | None, plot: Path | None) -> None:
    if found.matrix.counts.sum():
        Console().print(found.table())
    click.echo(found.summary())
    try:
        if json_path is not None:
            with replacing(json_path) as temporary:
                temporary.write_text(found.to_json() + "\n")
        if plot is not None:
            save_confusion(found.matrix, found.classes, plot)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    for name, reason in found.skipped:
        click.echo(f"{name} is skipped: {reason}", err=True)


_File = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Measure accuracy on a dataset.")
@click.argument("weights")
@click.option("--model", type=click.Choice(MODELS), help=MODEL_HELP)
@click.option("--dataset", type=click.Choice(list(DATASETS)), required=True, help="Kind of dataset.")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The dataset's root folder.")
@click.option("--split", default="val", show_default=True, help="Split of the dataset.")
@click.option("--protocol", "name", type=click.Choice(list(PROTOCOLS)), default="single", show_default=True,
              help="Evaluation protocol; overridden by --scales, --mirror, --base-size, "
              "--crop-size.")  # fmt: skip
@click.option("--scales", type=Scales(), help="Average over several scales, such as 0.75,1,1.25.")
@click.option("--mirror/--no-mirror", default=None, help="Also average over mirrored images.")
@click.option("--base-size", type=int,
              help="Longer side of the image at scale 1, in pixels; needs --crop-size.")  # fmt: skip
@click.option("--crop-size", type=int,
              help="Side of the sliding windows, in pixels (default: whole images).")  # fmt: skip
@click.option("--boundary", is_flag=True,
              help="Also measure boundary F1, at a tolerance of 0.75 % of the diagonal.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help=DEVICE_HELP)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help=DTYPE_HELP)
@click.option("--accelerate", "accelerated", is_flag=True, help="Evaluate the accelerated model.")
@click.option("--tune", is_flag=True, help=TUNE_HELP)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1),
              help="Images of one size per forward pass; above 1 with --protocol single only.")  # fmt: skip
@click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0),
              help="Processes that read images ahead.")  # fmt: skip
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1),
              help="CPU worker processes (use torchrun for GPUs).")  # fmt: skip
@click.option("--submission", type=click.Choice(KINDS), help="Write predictions for a test server to --out.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for the predictions.")
@click.option("--json", "json_path", type=_File, help="Write all results as JSON.")
@click.option("--plot", type=_File, help="Draw the confusion matrix, as .png, .svg or .pdf.")
def evaluate(
    name: str,
    scales: tuple[float, ...] | None,
    mirror: bool | None,
    base_size: int | None,
    crop_size: int | None,
    boundary: bool,
    processes: int,
    json_path: Path | None,
    plot: Path | None,
    **job: Any,
) -> None:
    """Measures accuracy on a dataset: IoU per class, mIoU, pixel accuracy, boundary F1.

    WEIGHTS is the name of bundled weights, a weights file, or a saved accelerated network. Images that
    cannot be read are listed and skipped, and the exit status is then 1. Under torchrun each process takes
    a share of the images.
    """
    changes = dict(scales=scales, mirror=mirror, base_size=base_size, crop_size=crop_size)
    protocol = protocol_of(name, boundary=boundary, **changes)
    _check_outputs(job["submission"], job["out"], {"json": json_path, "plot": plot})
    if processes == 1:
        check_device(job["device"])
    with _joined(Job(protocol=protocol, **job), processes) as mine:
        found = _run(mine)
        is_first = _rank() == 0
    if is_first:
        _report(found, json_path, plot)
    if found.skipped:
        raise SystemExit(1)
