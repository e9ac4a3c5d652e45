"""torch.compile with frozen weights, so that it folds batch norms into them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch._inductor import list_mode_options

from shelfkern.nn import ShelfNet

from . import Peer, Run
from .network import Network, channels_last

# The first call compiles, the next ones record CUDA graphs.
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The network with its images' normalisation and the argmax in one compiled graph, NHWC.

    Attributes:
        mode: mode of torch.compile.
    """

    key: str
    name: str
    mode: str
    seconds: float
    ours: bool = False

    def why_not(self) -> None:
        """None: what is missing shows when it compiles."""

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        network = Network(model, dtype, labels).to(images.device)
        images = channels_last(images)
        # A mode cannot be combined with options, so the mode's own options are passed.
        options = {"freezing": True, **list_mode_options(self.mode)}
        compiled = torch.compile(
            network.to(memory_format=torch.channels_last), dynamic=False, fullgraph=True, options=options
        )

        def run() -> Tensor:
            # Each call is a separate step: otherwise the graphs of interleaved variants are chained.
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(images)

        for _ in range(WARM_UP):
            run()
        return run


def on_cpu() -> list[Peer]:
    """Peers on a CPU."""
    return [Compiled("compile", "torch.compile, freezing", "default", 300)]


def on_gpu() -> list[Peer]:
    """Peers on a GPU, the slowest to compile last."""
    return [
        Compiled("reduce-overhead", "torch.compile reduce-overhead", "reduce-overhead", 100),
        Compiled("compile", "torch.compile", "default", 100),
        Compiled("max-autotune", "torch.compile max-autotune", "max-autotune", 240),
    ]
