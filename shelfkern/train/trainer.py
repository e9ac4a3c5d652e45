"""Runs the stages of a recipe: steps, checkpoints, validations, logs."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..data import open_dataset
from ..data.dataset import Dataset, check_labelled
from ..evaluate import Evaluation, evaluate
from ..files import remove_leftovers
from ..nn import save_weights
from .distributed import Processes
from .interrupt import uninterrupted
from .loader import batches
from .logs import Events, Table, Terminal, peak_memory
from .losses import PARTS
from .recipe import Recipe, Stage
from .run import Run, finished

CHECKPOINT, BEST, LAST = "checkpoint.pt", "best.safetensors", "last.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is watched; nothing here changes its weights.

    Attributes:
        out: folder that each stage gets a folder in.
        roots: where each dataset lies.
        every: steps between checkpoints, each with a validation.
        log_every: steps between rows of the log.
        workers: processes that decode and augment images; 0 for the training process.
    """

    out: Path
    roots: Mapping[str, Path]
    every: int = 1000
    log_every: int = 25
    workers: int = 0


def train(recipe: Recipe, options: Options, processes: Processes) -> bool:
    """Runs every stage to its end, from where an earlier run in `options.out` stopped.

    A run that is killed at any point and started again gives the weights and losses of one never stopped.
    Ctrl-C ends it after the step at hand, with a checkpoint where it trains alone; so do errors, but for
    those within a step, after which the last checkpoint stands. Of a finished stage only the checkpoint is
    read: its data need not be there any more.

    Returns:
        whether all validation images could be read. One that could not is named and left out, of the choice
        of the best weights too.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        OSError, RuntimeError, ValueError: data or weights cannot be read, or a checkpoint is of another
            recipe; one sentence.
    """
    start: dict[str, Tensor] | None = None
    whole = True
    for stage in recipe.stages:
        done = finished(options.out / stage.name / CHECKPOINT, stage)
        if done is None:
            training = _Training(stage, options, processes, start)
            done = training.finish()
            whole &= not training.skipped
        start = done
    return whole


class _Training:
    """A stage, its data and its files."""

    def __init__(
        self, stage: Stage, options: Options, processes: Processes, start: dict[str, Tensor] | None
    ) -> None:
        self.stage, self.options, self.processes = stage, options, processes
        data = stage.data
        self.run = Run(stage, open_split(data.dataset, options.roots, data.train), processes, start)
        self.validation: Dataset | None = None
        if data.validation:
            self.validation = open_split(data.dataset, options.roots, data.validation)
            check_labelled(self.validation, "data.validation", data.validation)
        self.folder = options.out / stage.name
        self.checkpoint = self.folder / CHECKPOINT
        # Validation images that could not be read.
        self.skipped: set[str] = set()
        self.in_step = False

    def finish(self) -> dict[str, Tensor]:
        """Trains to the stage's end; gives the averaged weights."""
        run, first = self.run, self.processes.is_first
        self.folder.mkdir(parents=True, exist_ok=True)
        if first:
            remove_leftovers(self.folder)
        if self.checkpoint.exists():
            run.resume(self.checkpoint)
        if run.step < run.steps or run.due:
            with Terminal(run.steps, run.step, speaks=first) as self.terminal:
                if run.step:
                    self.terminal.say(f"{self.stage.name}: going on from step {run.step}")
                self._open_logs()
                try:
                    self._train()
                except BaseException:
                    self._stopped()
                    raise
                finally:
                    self.events.close()
        return run.average.model.state_dict()

    def _open_logs(self) -> None:
        first, step = self.processes.is_first, self.run.step
        # All but the first process write nowhere.
        self.log = Table(self.folder / "train.csv", step) if first else None
        validated = step - 1 if self.run.due else step
        self.validations = Table(self.folder / "validation.csv", validated) if first else None
        self.events = Events(self.folder if first else None, step)

    def _stopped(self) -> None:
        # Processes that train together may be a step apart: their last checkpoint stands. So it does after
        # half a step, which has moved the norms' statistics.
        if self.processes.count > 1 or self.in_step or not self.run.step:
            return
        # What ended the run is to be told, though this may fail by the same.
        with contextlib.suppress(OSError):
            self.run.save(self.checkpoint)
            self.terminal.say(f"stopped at step {self.run.step}; the same command goes on from here")

    def _train(self) -> None:
        run, options, processes = self.run, self.options, self.processes
        steps = range(run.step, run.steps)
        self._restart_clock()
        if run.due:
            with uninterrupted():
                self._keep()
        for batch in batches(run.source, self.stage, steps, processes.rank, processes.count, options.workers):
            with uninterrupted():
                self.in_step = True
                run.advance(batch)
                self.in_step = False
                run.due = run.step % options.every == 0 or run.step == run.steps
                self.terminal.step(run.step)
                if run.step % options.log_every == 0 or run.step == run.steps:
                    self._report()
                if run.due:
                    self._keep()

    def _restart_clock(self) -> None:
        self.clock, self.clock_step = time.monotonic(), self.run.step

    def _report(self) -> None:
        run, stage = self.run, self.stage
        terms = self.processes.sum(run.take_terms()) / self.processes.count
        seconds = time.monotonic() - self.clock
        pace = (run.step - self.clock_step) * stage.batch / seconds
        memory = peak_memory(self.processes.device) / 2**20
        self._restart_clock()
        losses = {"loss": float(terms.sum())} | dict(zip(PARTS, terms.tolist(), strict=True))
        rate = run.optimizer.param_groups[0]["lr"] / run.optimizer.param_groups[0]["factor"]
        speed = {"images_per_second": round(pace, 2), "peak_memory_mib": round(memory)}
        epoch = round(run.step * stage.batch / len(run.source), 3)
        if self.log is not None:
            self.log.append({"step": run.step, "epoch": epoch, "lr": rate, **losses, **speed})
        self.events.add("train", {**losses, "lr": rate, **speed}, run.step)
        self.terminal.report(
            run.step, run.steps, f"loss {losses['loss']:.3f}  {pace:.1f} images/s  {memory:.0f} MiB"
        )

    def _keep(self) -> None:
        """A checkpoint, a validation, the weights as files, and the checkpoint again, which has seen them."""
        run, first = self.run, self.processes.is_first
        self.processes.broadcast(run.average.model.state_dict())
        found = None
        if self.validation is not None:
            if first:
                run.save(self.checkpoint)
            found = evaluate(run.average.model, self.validation, device=self.processes.device)
            self._report_skipped(found)
        if found is not None and found.matrix.mean_iou() > run.best:
            run.best, run.best_step = found.matrix.mean_iou(), run.step
        if first:
            if found is not None:
                self._log_validation(found)
                if run.best_step == run.step:
                    self._export(BEST, found)
            self._export(LAST, found)
        run.due = False
        if first:
            run.save(self.checkpoint)
        self.processes.wait()
        self._restart_clock()

    def _report_skipped(self, found: Evaluation) -> None:
        for name, reason in found.skipped:
            if name not in self.skipped:
                self.terminal.say(f"{name} is skipped: {reason}")
            self.skipped.add(name)

    def _log_validation(self, found: Evaluation) -> None:
        matrix, classes = found.matrix, self.run.source.classes
        numbers = {"miou": matrix.mean_iou(), "pixel_accuracy": matrix.pixel_accuracy()}
        # A class may be called as one of these, or as the step.
        numbers |= {f"iou:{name}": float(iou) for name, iou in zip(classes, matrix.iou(), strict=True)}
        if self.validations is not None:
            rounded = {name: round(value, 4) for name, value in numbers.items()}
            self.validations.append({"step": self.run.step, **rounded})
        self.events.add("validation", numbers, self.run.step)
        without = f", without {len(found.skipped)} skipped" if found.skipped else ""
        self.terminal.say(
            f"step {self.run.step}  validation mIoU {100 * matrix.mean_iou():.2f} %{without}, "
            f"best {100 * self.run.best:.2f} % at step {self.run.best_step}"
        )

    def _export(self, name: str, found: Evaluation | None) -> None:
        extra = {"steps": str(self.run.step), "stage": self.stage.name, "dataset": self.stage.data.dataset}
        if found is not None:
            extra["validation_miou"] = f"{found.matrix.mean_iou():.4f}"
        model = self.run.average.model
        # A weight may leave float16 in a run that diverges: its checkpoint must not be lost for that.
        dtype = torch.float16 if _fits_half(model.state_dict()) else torch.float32
        save_weights(model, self.folder / name, dtype=dtype, extra=extra)


def _fits_half(state: Mapping[str, Tensor]) -> bool:
    limit = torch.finfo(torch.float16).max
    return all(float(value.abs().max()) <= limit for value in state.values() if value.ndim > 1)


def open_split(dataset: str, roots: Mapping[str, Path], split: str) -> Dataset:
    """A split of a data set, in its folder.

    Raises:
        ValueError, OSError: there is no folder of it, or as `open_dataset`.
    """
    if dataset not in roots:
        raise ValueError(f"data names no folder of {dataset}, it must be given as {dataset}=DIR")
    return open_dataset(dataset, roots[dataset], split)
