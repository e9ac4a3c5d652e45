"""How images are shown to a network that is judged: scales, mirror image, windows."""

from __future__ import annotations

import dataclasses
import math

PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How labels are made, and what is measured.

    Without `crop_size` the network sees the whole image at every scale, and its class probabilities are
    averaged. With it, as published for ShelfNet50 and 101: the image is resized so that its longer side
    has `base_size` * scale pixels, cut into windows of `crop_size` that advance by two thirds of it, and
    exp(scores) are summed, averaged where windows overlap.

    Attributes:
        scales: of the image; each is one pass over it.
        mirror: whether every pass is made of the mirror image too.
        base_size: longer side at scale 1 in pixels, with `crop_size` only.
        crop_size: side of the square windows in pixels, a multiple of 32; None for the whole image.
        boundary: whether the boundary F1 score is measured.
        tolerance: of that score, as a fraction of the image's diagonal.

    Raises:
        ValueError: a field cannot be so; the message names it.
    """

    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False
    base_size: int | None = None
    crop_size: int | None = None
    boundary: bool = False
    tolerance: float = 0.0075

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or not all(_is_number(scale) and 0 < scale <= 16 for scale in self.scales):
            raise ValueError(f"scales is {self.scales}, it may be one or more numbers above 0, up to 16")
        if (self.base_size is None) != (self.crop_size is None):
            given, missing = (
                ("base_size", "crop_size") if self.crop_size is None else ("crop_size", "base_size")
            )
            raise ValueError(f"{given} is {getattr(self, given)} and {missing} None, windows need both")
        if self.base_size is not None and not (isinstance(self.base_size, int) and self.base_size >= 1):
            raise ValueError(f"base_size is {self.base_size!r}, it may be any integer from 1")
        crop = self.crop_size
        if crop is not None and not (isinstance(crop, int) and crop >= 32 and crop % 32 == 0):
            raise ValueError(f"crop_size is {crop!r}, it may be a multiple of 32 from 32")
        if not _is_number(self.tolerance) or not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance!r}, it may be between 0 and 1")

    @property
    def is_plain(self) -> bool:
        """Whether the network sees each image once, whole and at its own size."""
        return self.scales == (1.0,) and not self.mirror and self.crop_size is None

    def stride(self) -> int:
        """Pixels from one window to the next: two thirds of `crop_size`, rounded down."""
        assert self.crop_size is not None
        return self.crop_size * 2 // 3

    def window_size(self, height: int, width: int, scale: float) -> tuple[int, int]:
        """Height and width of an image resized for windows; the longer side is rounded up."""
        assert self.base_size is not None
        longer = math.ceil(self.base_size * scale)
        shorter = max(1, math.floor(min(height, width) * longer / max(height, width) + 0.5))
        return (longer, shorter) if height > width else (shorter, longer)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# "published" windows have the size of the crops that the published models were trained on.
PROTOCOLS = {
    "single": Protocol(),
    "published": Protocol(PUBLISHED_SCALES, mirror=True, base_size=512, crop_size=512),
}
