"""`shelfkern evaluate`: accuracy on a data set, and predictions for its test server."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
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
from .options import (
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
    """Numbers between commas."""

    name = "scales"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be numbers between commas, such as 0.75,1,1.25", param, ctx)


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process needs to know to do its share."""

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
    """The protocol of a name, with what was asked for otherwise.

    Raises:
        click.ClickException: they do not go together; one sentence.
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
        distributed.init_process_group("nccl" if job.device.startswith("cuda") else "gloo")
        try:
            yield job
        finally:
            distributed.destroy_process_group()
    elif processes > 1:
        with _started(job, processes):
            yield job
    else:
        yield job


@contextlib.contextmanager
def _started(job: Job, processes: int) -> Iterator[None]:
    """Processes that each do a share of a job, this one being the first."""
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
            _join(0, *place)
            yield
            for other in others:
                other.join()
        finally:
            for other in others:
                other.terminate()
            if distributed.is_initialized():
                distributed.destroy_process_group()
            torch.set_num_threads(threads)


def _join(rank: int, store: Path, processes: int, threads: int) -> None:
    torch.set_num_threads(threads)
    shared = distributed.FileStore(str(store), processes)
    distributed.init_process_group("gloo", store=shared, rank=rank, world_size=processes)


def _other(rank: int, store: Path, processes: int, threads: int, job: Job) -> None:
    """What the other processes do. The first one fails as they do, and says why."""
    with contextlib.suppress(KeyboardInterrupt, click.ClickException):
        _join(rank, store, processes, threads)
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
    """Says before the work what could not be written after it."""
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


@click.command()
@click.argument("weights")
@click.option("--model", type=click.Choice(MODELS), help=MODEL_HELP)
@click.option("--dataset", type=click.Choice(list(DATASETS)), required=True)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The data set's root folder.")
@click.option("--split", default="val", show_default=True)
@click.option("--protocol", "name", type=click.Choice(list(PROTOCOLS)), default="single", show_default=True,
              help="How labels are made; the next four change it.")  # fmt: skip
@click.option("--scales", type=Scales(), help="Such as 0.75,1,1.25.")
@click.option("--mirror/--no-mirror", default=None, help="Whether also of mirror images.")
@click.option("--base-size", type=int, help="With windows: longer side of the image at scale 1.")
@click.option("--crop-size", type=int, help="Side of the windows; without, the network sees whole images.")
@click.option("--boundary", is_flag=True, help="Also boundary F1 (0.75 % of the diagonal).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help=DTYPE_HELP)
@click.option("--accelerate", "accelerated", is_flag=True, help="Judges the accelerated model.")
@click.option("--tune", is_flag=True, help=TUNE_HELP)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1),
              help="Images of one size that the network sees at once, with --protocol single.")  # fmt: skip
@click.option(
    "--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Read images ahead."
)
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1),
              help="That share the images and the CPU's cores; for GPUs there is torchrun.")  # fmt: skip
@click.option("--submission", type=click.Choice(KINDS), help="Writes predictions for a server to --out.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the predictions.")
@click.option("--json", "json_path", type=_File, help="Writes all figures.")
@click.option("--plot", type=_File, help="Draws the confusion matrix: .png, .svg or .pdf.")
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
    """Measures accuracy on a data set: IoU of every class, mIoU, pixel accuracy, boundary F1.

    WEIGHTS is a shipped name, a weights file, or a file of an accelerated network. Images that cannot be
    read are named and skipped; the exit status is then 1. Under torchrun each process takes a share of the
    images.
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
