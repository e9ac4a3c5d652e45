"""Labels of images by a protocol, without full-size scores."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..engine import FastShelfNet
from ..nn import ShelfNet
from ..nn.extents import STRIDE
from ..ops import upsample_argmax, upsample_softmax_sum
from .protocol import Protocol


class Labeller:
    """A network in eval mode that gives labels by a protocol.

    Images are resized by Pillow, bilinear, as raw 8-bit RGB; shrinking averages. At every scale the
    whole image is padded with the mean colour to the multiples that the network itself pads to; windows
    beyond the image's edge are padded with black, as published. Mirrored, an image is padded first. Scores
    stay at the network's own resolution: `upsample_softmax_sum` adds their resize to one sum at the image's
    size, or, for windows, at the resized image's, which is resized class by class.

    Args:
        model: a ShelfNet or an accelerated one, on any device.
        protocol: scales, mirror, windows.

    Raises:
        TypeError: model is neither.
    """

    def __init__(self, model: ShelfNet | FastShelfNet, protocol: Protocol) -> None:
        if not isinstance(model, (ShelfNet, FastShelfNet)):
            kind = type(model).__qualname__
            raise TypeError(f"model is a {kind}, it may be a ShelfNet or what accelerate gives")
        self.model, self.protocol = model, protocol
        if isinstance(model, FastShelfNet):
            self.num_classes, self._extents = model.plan.num_classes, model.plan.extents
            # Of the images: it takes float32 whatever its own dtype.
            self._dtype, self.device = torch.float32, model.device
        else:
            weight = next(model.parameters())
            self.num_classes, self._extents = model.config.num_classes, model.config.extents
            self._dtype, self.device = weight.dtype, weight.device
        self._align = model.align_corners
        self._sum_dtype = torch.promote_types(self._dtype, torch.float32)
        statistics = model.normalisation.mean, model.normalisation.std
        self._mean, self._std = torch.tensor(statistics, dtype=self._sum_dtype, device=self.device)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Labels (H, W) uint8 (int64 beyond 256 classes) of raw uint8 RGB (H, W, 3)."""
        return self.of_batch(pixels[None])[0]

    @torch.no_grad()
    def of_batch(self, images: np.ndarray) -> np.ndarray:
        """The same of several images: labels (N, H, W) of raw RGB (N, H, W, 3).

        The network sees them together where the protocol shows it each once and whole, else one by one.
        """
        height, width = images.shape[1:3]
        images = _writable(images)
        if not self.protocol.is_plain or self.num_classes > 256:
            labels = torch.cat([self.sums(pixels).argmax(1) for pixels in images])
            labels = labels if self.num_classes > 256 else labels.to(torch.uint8)
        elif isinstance(self.model, FastShelfNet) and min(height, width) >= STRIDE:
            labels = self.model.predict(torch.from_numpy(images).to(self.device))
        else:
            x = self._padded(self._normalised(images))
            full = (x.shape[2], x.shape[3])
            labels = upsample_argmax(self.model.coarse_scores(x), full, (height, width), self._align)
        return labels.cpu().numpy()

    @torch.no_grad()
    def sums(self, pixels: np.ndarray) -> Tensor:
        """Class probabilities of raw uint8 RGB (H, W, 3), for windows exp(scores), summed over all passes.

        Returns:
            (1, classes, H, W) float32, of a model in float64 float64, on the model's device.

        Raises:
            RuntimeError: the scores, or exp of them, are not finite.
        """
        shape = (1, self.num_classes, *pixels.shape[:2])
        total = torch.zeros(shape, dtype=self._sum_dtype, device=self.device)
        add = self._add_whole if self.protocol.crop_size is None else self._add_windows
        pixels = _writable(pixels)
        for scale in self.protocol.scales:
            add(total, pixels, scale)
        if not total.isfinite().all():
            raise RuntimeError(
                "scores, or for windows exp of them, are not finite: windows need scores below 88"
            )
        return total

    def _add_whole(self, total: Tensor, pixels: np.ndarray, scale: float) -> None:
        height, width = pixels.shape[:2]
        scaled = _resized(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
        x = self._padded(self._normalised(scaled[None]))
        # What the padded image would be at scale 1, and no less than the image.
        full = (max(height, round(x.shape[2] / scale)), max(width, round(x.shape[3] / scale)))
        self._add_passes(x, full, total, exp=False)

    def _add_windows(self, total: Tensor, pixels: np.ndarray, scale: float) -> None:
        height, width = self.protocol.window_size(pixels.shape[0], pixels.shape[1], scale)
        rows, columns = self._starts(height), self._starts(width)
        side = self.protocol.crop_size
        assert side is not None
        beyond = ((0, rows[-1] + side - height), (0, columns[-1] + side - width), (0, 0))
        x = self._normalised(np.pad(_resized(pixels, height, width), beyond)[None])
        sums = total.new_zeros((1, self.num_classes, height, width))
        for top in rows:
            for left in columns:
                here = np.s_[:, :, top : top + side, left : left + side]
                self._add_passes(x[here], (side, side), sums[here], exp=True)
        sums /= _cover(rows, side, height).outer(_cover(columns, side, width)).to(sums)
        for one in range(self.num_classes):
            part = sums[:, one : one + 1]
            total[:, one : one + 1] += F.interpolate(
                part, total.shape[2:], mode="bilinear", align_corners=self._align
            )

    def _starts(self, extent: int) -> list[int]:
        """Where windows begin along an extent; the last one reaches its end."""
        assert self.protocol.crop_size is not None
        steps = math.ceil(max(0, extent - self.protocol.crop_size) / self.protocol.stride())
        return [step * self.protocol.stride() for step in range(steps + 1)]

    def _add_passes(self, x: Tensor, full: tuple[int, int], out: Tensor, exp: bool) -> None:
        for mirror in (False, True) if self.protocol.mirror else (False,):
            scores = self.model.coarse_scores(x.flip(3) if mirror else x)
            upsample_softmax_sum(scores, full, out, mirror=mirror, exp=exp, align_corners=self._align)

    def _normalised(self, images: np.ndarray) -> Tensor:
        raw = torch.from_numpy(images).to(self.device)
        x = (raw.to(self._sum_dtype) / 255 - self._mean) / self._std
        return x.permute(0, 3, 1, 2).to(self._dtype)

    def _padded(self, x: Tensor) -> Tensor:
        height, width = self._extents.padded(max(x.shape[2], STRIDE), max(x.shape[3], STRIDE))
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


def _writable(pixels: np.ndarray) -> np.ndarray:
    """As torch takes arrays: writable, though nobody writes, and contiguous."""
    return np.require(pixels, requirements=("C", "W"))


def _resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _cover(starts: list[int], side: int, extent: int) -> Tensor:
    """How many windows cover each pixel along an extent."""
    count = torch.zeros(extent)
    for start in starts:
        count[start : start + side] += 1
    return count
