"""shelfkern: ShelfNet for fast semantic segmentation, with fused kernels.

model = shelfkern.nn.from_weights("camvid")
fast = shelfkern.accelerate(model)
labels = fast.predict(images)

The submodules checkpoints, data, evaluate, train and visualise are imported when first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import nn, ops
from .engine import FastShelfNet, accelerate, load
from .nn import fuse_for_training
from .version import __version__

if _TYPE_CHECKING:
    from . import checkpoints as checkpoints
    from . import data as data
    from . import evaluate as evaluate
    from . import train as train
    from . import visualise as visualise

__all__ = ["FastShelfNet", "__version__", "accelerate", "fuse_for_training", "load", "nn", "ops"]

_LAZY = ("checkpoints", "data", "evaluate", "train", "visualise")


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
