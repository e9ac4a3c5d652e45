"""What a backend makes of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# An arena view to write to, or the shape to make.
Destination = Tensor | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A step bound to an implementation.

    Attributes:
        run: takes the step's inputs (the images, where it has none; then, in the arena, its temporaries)
            and its `Destination`; gives the result.
        in_arena: whether it writes into the arena; otherwise the result is a tensor of its own.
    """

    run: Callable[[Sequence[Tensor], Any], Tensor]
    in_arena: bool
