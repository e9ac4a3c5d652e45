"""What one way to run a step on a CPU is, and what those of all kinds of steps share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import native
from ...nn.extents import Extents
from ...normalisation import Normalisation
from ...ops.stem import NATIVE_IMAGES
from ..image import Extent, image_size

# inputs (the images, where a step has none), outputs in the arena, and memory to work in; gives a result of
# its own, or None.
Run = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor | None]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way to run a step at one size.

    Attributes:
        name: its family, and what tells it from others of that: "native winograd 4x4".
        microseconds: what it should take on one core.
        prepare: packs the weights, once for all sizes and algorithms that read them alike; gives what runs.
        in_arena: whether it writes into the arena; otherwise the result is a tensor of the library's.
        scratch: bytes of memory it works in.
    """

    name: str
    microseconds: float
    prepare: Callable[[], Run]
    in_arena: bool = True
    scratch: int = 0


@dataclasses.dataclass(frozen=True)
class Context:
    """What a program's steps have in common.

    Attributes:
        dtype: of activations that are not codes.
        normalisation: of raw images.
        extents: what becomes of the height and width of images.
        ours, theirs: whether our kernels and the library's calls may run.
    """

    dtype: torch.dtype
    normalisation: Normalisation
    extents: Extents = dataclasses.field(default_factory=Extents)
    ours: bool = True
    theirs: bool = True

    def unavailable(self, op: str) -> str | None:
        """Why the native kernel of an op cannot run, None if it can."""
        return native.reason(op) if self.ours else "backend is 'library'"


def stem_image(image: Tensor, context: Context) -> tuple[Tensor, Extent | None]:
    """Checked images as our stem reads them, and what they are padded to where it is to enlarge them."""
    _, h, w = image_size(image)
    padded = context.extents.padded(h, w) if context.extents.enlarges else None
    return (image if image.dtype in NATIVE_IMAGES else image.float()).contiguous(), padded


# Algorithms of a step, and why others are not among them.
Found = tuple[list[Algorithm], list[str]]


def no_scratch(run: Callable[[Sequence[Tensor], Tensor], None]) -> Run:
    """What runs, of a function of the inputs and the output."""
    return lambda inputs, outputs, scratch: run(inputs, outputs[0])
