"""Options shared by commands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any, Protocol

import click
import numpy as np
import torch
from torch import nn

from .. import checkpoints
from ..engine import FastShelfNet, accelerate, load
from ..engine.saved import is_saved
from ..nn import ShelfNet, create_model, list_models, shipped_weights
from .inputs import SMALLEST

MODELS = list_models()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_HELP = "Compute dtype (default: float32, or the saved network's)."
BACKENDS = ("auto", "native", "library", "eager")
DEVICE_HELP = "cpu, or a GPU: cuda, cuda:1."
BACKEND_HELP = "Kernels: shelfkern's (native), PyTorch's (library), or the faster for each layer (auto){}."
TUNE_HELP = "Time each layer's algorithms first, for up to a minute; the results are kept for later runs."
SIZE_HELP = (
    "Size the network sees: HEIGHTxWIDTH, or one number for the longer side (default: the image's own size)."
)
MODEL_HELP = "Architecture, for a bare state dict."
BUNDLED = ", ".join(shipped_weights()) or "none"
WEIGHTS_HELP = f"Bundled weights ({BUNDLED}), or a weights file."
# The main classifier's weight: in our names, and in both of the authors' formats.
HEADS = ("head.classify.weight", "head.final.weight", "conv_out.conv_out.weight")
SAVE = "save it with shelfkern.nn.save_weights"


class Predictor(Protocol):
    """An accelerated model, or a plain one with its interface."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def predict(self, images: torch.Tensor) -> torch.Tensor: ...

    def predict_frames(self, frames: Iterable[np.ndarray]) -> Iterator[torch.Tensor]: ...


class Size(click.ParamType):
    """HEIGHTxWIDTH, or one number, whose meaning is the command's."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if not match:
            self.fail(
                f"{value!r} must be HEIGHTxWIDTH, such as 512x1024, or one number, such as 512", param, ctx
            )
        size = tuple(int(part) for part in match.groups() if part)
        if min(size) < SMALLEST:
            self.fail(f"{value!r} must be at least {SMALLEST} pixels a side", param, ctx)
        return size


def open_model(
    weights: str, model: str | None, option: str = "--weights", remedy: str = f"pass --model, or {SAVE}"
) -> ShelfNet:
    """The model of a bundled name, a file of ours, or an authors' checkpoint, in eval mode.

    Args:
        model: the architecture of a state dict that does not tell its own; None otherwise.
        option: what the command calls its weights.
        remedy: for such a state dict without `model`.

    Raises:
        click.ClickException: it cannot be read, or does not fit; one sentence.
    """
    if is_saved(weights):
        raise click.ClickException(
            f"{option} {weights} is an accelerated network, it must be a model's weights"
        )
    try:
        if model is None:
            return checkpoints.open_model(weights)
        if checkpoints.names_its_model(weights):
            raise click.ClickException(
                f"--model is for a bare state dict, {option} {weights} names its own model: leave out --model"
            )
        return _built(model, weights)
    except checkpoints.UnknownModelError as error:
        raise click.ClickException(
            f"{weights}: it cannot be told which model this state dict belongs to; {remedy}"
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from error


def _built(model: str, weights: str) -> ShelfNet:
    """A published model with a state dict in its own or the authors' names, of as many classes."""
    state = checkpoints.load(weights)
    head = next((state[name] for name in HEADS if isinstance(state.get(name), torch.Tensor)), None)
    network = create_model(model, None if head is None or head.dim() == 0 else len(head))
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise click.ClickException(f"{weights} does not fit --model {model}: {error}") from error
    return network.eval()


def open_saved(
    path: str, device: str, backend: str = "auto", tune: bool = False, **given: str | None
) -> FastShelfNet | None:
    """The accelerated network in a file of `FastShelfNet.save`, or None if the file is of another kind.

    Args:
        given: options that such a network decides itself; None where they are not given.

    Raises:
        click.ClickException: it cannot be read or run so, or one of them is given; one sentence.
    """
    if not is_saved(path):
        return None
    for name, value in given.items():
        if value is not None:
            raise click.ClickException(f"--{name} is {value}, {path} is an accelerated network with its own")
    try:
        return load(path, device, backend, tune=tune)
    except (OSError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def tell_licence(weights: str) -> None:
    """Prints what the card of bundled weights says of their licence; nothing of other weights."""
    if weights not in shipped_weights():
        return
    card = resources.files("shelfkern").joinpath(f"weights/{weights}.md").read_text(encoding="utf-8")
    section = " ".join(card.partition("\n## Licence\n")[2].split())
    click.echo(f"Licence of {weights}: {section.partition('. ')[0].rstrip('.')}.")


def check_device(device: str) -> None:
    """Checks a device before the work begins, with the engine's messages.

    Raises:
        click.ClickException: it is unknown or not available; one sentence.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise click.ClickException(f"device is {device!r}, it may be 'cpu' or a CUDA device such as 'cuda'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(f"device is {device!r}, and there is no GPU that torch can use")


def make_fast(
    model: ShelfNet, dtype: str, device: str, backend: str = "auto", tune: bool = False, graphs: bool = True
) -> FastShelfNet:
    """The accelerated model.

    Raises:
        click.ClickException: it cannot be accelerated so; one sentence.
    """
    try:
        return accelerate(model, DTYPES[dtype], device, backend, tune=tune, graphs=graphs)
    except (RuntimeError, ValueError, TypeError) as error:
        raise click.ClickException(str(error)) from error


class Eager(nn.Module):
    """A plain model with the accelerated one's interface."""

    def __init__(self, model: ShelfNet) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of normalised images."""
        return self.model(x)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Labels (N, H, W) uint8, as `ShelfNet.predict`."""
        return self.model.predict(images)

    def predict_frames(self, frames: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        """Labels (H, W) uint8 of each raw frame (H, W, 3)."""
        return (self.predict(torch.from_numpy(frame)[None])[0] for frame in frames)
