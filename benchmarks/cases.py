"""Cases of the whole-network benchmarks: which ones, in which order, and their inputs."""

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

# All in order of importance, because the budget may end before the rest.
MODELS = ("shelfnet18_lw", "shelfnet50", "shelfnet34_lw", "shelfnet101")
# The bundled weights, trained on CamVid: the only network here whose labels are meaningful.
SHIPPED = "camvid"
SIZES: tuple[Size, ...] = ((512, 512), (1024, 2048))
# On a CPU each network has its own sizes: the bundled one that of its frames.
CPU_NETWORKS: tuple[tuple[str, Size], ...] = (
    ("shelfnet18_lw", (512, 1024)),
    ("shelfnet18_lw", (512, 512)),
    ("shelfnet50", (512, 512)),
    (SHIPPED, (360, 480)),
)
BATCHES = {"cpu": (1,), "cuda": (1, 32, 8)}
DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float16", "bfloat16")}
# The paper gives times for these, in float32, at 512x512.
PAPER_MODELS = ("shelfnet50", "shelfnet101")
# Pictures from which batch norms take their statistics: count and extent.
CALIBRATION = (4, 128)
# Images on which 8-bit variants find their ranges.
RANGE_IMAGES = 8
# Scale of a residual block's last batch norm.
RESIDUAL_SCALE = 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one input.

    Attributes:
        model: name of the model.
        size: height and width.
        batch: number of images.
        dtype: name of the dtype of activations.
        labels: whether labels are computed, otherwise full-size scores.
        device: "cpu" or "cuda".
        threads: threads on a CPU; None as many as torch has.
    """

    model: str
    size: Size
    batch: int
    dtype: str
    labels: bool
    device: str
    threads: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of activations."""
        return getattr(torch, self.dtype)

    @property
    def float_dtype(self) -> torch.dtype:
        """dtype of images and scores: float32 where activations are 8-bit."""
        return self.torch_dtype if self.torch_dtype.is_floating_point else torch.float32

    @property
    def raw(self) -> bool:
        """Whether images are uint8 (N, H, W, 3), otherwise normalised (N, 3, H, W) in `dtype`.

        On a CPU labels are also computed from normalised images, which all variants accept.
        """
        return self.labels and self.device == "cuda"

    @property
    def output(self) -> str:
        """Name of the output."""
        return "labels" if self.labels else "scores"

    def __str__(self) -> str:
        height, width = self.size
        found = f"{self.model} {height}x{width} batch {self.batch} {self.dtype} {self.output}"
        return found if self.threads is None else f"{found} threads {self.threads}"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The cases of a run; empty fields are filled in by the device's defaults.

    threads: threads on a CPU, by default as many as torch has, then one.
    """

    device: str
    models: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    quick: bool = False
    threads: tuple[int, ...] = ()

    def cases(self) -> list[Case]:
        """All of them, the most important first."""
        quick = slice(1) if self.quick else slice(None)
        axes = (
            self._threads(),
            self.dtypes or DTYPES[self.device][quick],
            self.batches or BATCHES[self.device][quick],
            self._networks(),
            (False, True),
        )
        found = [
            Case(model, size, batch, dtype, labels, self.device, threads)
            for threads, dtype, batch, (model, size), labels in itertools.product(*axes)
        ]
        return self._with_paper(found)

    def _threads(self) -> tuple[int | None, ...]:
        if self.device != "cpu":
            return (None,)
        every = tuple(dict.fromkeys((torch.get_num_threads(), 1)))
        return self.threads or every[: 1 if self.quick else None]

    def _networks(self) -> list[tuple[str, Size]]:
        """Models and sizes: on a GPU all pairs; on a CPU its default pairs that match, or those asked for."""
        if self.device == "cpu" and not (self.models and self.sizes):
            own = [
                (model, size)
                for model, size in CPU_NETWORKS[: 2 if self.quick else None]
                if model in (self.models or (model,)) and size in (self.sizes or (size,))
            ]
            if own:
                return own
        sizes = self.sizes or SIZES[: 1 if self.quick or self.device == "cpu" else None]
        names = self.models or (MODELS[:1] if self.device == "cpu" else MODELS[: 2 if self.quick else None])
        return [(model, size) for size in sizes for model in names]

    def _with_paper(self, cases: list[Case]) -> list[Case]:
        """The paper's own cases, inserted after the first size in the first dtype."""
        if self.device == "cpu" or self.quick or self.dtypes or self.batches or self.sizes:
            return cases
        names = [name for name in PAPER_MODELS if name in (self.models or MODELS)]
        paper = [Case(name, (512, 512), 1, "float32", False, self.device) for name in names]
        first = 2 * len(self.models or MODELS)
        return [*cases[:first], *paper, *cases[first:]]


@functools.cache
@torch.no_grad()
def build(name: str) -> ShelfNet:
    """A model on the CPU in float32: the bundled one, or a published one, randomly initialised.

    Time does not depend on the values, but without batch norm statistics activations grow from block to
    block, beyond the range of float16: therefore a random model is calibrated.
    """
    if name == SHIPPED:
        return models.from_weights(name)
    torch.manual_seed(0)
    return calibrate(getattr(models, name)())


def calibrate(model: ShelfNet) -> ShelfNet:
    """Sets a model's batch norm statistics from a few pictures; returns it in eval mode."""
    model.train()
    for path, module in model.named_modules():
        # As in trained networks, each block changes little, so that rounding errors do not grow from block to
        # block.
        last = {BasicBlock: "bn2", SharedBlock: "bn2", EntryBlock: "bn2", Bottleneck: "bn3"}.get(type(module))
        if last is not None:
            module.get_submodule(last).weight.fill_(RESIDUAL_SCALE)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
        # A gate's norm would see only a few nearly equal means, whose variance is meaningless.
        if isinstance(module, nn.Dropout2d) or path.endswith("gate_bn"):
            module.eval()
    count, extent = CALIBRATION
    model(normalised(pictures(count, (extent, extent), "cpu"), model))
    return model.eval()


def pictures(batch: int, size: Size, device: str, seed: int = 0) -> Tensor:
    """uint8 (N, H, W, 3), coarse shapes with fine noise, the same in every run."""
    generator = torch.Generator(device).manual_seed(seed)
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
    """Input of every variant of a case, on its device."""
    raw = pictures(case.batch, case.size, case.device)
    return raw if case.raw else normalised(raw, model).to(case.float_dtype)


def range_images(size: Size) -> Tensor:
    """uint8 (N, H, W, 3) on the CPU: images for calibrating 8-bit variants, different from the timed ones."""
    return pictures(RANGE_IMAGES, size, "cpu", seed=1)
