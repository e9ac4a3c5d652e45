"""ShelfNet (Zhuang et al., arXiv 1811.11254): the reference model, plain torch.nn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..normalisation import Normalisation
from ..ops.upsample_argmax import upsample_argmax
from . import published
from .backbone import RESNET_STAGES, ResNet, init_weights
from .blocks import BackboneHead, ConvHead, LinearHead, PresenceHead
from .extents import Extents
from .fused import fuse_for_training
from .images import as_batch, check_image_size, check_label_classes, image_size, normalised
from .shelf import MERGES, Shelf

# Largest `input_scale`, and its largest denominator: images are padded to multiples of at most 32 times it.
MOST_ENLARGED = 4
MOST_PARTS = 8


@dataclasses.dataclass(frozen=True)
class ShelfNetConfig:
    """What a ShelfNet is made of. The defaults are ShelfNet50's.

    Attributes:
        num_classes: classes of the scores.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        backbone_width: channels of the stem; the stages have 1, 2, 4 and 8 times as many (bottleneck
            stages 4, 8, 16 and 32 times).
        widths: channels of the shelf's levels, fine to coarse; 2 to 5 levels, the coarsest at stride 32.
        merge: "deconv" or "attention".
        pairs: encoder-decoder pairs (paper 3.1): 1 is a U-Net-like network, 2 the published shelf.
        lateral: whether column 1 has 1x1 convolutions.
        negative_slope: of the leaky ReLU; 0 is ReLU.
        dropout: probability of Dropout2d inside the shared blocks.
        head: "linear" (a 1x1 convolution; the auxiliary head is on the backbone) or "conv" (two 3x3
            convolutions; the auxiliary heads are on the next two levels).
        head_width: channels inside the main head, if head is "conv". Auxiliary heads have 64, as published.
        aux: whether there are auxiliary heads (used in training only).
        presence: whether there is an SE head (used in training only).
        input_scale: factor by which images are enlarged, bilinearly, before the backbone, which keeps more
            detail of thin objects in small images. From 1, as published, to 4; a fraction whose denominator
            is at most 8, such as 1.6 = 8/5.
    """

    num_classes: int = 21
    backbone: str = "resnet50"
    backbone_width: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    merge: str = "deconv"
    pairs: int = 2
    lateral: bool = True
    negative_slope: float = 0.0
    dropout: float = 0.25
    head: str = "linear"
    head_width: int = 64
    aux: bool = True
    presence: bool = True
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.widths, (tuple, list)):
            raise ValueError(f"widths is {self.widths!r}, it may be 2 to 5 integers")
        object.__setattr__(self, "widths", tuple(self.widths))
        _check_choice("backbone", self.backbone, RESNET_STAGES)
        _check_choice("merge", self.merge, MERGES)
        _check_choice("head", self.head, ("linear", "conv"))
        if not 2 <= len(self.widths) <= 5:
            raise ValueError(f"widths has {len(self.widths)} levels, it may have 2 to 5")
        for name in ("num_classes", "backbone_width", "pairs", "head_width"):
            _check_positive(name, getattr(self, name))
        for width in self.widths:
            _check_positive("widths", width)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}, it may be from 0 up to, not including, 1")
        if not _is_number(self.negative_slope) or not self.negative_slope >= 0:
            raise ValueError(f"negative_slope is {self.negative_slope!r}, it may be any number from 0")
        self._check_input_scale()

    def _check_input_scale(self) -> None:
        scale = self.input_scale
        fits = _is_number(scale) and 1 <= scale <= MOST_ENLARGED
        if not fits or float(self.extents.scale) != scale:
            may = f"a ratio of integers from 1 to {MOST_ENLARGED} with a denominator up to {MOST_PARTS}"
            raise ValueError(f"input_scale is {scale!r}, it may be {may}")

    @functools.cached_property
    def extents(self) -> Extents:
        """Padding and enlargement of images."""
        return Extents(Fraction(self.input_scale).limit_denominator(MOST_PARTS))

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.widths)


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, it may be one of {', '.join(choices)}")


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, it may be any integer from 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class ShelfNetOutput(NamedTuple):
    """All outputs of a ShelfNet.

    Attributes:
        scores: (N, classes, H, W) at the input's size; from `forward_scores`, at the head's resolution.
        aux: scores of the auxiliary heads, fine to coarse, each like `scores`.
        presence: (N, classes) logits of the SE head, or None.
    """

    scores: Tensor
    aux: tuple[Tensor, ...]
    presence: Tensor | None


class ShelfNet(nn.Module):
    """ShelfNet: a ResNet, a shelf of up and down columns over its features, and heads.

    In eval mode `model(x)` gives the scores (N, classes, H, W); in train mode a `ShelfNetOutput`.
    Inputs are (N, 3, H, W) with H, W >= 32, any floating dtype and memory format, normalised as for
    ImageNet. Sizes that are not multiples of 32 (`config.extents.multiple` where `input_scale` is not 1) are
    padded with zeros at the bottom and right inside, and the outputs cropped.

    `load_state_dict` takes this model's own keys or an authors' checkpoint unchanged.

    Args:
        config: ShelfNet50's by default.
        fused: whether it trains with fused ops, as after `fuse_for_training`.

    Attributes:
        config: the architecture.
        classes: a name per class, or None; set by `from_weights`.
        palette: an (r, g, b) per class, or None; set by `from_weights`.
        normalisation: mean and standard deviation that raw images are normalised with; ImageNet's unless
            `from_weights` sets others.
    """

    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    normalisation: Normalisation = Normalisation()

    def __init__(self, config: ShelfNetConfig | None = None, *, fused: bool = False) -> None:
        super().__init__()
        self.config = config = config or ShelfNetConfig()
        self.backbone = ResNet(config.backbone, config.backbone_width, config.negative_slope)
        channels = self.backbone.channels[-config.levels :]
        if not config.lateral and tuple(channels) != config.widths:
            raise ValueError(f"widths is {config.widths}, without lateral it must be {tuple(channels)}")
        self.shelf = Shelf(
            channels,
            config.widths,
            config.merge,
            config.pairs,
            config.lateral,
            config.dropout,
            config.negative_slope,
        )
        self.head, self.aux_heads = self._heads()
        self.presence_head = PresenceHead(config.widths[-1], config.num_classes) if config.presence else None
        init_weights(self)
        if fused:
            fuse_for_training(self)

    def _heads(self) -> tuple[nn.Module, nn.ModuleList]:
        config = self.config
        aux: list[nn.Module]
        if config.head == "linear":
            aux = [BackboneHead(self.backbone.channels[-2], config.num_classes)] if config.aux else []
            return LinearHead(config.widths[0], config.num_classes), nn.ModuleList(aux)
        widths = config.widths[1:3] if config.aux else ()
        # As published: `head_width`, 128 in ShelfNet34-lw, is of its main head alone.
        aux = [ConvHead(w, 64, config.num_classes, config.negative_slope) for w in widths]
        head = ConvHead(config.widths[0], config.head_width, config.num_classes, config.negative_slope)
        return head, nn.ModuleList(aux)

    @property
    def align_corners(self) -> bool:
        """Whether the final bilinear resize aligns corners: True, as in both published heads."""
        return True

    def forward(self, x: Tensor) -> Tensor | ShelfNetOutput:
        if self.training:
            return self.forward_heads(x)
        return self._resize(self.coarse_scores(x), x)

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """Labels (N, H, W) uint8: the best class of every pixel, computed in eval mode without gradients.

        `shelfkern.accelerate(model).predict` gives the same, faster; where scores of two classes are within
        rounding of each other either may be chosen. The mode of every module is as before afterwards.

        Args:
            images: raw uint8 RGB (N, H, W, 3), which `normalisation` is applied to, or normalised floating
                (N, 3, H, W): tensors on the model's device, or numpy arrays, which are copied to it. A
                single raw image (H, W, 3) gives labels (H, W).

        Returns:
            A tensor on the model's device.

        Raises:
            ValueError: images has another shape, is smaller than 32 x 32 pixels or on another device, or the
                model has more than 256 classes.
            TypeError: images is neither a tensor nor an array, or neither uint8 nor floating.
        """
        weight = self.backbone.conv1.weight
        batch, single = as_batch(images, weight.device)
        if batch.device != weight.device:
            raise ValueError(f"images is on {batch.device}, it must be on {weight.device}")
        _, height, width = image_size(batch)
        check_label_classes(self.config.num_classes)
        raw = batch.dtype is torch.uint8
        x = normalised(batch, self.normalisation, weight.dtype) if raw else batch.to(weight.dtype)
        with eval_mode(self):
            scores = self.coarse_scores(x)
        labels = upsample_argmax(scores, self.padded_size(x.shape), (height, width), self.align_corners)
        return labels[0] if single else labels

    def coarse_scores(self, x: Tensor) -> Tensor:
        """Scores (N, classes, h, w) of the main head before the final resize, in train and in eval mode.

        Resized to `padded_size(x.shape)` and cropped to x's size they are the scores of `forward`.
        """
        _, levels = self._trunk(x)
        return self.head(levels[0])

    def forward_heads(self, x: Tensor) -> ShelfNetOutput:
        """All outputs, in train and in eval mode."""
        low = self.forward_scores(x)
        aux = tuple(self._resize(scores, x) for scores in low.aux)
        return ShelfNetOutput(self._resize(low.scores, x), aux, low.presence)

    def forward_scores(self, x: Tensor) -> ShelfNetOutput:
        """All outputs, in train and in eval mode, with the scores of all heads before the final resize.

        Resized to `padded_size(x.shape)` and cropped to x's size they are those of `forward_heads`.
        `shelfkern.ops.upsample_cross_entropy` computes the loss from them without full-size scores.
        """
        features, levels = self._trunk(x)
        sources = features[-2:-1] if self.config.head == "linear" else levels[1:3]
        aux = tuple(head(source) for head, source in zip(self.aux_heads, sources, strict=False))
        presence = None if self.presence_head is None else self.presence_head(levels[-1])
        return ShelfNetOutput(self.head(levels[0]), aux, presence)

    def _trunk(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The backbone's features and the shelf's levels, both fine to coarse."""
        features = self.backbone(self._prepared(x))
        return features, self.shelf(features[-self.config.levels :])

    def padded_size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels that images of a shape (N, 3, H, W) are padded to.

        The next multiples of `config.extents.multiple`, which is 32 unless `input_scale` is used. Scores are
        resized to this size, then cropped to H x W.

        Raises:
            ValueError: shape is not (N, 3, H, W) with H, W >= 32.
        """
        check_image_size(tuple(shape))
        return self.config.extents.padded(shape[2], shape[3])

    def _prepared(self, x: Tensor) -> Tensor:
        """The backbone's input: padded, then enlarged images."""
        if not x.is_floating_point():
            raise TypeError(
                f"x is {x.dtype}, it must be floating (N, 3, H, W): predict takes raw uint8 images"
            )
        height, width = self.padded_size(x.shape)
        padded = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        if not self.config.extents.enlarges:
            return padded
        seen = self.config.extents.seen(x.shape[2], x.shape[3])
        return F.interpolate(padded, seen, mode="bilinear", align_corners=False)

    def _resize(self, scores: Tensor, x: Tensor) -> Tensor:
        size = self.padded_size(x.shape)
        full = F.interpolate(scores, size, mode="bilinear", align_corners=self.align_corners)
        return _crop(full, *x.shape[2:])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads this model's own keys or an authors' checkpoint, wrapped or not.

        Raises:
            TypeError: state_dict is not a mapping of names.
            RuntimeError: a tensor is missing, unexpected or of another shape; the model is left as it was.
        """
        state = published.adapt(state_dict, self)
        published.check(state, self, strict)
        return super().load_state_dict(state, strict=strict, assign=assign)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards the mode that each module had: some may have been frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    if not torch.compiler.is_exporting():
        return x[:, :, :height, :width]
    # A slice is contiguous only if nothing is cut off, which would specialise an exported program.
    rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
    return x.index_select(2, rows).index_select(3, columns)


_REAL_TIME = ShelfNetConfig(
    num_classes=19,
    backbone="resnet18",
    widths=(64, 128, 256),
    merge="attention",
    negative_slope=0.01,
    dropout=0.1,
    head="conv",
    presence=False,
)

# The published models, by the names of the functions below.
PUBLISHED = {
    "shelfnet18_lw": _REAL_TIME,
    "shelfnet34_lw": dataclasses.replace(
        _REAL_TIME, backbone="resnet34", widths=(128, 256, 512), lateral=False, dropout=0.0, head_width=128
    ),
    "shelfnet50": ShelfNetConfig(),
    "shelfnet101": ShelfNetConfig(backbone="resnet101"),
}


def shelfnet18_lw(num_classes: int = 19, *, fused: bool = False, **changes: Any) -> ShelfNet:
    """ShelfNet18-lw, the real-time model: 14.6 M parameters, 14.3 M of them used in eval mode; 12.3 GMAC.

    Parameters and GMAC are those of the default number of classes; GMAC are 10^9 multiply-accumulates of
    convolutions for one image of 512 x 512 pixels in eval mode.

    Args:
        num_classes: classes of the scores.
        fused: whether it trains with fused ops, as after `fuse_for_training`.
        **changes: other fields of `ShelfNetConfig` in place of the published values.

    Raises:
        ValueError: a field has an invalid value.
        TypeError: changes has a name that is not a field of `ShelfNetConfig`.
    """
    return build_published("shelfnet18_lw", fused, {"num_classes": num_classes, **changes})


def shelfnet34_lw(num_classes: int = 19, *, fused: bool = False, **changes: Any) -> ShelfNet:
    """ShelfNet34-lw: 33.6 M parameters, 33.1 M of them used in eval mode; 30.1 GMAC.

    It has no lateral convolutions and no dropout. Arguments and units as of `shelfnet18_lw`.
    """
    return build_published("shelfnet34_lw", fused, {"num_classes": num_classes, **changes})


def shelfnet50(num_classes: int = 21, *, fused: bool = False, **changes: Any) -> ShelfNet:
    """ShelfNet50: 39.0 M parameters, 36.6 M of them used in eval mode; 39.7 GMAC.

    Arguments and units as of `shelfnet18_lw`.
    """
    return build_published("shelfnet50", fused, {"num_classes": num_classes, **changes})


def shelfnet101(num_classes: int = 21, *, fused: bool = False, **changes: Any) -> ShelfNet:
    """ShelfNet101: 58.0 M parameters, 55.6 M of them used in eval mode; 59.1 GMAC.

    Arguments and units as of `shelfnet18_lw`.
    """
    return build_published("shelfnet101", fused, {"num_classes": num_classes, **changes})


def build_published(name: str, fused: bool, changes: dict[str, Any]) -> ShelfNet:
    """The published model of a name, with `changes` in the fields of its config."""
    return ShelfNet(dataclasses.replace(PUBLISHED[name], **changes), fused=fused)
