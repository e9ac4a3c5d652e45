"""A recipe small enough for tests, as a file and as the stage that it states."""

from __future__ import annotations

from shelfkern.data.transforms import Augmentation
from shelfkern.train.recipe import Data, Loss, Model, Optimizer, Schedule, Stage

# With fewer channels in NHWC storage oneDNN, of torch 2.13, on a CPU without AVX-512 and with one thread,
# writes beyond the memory of a weight gradient: that of a strided 1x1 convolution.
SMALLEST = dict(backbone_width=8, widths=[4, 8, 16], head_width=4)


RECIPE = """
steps = 6
batch = 2
average = 0.9
[model]
name = "shelfnet18_lw"
changes = {backbone_width = 8, widths = [4, 8, 16], head_width = 4}
[data]
dataset = "camvid"
[augmentation]
crop = [32, 48]
[loss]
class_margin = 1.1
[optimizer]
name = "adamw"
lr = 1e-3
[schedule]
warmup = 2
"""


def tiny(**changes) -> Stage:
    """The stage, with fields changed."""
    fields = dict(
        name="train",
        model=Model("shelfnet18_lw", SMALLEST),
        data=Data("camvid"),
        augmentation=Augmentation((32, 48)),
        loss=Loss(class_margin=1.1),
        optimizer=Optimizer("adamw", lr=1e-3),
        schedule=Schedule(warmup=2),
        steps=6,
        batch=2,
        average=0.9,
    )
    return Stage(**{**fields, **changes})
