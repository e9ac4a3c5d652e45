"""How raw images become what a network takes."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """(image / 255 - mean) / std of uint8 RGB images, per channel. The defaults are ImageNet's.

    Raises:
        ValueError: mean or std is not three numbers, or std not positive.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = tuple(getattr(self, name))
            numbers = all(isinstance(part, (int, float)) for part in value)
            positive = numbers and all(part > 0 for part in value)
            if len(value) != 3 or not numbers or (name == "std" and not positive):
                needs = "three numbers" if name == "mean" else "three positive numbers"
                raise ValueError(f"normalisation has the {name} {value}, it must be {needs}")
            object.__setattr__(self, name, value)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """float32 of uint8 RGB (..., 3)."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (pixels.astype(np.float32) / 255 - mean) / std
