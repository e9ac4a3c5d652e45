"""shelfkern: ShelfNet for fast semantic segmentation, with fused kernels.

model = shelfkern.nn.from_weights("camvid")
fast = shelfkern.accelerate(model)
labels = fast.predict(images)
"""

from . import nn, ops
from .engine import FastShelfNet, accelerate, load
from .nn import fuse_for_training
from .version import __version__

__all__ = ["FastShelfNet", "__version__", "accelerate", "fuse_for_training", "load", "nn", "ops"]
