"""What is measured of whole networks: which cases, in which order, and on which inputs."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shelfkern import nn as models
from shelfkern.nn import ShelfNet
from shelfkern.nn.backbone import BasicBlock, Bottleneck
from shelfkern.nn.blocks import EntryBlock, SharedBlock

Size = tuple[int, int]

# Each in order of importance, for a budget may end before the rest.
MODELS = ("shelfnet18_lw", "shelfnet50", "shelfnet34_lw", "shelfnet101")
SIZES: dict[str, tuple[Size, ...]] = {
    "cpu": ((512, 512), (512, 1024)),
    "cuda": ((512, 512), (1024, 2048)),
}
BATCHES = {"cpu": (1,), "cuda": (1, 32, 8)}
DTYPES = {"cpu": ("float32",), "cuda": ("float16", "bfloat16")}
# The paper times these, in float32, at 512x512.
PAPER_MODELS = ("shelfnet50", "shelfnet101")
# Of the pictures that batch norms take their statistics from: count and extent.
CALIBRATION = (4, 128)
# Of a residual block's last batch norm.
RESIDUAL_SCALE = 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one input.

    Attributes:
        model: its name.
        size: height and width.
        batch: images.
        dtype: of activations, by name.
        labels: whether labels are wanted, otherwise full-size scores.
        device: "cpu" or "cuda".
    """

    model: str
    size: Size
    batch: int
    dtype: str
    labels: bool
    device: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of activations."""
        return getattr(torch, self.dtype)

    @property
    def raw(self) -> bool:
        """Whether images come as uint8 (N, H, W, 3), otherwise normalised (N, 3, H, W) in `dtype`.

        On a CPU labels too are made of normalised images, which all variants take.
        """
        return self.labels and self.device == "cuda"

    @property
    def output(self) -> str:
        """What is wanted, in a word."""
        return "labels" if self.labels else "scores"

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.model} {height}x{width} batch {self.batch} {self.dtype} {self.output}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Which cases a run measures; what is empty is the device's own choice."""

    device: str
    models: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    quick: bool = False

    def cases(self) -> list[Case]:
        """All of them, the most important first."""
        quick = slice(1) if self.quick else slice(None)
        names = self.models or (MODELS[:2] if self.quick else MODELS)
        if self.device == "cpu" and not self.models:
            names = MODELS[:1]
        axes = (
            self.dtypes or DTYPES[self.device][quick],
            self.batches or BATCHES[self.device][quick],
            self.sizes or SIZES[self.device][quick],
            names,
            (False, True),
        )
        found = [
            Case(model, size, batch, dtype, labels, self.device)
            for dtype, batch, size, model, labels in itertools.product(*axes)
        ]
        return self._with_paper(found)

    def _with_paper(self, cases: list[Case]) -> list[Case]:
        """The paper's own cases, once the first size is done in the first dtype."""
        if self.device == "cpu" or self.quick or self.dtypes or self.batches or self.sizes:
            return cases
        names = [name for name in PAPER_MODELS if name in (self.models or MODELS)]
        paper = [Case(name, (512, 512), 1, "float32", False, self.device) for name in names]
        first = 2 * len(self.models or MODELS)
        return [*cases[:first], *paper, *cases[first:]]


@functools.cache
@torch.no_grad()
def build(name: str) -> ShelfNet:
    """A published model on the CPU in float32, randomly initialised, its batch norms calibrated.

    Time does not depend on the values, but without statistics activations grow from block to block, beyond
    what float16 holds.
    """
    torch.manual_seed(0)
    return calibrate(getattr(models, name)())


def calibrate(model: ShelfNet) -> ShelfNet:
    """Gives a model's batch norms the statistics of a few pictures; gives it in eval mode."""
    model.train()
    for path, module in model.named_modules():
        # As in trained networks a block changes little, so that roundings do not grow from block to block.
        last = {BasicBlock: "bn2", SharedBlock: "bn2", EntryBlock: "bn2", Bottleneck: "bn3"}.get(type(module))
        if last is not None:
            module.get_submodule(last).weight.fill_(RESIDUAL_SCALE)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
        # A gate's norm would see a few nearly equal means, whose variance says nothing.
        if isinstance(module, nn.Dropout2d) or path.endswith("gate_bn"):
            module.eval()
    count, extent = CALIBRATION
    model(normalised(pictures(count, (extent, extent), "cpu"), model))
    return model.eval()


def pictures(batch: int, size: Size, device: str) -> Tensor:
    """uint8 (N, H, W, 3), coarse shapes with fine noise, the same at every run."""
    generator = torch.Generator(device).manual_seed(0)
    height, width = size
    extents = (batch, 3, -(-height // 32), -(-width // 32))
    coarse = F.interpolate(torch.rand(extents, generator=generator, device=device), size, mode="bilinear")
    fine = torch.rand((batch, 3, *size), generator=generator, device=device)
    return (255 * torch.lerp(coarse, fine, 0.25)).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def normalised(images: Tensor, model: ShelfNet) -> Tensor:
    """float32 (N, 3, H, W) of raw images."""
    mean, std = (torch.tensor(v, device=images.device) for v in dataclasses.astuple(model.normalisation))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def images_of(case: Case, model: ShelfNet) -> Tensor:
    """What every variant of a case gets, on its device."""
    raw = pictures(case.batch, case.size, case.device)
    return raw if case.raw else normalised(raw, model).to(case.torch_dtype)
