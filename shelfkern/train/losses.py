"""The losses of the recipes, on scores before their resize to the image's size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..data.dataset import IGNORE
from ..nn import ShelfNet
from ..ops._common import wide
from ..ops.upsample_cross_entropy import Ohem
from .recipe import Loss

# What `Objective` gives, in this order.
PARTS = ("main", "auxiliary", "presence", "lovasz")


class Objective(nn.Module):
    """A model and its loss as one module, so that DistributedDataParallel and torch.compile see both.

    Args:
        model: any ShelfNet.
        loss: what the loss is.
        weights: (classes,) of the cross-entropy, or None.
        autocast: the dtype that the network computes in, or None; losses are computed in float32.
        backend: of the ops; "reference" for torch's own calls.
    """

    weights: Tensor | None

    def __init__(
        self,
        model: ShelfNet,
        loss: Loss,
        weights: Tensor | None = None,
        autocast: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.model, self.loss, self.autocast, self.backend = model, loss, autocast, backend
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, images: Tensor, target: Tensor, share: float = 1.0) -> Tensor:
        """The weighted terms of the loss, float32 (float64 of such images) in the order of `PARTS`.

        Args:
            images: (N, 3, H, W), normalised.
            target: (N, H, W) uint8 class indices; 255 counts for nothing.
            share: what the mean over these pixels weighs in the mean over all of a step; see `shares`.
        """
        dtype = self.autocast or torch.float32
        with torch.autocast(images.device.type, dtype, enabled=self.autocast is not None):
            scores, aux, presence = self.model.forward_scores(images)
        size = self.model.padded_size(images.shape)
        zero = images.new_zeros(())
        auxiliary = [self._cross_entropy(one, target, size, share) for one in aux if self.loss.auxiliary]
        parts = (
            self._cross_entropy(scores, target, size, share),
            self.loss.auxiliary * torch.stack(auxiliary).sum() if auxiliary else zero,
            self.loss.presence * presence_loss(presence, target) if self.loss.presence else zero,
            self.loss.lovasz * self._lovasz(scores, target, size) if self.loss.lovasz else zero,
        )
        return torch.stack(parts)

    def _cross_entropy(self, scores: Tensor, target: Tensor, size: tuple[int, int], share: float) -> Tensor:
        # The mean over no pixel is NaN.
        if not share:
            return wide(scores).sum() * 0
        loss = self.loss
        return share * ops.upsample_cross_entropy(
            scores,
            target,
            size,
            align_corners=self.model.align_corners,
            ignore_index=IGNORE,
            weight=self.weights,
            label_smoothing=loss.label_smoothing,
            ohem=Ohem(loss.threshold, loss.min_kept) if loss.kind == "ohem" else None,
            backend=self.backend,
        )

    def _lovasz(self, scores: Tensor, target: Tensor, size: tuple[int, int]) -> Tensor:
        crop = (target.shape[1], target.shape[2])
        full = ops.upsample_bilinear(wide(scores), size, crop, self.model.align_corners, backend=self.backend)
        stride = self.loss.lovasz_stride
        y, x = (int(first) for first in torch.randint(stride, (2,)))
        return lovasz_softmax(full[:, :, y::stride, x::stride], target[:, y::stride, x::stride])


def class_weights(frequencies: np.ndarray, margin: float) -> Tensor:
    """1 / log(margin + frequency) per class, scaled so that an average pixel weighs 1; (classes,) float32.

    The form of ENet (arXiv 1606.02147), whose margin of 1.02 gives rare classes four times as much as 1.1.
    """
    weights = 1 / np.log(margin + frequencies)
    return torch.tensor(weights / (weights * frequencies).sum(), dtype=torch.float32)


def shares(loss: Loss, targets: list[Tensor], weights: Tensor | None) -> Tensor:
    """What the cross-entropy of each part of a step weighs, so that their mean is that of all pixels.

    Each part's own mean divides by what its labelled pixels weigh, which differs from part to part: the
    share is that sum, float64. OHEM's mean is of each part by itself: all alike.
    """
    if loss.kind == "ohem":
        return torch.ones(len(targets), dtype=torch.float64)
    counts = torch.stack([torch.bincount(target.flatten(), minlength=IGNORE + 1) for target in targets])
    if weights is None:
        return counts[:, :IGNORE].sum(1).double()
    return counts[:, : len(weights)].double() @ weights.double()


def presence_loss(presence: Tensor | None, target: Tensor) -> Tensor:
    """Binary cross-entropy of the SE head's logits (N, classes) against which classes are in each target.

    Raises:
        ValueError: the model has no SE head.
    """
    if presence is None:
        raise ValueError("presence is above 0, the model has no SE head")
    logits = wide(presence)
    found = logits.new_zeros(len(target), IGNORE + 1)
    found.scatter_(1, target.flatten(1).long(), 1.0)
    return F.binary_cross_entropy_with_logits(logits, found[:, : logits.shape[1]])


def lovasz_softmax(scores: Tensor, target: Tensor) -> Tensor:
    """The Lovasz extension of the mean Jaccard loss (Berman et al., arXiv 1705.08790, equations 8 to 11).

    Args:
        scores: (N, classes, H, W), floating.
        target: (N, H, W) integer class indices; 255 counts for nothing.

    Returns:
        the mean over the classes in `target`, of all images together; 0 where it has none.
    """
    labelled = target != IGNORE
    probabilities = scores.softmax(1).movedim(1, 0)[:, labelled]
    truth = F.one_hot(target[labelled].long(), scores.shape[1]).T.to(probabilities)
    truth, probabilities = (x[truth.any(1)] for x in (truth, probabilities))
    if not truth.numel():
        return scores.sum() * 0
    errors, order = (truth - probabilities).abs().sort(1, descending=True)
    found = truth.gather(1, order)
    missed, total = found.cumsum(1), found.sum(1, keepdim=True)
    wrong = (1 - found).cumsum(1)
    jaccard = 1 - (total - missed) / (total + wrong)
    steps = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    return (errors * steps).sum(1).mean()
