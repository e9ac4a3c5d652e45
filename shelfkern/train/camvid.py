"""Trains a ShelfNet18-lw on CamVid from nothing: `python -m shelfkern.train.camvid --data DIR --out DIR`.

A run that is stopped, by Ctrl-C too, goes on from its last checkpoint when started again, and gives the
same weights as one never stopped: every random choice follows from the seed and the step.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from ..data import camvid
from ..data.transforms import augment
from ..evaluate import ConfusionMatrix
from ..files import replacing
from ..nn import ShelfNet, from_weights, save_weights, shelfnet18_lw
from ..normalisation import Normalisation
from .losses import class_weights, total_loss
from .schedule import poly_with_warmup

EMA_DECAY = 0.998
GRADIENT_NORM = 5.0
NORMALISATION = Normalisation()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run's weights depend on, beside the data.

    `light` is how far augmentation changes the light; `start` names weights to begin with, "" for none.
    """

    steps: int = 4000
    batch: int = 8
    crop: tuple[int, int] = (256, 320)
    width: int = 48
    lr: float = 1.5e-3
    weight_decay: float = 0.02
    warmup: int = 200
    seed: int = 0
    light: float = 0.0
    start: str = ""


def build_model(width: int) -> ShelfNet:
    """ShelfNet18-lw with `width` channels where the published model has 64, and in proportion elsewhere."""
    return shelfnet18_lw(
        len(camvid.CLASSES), backbone_width=width, widths=(width, 2 * width, 4 * width), head_width=width
    )


def start_model(recipe: Recipe) -> ShelfNet:
    """The model that a run begins with.

    Raises:
        OSError, RuntimeError: the weights to begin with cannot be read.
        ValueError: they are of other classes.
    """
    if not recipe.start:
        return build_model(recipe.width)
    model = from_weights(recipe.start)
    if model.config.num_classes != len(camvid.CLASSES):
        raise ValueError(
            f"start {recipe.start} has {model.config.num_classes} classes, CamVid has {len(camvid.CLASSES)}"
        )
    return model


def _channels_last(model: ShelfNet) -> ShelfNet:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    return model


def batch_at(frames: list[camvid.Frame], recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and labels (N, H, W) int64 of one step. Every frame is seen once an epoch."""
    images, labels = [], []
    for index in range(recipe.batch):
        epoch, position = divmod(step * recipe.batch + index, len(frames))
        order = np.random.default_rng((recipe.seed, 77, epoch)).permutation(len(frames))
        frame = frames[order[position]]
        rng = np.random.default_rng((recipe.seed, step, index))
        pixels, mask = augment(frame.image, frame.mask, recipe.crop, camvid.IGNORE, rng, recipe.light)
        images.append(NORMALISATION(pixels))
        labels.append(mask.astype(np.int64))
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(np.stack(labels))


class Run:
    """A training run: the model, its moving average, the optimiser, and how far it is."""

    def __init__(self, frames: list[camvid.Frame], recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.frames, self.recipe, self.step = frames, recipe, 0
        self.model = _channels_last(start_model(recipe))
        self.average = copy.deepcopy(self.model).eval()
        self.weights = class_weights(camvid.class_frequencies(frames))
        # No decay of norms and biases, as published.
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.model.parameters():
            groups[parameter.ndim <= 1].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": recipe.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ]
        )

    def advance(self) -> float:
        """One step; gives its loss."""
        recipe = self.recipe
        x, target = batch_at(self.frames, recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = poly_with_warmup(self.step, recipe.steps, recipe.lr, recipe.warmup)
        # Dropout's draws follow from the step, so that a resumed run repeats them.
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        loss = total_loss(self.model.train()(x), target, self.weights, camvid.IGNORE)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        return loss.item()

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(EMA_DECAY, self.step / (self.step + 9))
        state = self.model.state_dict()
        for name, mean in self.average.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(state[name], 1 - decay)
            else:
                mean.copy_(state[name])

    def save(self, path: Path) -> None:
        """Writes a checkpoint in one step."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.average.state_dict(),
            "opt": self.optimizer.state_dict(),
            "step": self.step,
            "recipe": dataclasses.asdict(self.recipe),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Takes up a checkpoint of `save`.

        Raises:
            ValueError: it is of a run with another recipe; only the number of steps may differ.
        """
        state = torch.load(path, weights_only=True)
        for name, value in dataclasses.asdict(self.recipe).items():
            before = state["recipe"].get(name, getattr(Recipe, name))
            if value != before and name != "steps":
                raise ValueError(f"{path} is of a run with {name} {before}, it cannot go on with {value}")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["opt"])
        self.step = state["step"]


@torch.no_grad()
def evaluate(model: ShelfNet, frames: list[camvid.Frame], batch: int = 4) -> ConfusionMatrix:
    """The confusion matrix of an eval-mode model over whole frames."""
    matrix = ConfusionMatrix(len(camvid.CLASSES))
    for start in range(0, len(frames), batch):
        part = frames[start : start + batch]
        pixels = np.stack([NORMALISATION(np.asarray(frame.image)) for frame in part])
        labels = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).argmax(1).numpy()
        for frame, predicted in zip(part, labels, strict=True):
            matrix.update(np.asarray(frame.mask), predicted)
    return matrix


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Appends a row to a CSV file, with a header where the file is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def export(run: Run, matrix: ConfusionMatrix, path: Path) -> None:
    """Writes the averaged weights as float16, with their classes and validation mIoU."""
    extra = {"validation_miou": f"{matrix.mean_iou():.4f}", "steps": str(run.step)}
    save_weights(run.average, path, classes=camvid.CLASSES, palette=camvid.PALETTE, extra=extra)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done: half a step could not be gone on from."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def train(run: Run, val: list[camvid.Frame], out: Path, every: int) -> None:
    """Runs to the recipe's last step, with a checkpoint and a validation every `every` steps."""
    losses: list[float] = []
    started, first = time.monotonic(), run.step
    while run.step < run.recipe.steps:
        with uninterrupted():
            losses.append(run.advance())
        if run.step % 25 == 0:
            pace = (time.monotonic() - started) / (run.step - first)
            click.echo(
                f"step {run.step}/{run.recipe.steps}  loss {np.mean(losses[-100:]):.3f}  {pace:.2f} s/step"
            )
        if run.step % every and run.step < run.recipe.steps:
            continue
        with uninterrupted():
            run.save(out / "checkpoint.pt")
            validate(run, val, out, float(np.mean(losses)))
        losses.clear()


def validate(run: Run, val: list[camvid.Frame], out: Path, loss: float) -> None:
    """Measures the average on whole frames, logs the result and exports the weights."""
    matrix = evaluate(run.average, val)
    row = {"step": run.step, "loss": round(loss, 4), "miou": round(matrix.mean_iou(), 4)}
    row |= {name: round(float(iou), 4) for name, iou in zip(camvid.CLASSES, matrix.iou(), strict=True)}
    append_row(out / "log.csv", row)
    export(run, matrix, out / "camvid.safetensors")
    click.echo(f"step {run.step}  validation mIoU {matrix.mean_iou():.4f}")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option(
    "--steps",
    default=Recipe.steps,
    type=click.IntRange(1),
    help="Length of the run; may be changed when it goes on.",
)
@click.option("--batch", default=Recipe.batch, type=click.IntRange(2))
@click.option("--crop", nargs=2, default=Recipe.crop, type=click.IntRange(32), help="Height and width.")
@click.option(
    "--width",
    default=Recipe.width,
    type=click.IntRange(1),
    help="Channels of the stem; the published model has 64. With --start those of the weights.",
)
@click.option("--lr", default=Recipe.lr)
@click.option("--seed", default=Recipe.seed, type=click.IntRange(0))
@click.option("--light", default=Recipe.light, help="How far augmentation changes the light, 0 to 1 or so.")
@click.option(
    "--start", default=Recipe.start, help="Weights to begin with: a name or a file; none by default."
)
@click.option(
    "--every", default=250, type=click.IntRange(1), help="Steps between checkpoints and validations."
)
def main(data: Path, out: Path, every: int, **recipe: Any) -> None:
    """Trains a ShelfNet18-lw on CamVid; goes on where an earlier run in OUT stopped."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pid").write_text(str(os.getpid()))
    checkpoint = out / "checkpoint.pt"
    try:
        run = Run(camvid.load_split(data, "train"), Recipe(**recipe))
        val = camvid.load_split(data, "val")
        if checkpoint.exists():
            run.resume(checkpoint)
            click.echo(f"going on from step {run.step}")
    except (OSError, ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    try:
        train(run, val, out, every)
    except KeyboardInterrupt:
        run.save(checkpoint)
        click.echo(f"stopped at step {run.step}; the same command goes on from here")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
