"""One stage of a training run: the model, its moving average, the optimiser, and how far it is."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoints
from ..data import class_frequencies
from ..data.dataset import Dataset, check_labelled
from ..files import replacing
from ..nn import ShelfNet, create_model, fuse_for_training, transfer_weights
from ..nn.images import normalised as normalised_by
from . import optimizer, schedule
from .average import Average
from .distributed import Processes, sync_norms
from .losses import PARTS, Objective, class_weights, shares
from .recipe import Model, Stage

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Of a recipe these may differ between a checkpoint and the run that goes on from it.
LENGTH = ("steps", "epochs")
# How many seeds torch has.
SEEDS = 2**64


class Run:
    """A stage in training.

    Args:
        stage: what is trained and how.
        source: the training images.
        processes: this process among those that train together.
        start: the state dict of the stage before, to begin with where `stage.model` names no weights.

    Raises:
        OSError, RuntimeError, ValueError: the weights to begin with cannot be read or do not fit; the batch
            cannot be shared among the processes; the images have no masks.

    Attributes:
        step: steps done.
        steps: steps of the whole stage.
        best: the best validation mIoU so far, with the step it was measured at.
        due: whether the validation and the files of weights of this step are still to come.
    """

    def __init__(
        self, stage: Stage, source: Dataset, processes: Processes, start: dict[str, Tensor] | None = None
    ) -> None:
        parts = processes.count * stage.accumulate
        if stage.batch % parts:
            raise ValueError(f"batch is {stage.batch}, it must be a multiple of {parts}, the parts of a step")
        check_labelled(source, "data.train", stage.data.train)
        self._check_norms(stage, processes)
        torch.manual_seed(stage.seed % SEEDS)
        self.stage, self.source, self.processes = stage, source, processes
        self.step, self.steps = 0, stage.total_steps(len(source))
        self.best, self.best_step = 0.0, 0
        self.due = False
        self._terms, self._counted = torch.zeros(len(PARTS)), 0
        self.dtype = torch.float64 if stage.precision == "float64" else torch.float32
        self.model = self._model(start)
        self.average = Average(self.model, stage.average)
        self.optimizer = optimizer.build(self.model, stage.optimizer)
        device = processes.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=stage.precision == "float16")
        margin = stage.loss.class_margin
        self.weights = class_weights(class_frequencies(source), margin) if margin else None
        self.objective = self._objective()

    @staticmethod
    def _check_norms(stage: Stage, processes: Processes) -> None:
        # The gates of the real-time models have one value an image.
        together = 1 if stage.sync_norms else processes.count
        if stage.model.name.endswith("_lw") and stage.batch // (stage.accumulate * together) < 2:
            raise ValueError(
                f"batch is {stage.batch}, each part of a {stage.model.name}'s must have two images or more, "
                "for its batch norms"
            )

    def _model(self, start: dict[str, Tensor] | None) -> ShelfNet:
        model = build_model(self.stage.model, self.source, start)
        if self.stage.sync_norms and self.processes.count > 1:
            sync_norms(model, self.processes.device)
        if self.stage.fused:
            fuse_for_training(model)
        model.to(self.processes.device, self.dtype)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        return model

    def _objective(self) -> nn.Module:
        stage, processes = self.stage, self.processes
        backend = "auto" if stage.fused else "reference"
        autocast = AUTOCAST.get(stage.precision)
        objective = Objective(self.model, stage.loss, self.weights, autocast, backend)
        objective.to(processes.device, self.dtype)
        if processes.count == 1:
            return objective
        idle = not stage.loss.presence and self.model.presence_head is not None
        idle |= not stage.loss.auxiliary and len(self.model.aux_heads) > 0
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=idle)

    def advance(self, batch: list[tuple[Tensor, Tensor]]) -> None:
        """One step on this process's parts of a batch, as `loader.batches` gives them."""
        stage = self.stage
        optimizer.set_rate(
            self.optimizer,
            stage.optimizer.lr * schedule.factor(self.step, self.steps, stage.schedule),
        )
        self.model.train()
        self.optimizer.zero_grad()
        terms = [
            self._backward(index, *part, share)
            for index, (part, share) in enumerate(zip(batch, self._shares(batch), strict=True))
        ]
        if stage.optimizer.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), stage.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.average.update(self.model, self.step)
        self._terms = self._terms.to(self.processes.device) + torch.stack(terms).sum(0)
        self._counted += 1

    def take_terms(self) -> Tensor:
        """The mean terms of the loss, as `losses.PARTS`, over the steps since the last call.

        Of this process; their mean over all processes is the whole batch's.
        """
        mean = self._terms / max(self._counted, 1)
        self._terms, self._counted = torch.zeros_like(self._terms), 0
        return mean

    def _shares(self, batch: list[tuple[Tensor, Tensor]]) -> list[float]:
        own = shares(self.stage.loss, [labels for _, labels in batch], self.weights)
        total = float(self.processes.sum(own.sum()))
        parts = len(batch) * self.processes.count
        return [parts * float(part) / total if total else 0.0 for part in own]

    def _backward(self, index: int, images: Tensor, labels: Tensor, share: float) -> Tensor:
        stage, device = self.stage, self.processes.device
        objective = self.objective
        alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if isinstance(objective, nn.parallel.DistributedDataParallel) and index + 1 < stage.accumulate:
            alone = objective.no_sync()
        # Dropout's draws follow from the step and the part, so that a resumed run repeats them.
        part = self.processes.rank * stage.accumulate + index
        torch.manual_seed(((stage.seed * 1_000_003 + self.step) * 1_009 + part) % SEEDS)
        x = normalised(images.to(device, non_blocking=True), self.model)
        target = labels.to(device, non_blocking=True)
        with alone:
            terms = objective(x, target, share) / stage.accumulate
            self.scaler.scale(terms.sum()).backward()
        return terms.detach()

    def save(self, path: Path) -> None:
        """Writes a checkpoint in one step.

        Raises:
            OSError: it cannot be written; the one before stays.
        """
        state = {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": (self.best, self.best_step),
            "due": self.due,
            "terms": (self._terms, self._counted),
            "stage": dataclasses.asdict(self.stage),
            "images": len(self.source),
        }
        # A file of Python's, which says why it cannot be written.
        with replacing(path, lasting=True) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def resume(self, path: Path) -> None:
        """Takes up a checkpoint of `save`.

        Raises:
            RuntimeError: it is cut short or damaged.
            ValueError: it is of a run with another recipe; only the length may differ.
        """
        state = read_checkpoint(path, self.stage)
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.best, self.best_step = state["best"]
        # Earlier versions wrote checkpoints after all else.
        self.due = state.get("due", False)
        self._terms, self._counted = state["terms"]


def read_checkpoint(path: Path, stage: Stage) -> dict[str, Any]:
    """What `Run.save` wrote of a stage, on the CPU.

    Raises:
        RuntimeError: the file is cut short, damaged, or no checkpoint of a run.
        ValueError: it is of a run with another recipe; only the length may differ.
    """
    state = checkpoints.load_torch(path)
    kinds = {"model": dict, "average": dict, "stage": dict, "step": int}
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kinds[key]) for key in kinds):
        raise RuntimeError(f"{path} is no checkpoint of a training run")
    given, found = _flat(dataclasses.asdict(stage)), _flat(state["stage"])
    # Any other field that the checkpoint lacks is newer than it.
    added = [name for name in given if name not in found and name.startswith("model.changes.")]
    for name in (*found, *added):
        before, now = found.get(name), given.get(name)
        if now != before and name not in LENGTH:
            raise ValueError(f"{path} is of a run with {name} {before}, it cannot go on with {now}")
    return state


def finished(path: Path, stage: Stage) -> dict[str, Tensor] | None:
    """The averaged weights of a checkpoint at the stage's end; None where there is more to do.

    Neither the data nor the model is needed for it: the checkpoint says of how many images the epochs were.

    Raises:
        RuntimeError, ValueError: as `read_checkpoint`.
    """
    if not path.exists():
        return None
    state = read_checkpoint(path, stage)
    # Those of earlier versions do not say it.
    done = "images" in state and state["step"] >= stage.total_steps(state["images"])
    return state["average"] if done and not state.get("due", False) else None


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def normalised(images: Tensor, model: ShelfNet) -> Tensor:
    """(N, 3, H, W) in channels_last and the model's dtype, of raw images (N, H, W, 3) uint8."""
    return normalised_by(images, model.normalisation, model.backbone.conv1.weight.dtype)


def build_model(recipe: Model, source: Dataset, start: dict[str, Tensor] | None = None) -> ShelfNet:
    """The model that a stage begins with: named, for the classes of the data.

    Raises:
        OSError, RuntimeError, ValueError: as `Run`.
    """
    try:
        model = create_model(recipe.name, len(source.classes), **recipe.changes)
    except TypeError as error:
        raise ValueError(
            f"model.changes is {recipe.changes}, it may hold fields of ShelfNetConfig"
        ) from error
    model.classes, model.palette = tuple(source.classes), tuple(source.palette)
    if recipe.start:
        first = checkpoints.open_model(recipe.start)
        model.normalisation = first.normalisation
        transfer_weights(model, first.state_dict(), f"model.start {recipe.start}")
    elif recipe.backbone:
        checkpoints.load_resnet(model.backbone, recipe.backbone)
    elif start is not None:
        transfer_weights(model, start, "the stage before")
    return model
