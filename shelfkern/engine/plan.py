"""The plan: a network as a static list of fused ops over activations.

A plan knows no sizes: an activation is a channel count and a stride, and becomes a shape once the
input's size is known. It holds folded float32 weights and is immutable; backends turn its steps into
kernels (`native.py`, `library.py`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Value:
    """An activation (N, channels, H / stride, W / stride), or with stride None a gate (N, channels)."""

    index: int
    channels: int
    stride: int | None

    def shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        """Logical NCHW shape for n images padded to h x w."""
        if self.stride is None:
            return (n, self.channels)
        return (n, self.channels, h // self.stride, w // self.stride)


@dataclasses.dataclass(frozen=True)
class Activation:
    """relu (slope 0), leaky relu, or with slope None nothing."""

    slope: float | None = None

    def __str__(self) -> str:
        if self.slope is None:
            return "none"
        return f"leaky_relu({self.slope:g})" if self.slope else "relu"


@dataclasses.dataclass(frozen=True)
class Step:
    """One fused op: what it reads, what it writes, and its folded weights.

    Attributes:
        name: the module it came from.
        inputs: activations read, in the op's order.
        output: activation written; never one of the inputs.
    """

    op: ClassVar[str]

    name: str
    inputs: tuple[Value, ...]
    output: Value

    @property
    def temporaries(self) -> tuple[Value, ...]:
        """Activations that live only inside the step."""
        return ()

    def macs_per_output(self) -> int:
        """Multiply-adds for each element written."""
        return 0

    def weights(self) -> tuple[Tensor, ...]:
        """The tensors it holds."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in fields if isinstance(value, Tensor))

    def detail(self) -> str:
        """What the op's name does not say: kernel, stride, activation."""
        return ""


@dataclasses.dataclass(frozen=True)
class Stem(Step):
    """max_pool3x3s2(act(scale * conv7x7s2(image) + shift)); reads the network's input."""

    op = "stem"
    weight: Tensor
    scale: Tensor
    shift: Tensor
    act: Activation

    def macs_per_output(self) -> int:
        return 4 * self.weight[0].numel()

    def detail(self) -> str:
        return f"7x7/2, {self.act}, pool 3x3/2"


@dataclasses.dataclass(frozen=True)
class Conv(Step):
    """act(scale * conv(x) + shift + residual) + skip.

    `inputs` is x, then the residual if `residual`, then the skip if `skip`.
    """

    op = "conv_bn_act"
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stride: int
    act: Activation
    residual: bool = False
    skip: bool = False

    @property
    def padding(self) -> int:
        """Padding of every side."""
        return self.weight.shape[2] // 2

    def macs_per_output(self) -> int:
        return self.weight[0].numel()

    def detail(self) -> str:
        kernel = f"{self.weight.shape[2]}x{self.weight.shape[3]}/{self.stride}"
        extras = ["+ residual"] * self.residual + [str(self.act)] + ["+ skip"] * self.skip
        return f"{kernel}, {', '.join(extras)}"


@dataclasses.dataclass(frozen=True)
class SharedBlockStep(Step):
    """h = act(scale1 * conv(x) + shift1); relu(scale2 * conv(h) + shift2 + x), + x if `skip`."""

    op = "shared_block"
    weight: Tensor
    scale1: Tensor
    shift1: Tensor
    scale2: Tensor
    shift2: Tensor
    act: Activation
    hidden: Value
    skip: bool = False

    @property
    def temporaries(self) -> tuple[Value, ...]:
        return (self.hidden,)

    def macs_per_output(self) -> int:
        return 2 * self.weight[0].numel()

    def detail(self) -> str:
        return f"3x3 twice, {self.act}, relu" + ", + x" * self.skip


@dataclasses.dataclass(frozen=True)
class AttentionGate(Step):
    """sigmoid(scale * (weight @ mean_hw(x)) + shift)."""

    op = "attention_gate"
    weight: Tensor
    scale: Tensor
    shift: Tensor

    def macs_per_output(self) -> int:
        return self.weight.shape[1]


@dataclasses.dataclass(frozen=True)
class UpsampleAdd(Step):
    """skip + gate * nearest_x2(x); `inputs` is x, skip, gate."""

    op = "upsample_add"

    def macs_per_output(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class DeconvAdd(Step):
    """conv_transpose2d(x, stride 2, padding 1, output padding 1) + bias + skip; `inputs` is x, skip."""

    op = "deconv_add"
    weight: Tensor
    bias: Tensor

    def macs_per_output(self) -> int:
        # Nine taps reach four output pixels.
        return self.weight.shape[0] * 9 // 4

    def detail(self) -> str:
        return "3x3 transposed, stride 2"


@dataclasses.dataclass(frozen=True)
class MaxPool(Step):
    """3x3 maximum, stride 2, padding 1: only where the features before it are used too."""

    op = "max_pool"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in order; the last one's output is the scores at `scores.stride`."""

    steps: tuple[Step, ...]
    num_classes: int

    @property
    def scores(self) -> Value:
        """The class scores before the final resize."""
        return self.steps[-1].output

    def last_uses(self) -> dict[Value, int]:
        """Index of the last step that reads each value; the scores outlive all steps."""
        uses = {value: index for index, step in enumerate(self.steps) for value in step.inputs}
        uses[self.scores] = len(self.steps)
        return uses

    def macs(self, n: int, h: int, w: int) -> int:
        """Multiply-adds for n images padded to h x w."""
        return sum(step_macs(step, n, h, w) for step in self.steps)

    def weight_bytes(self) -> int:
        """Bytes of all folded weights."""
        tensors = {t.data_ptr(): t for step in self.steps for t in step.weights()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def describe(self, n: int = 1, h: int = 512, w: int = 512) -> str:
        """A table of the steps with their shapes and multiply-adds for n images of h x w."""
        rows = [_row(index, step, n, h, w) for index, step in enumerate(self.steps)]
        header = ("", "op", "detail", "reads", "writes", "shape", "MMAC", "module")
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        total = f"{len(rows)} steps, {self.macs(n, h, w) / 1e9:.2f} GMAC at {n} x 3 x {h} x {w}"
        return "\n".join([*lines, f"{total}, {self.weight_bytes() / 2**20:.1f} MiB of weights"])

    def __str__(self) -> str:
        return self.describe()


def step_macs(step: Step, n: int, h: int, w: int) -> int:
    """Multiply-adds of one step for n images padded to h x w."""
    elements = 1
    for extent in step.output.shape(n, h, w):
        elements *= extent
    return elements * step.macs_per_output()


def _row(index: int, step: Step, n: int, h: int, w: int) -> tuple[str, ...]:
    reads = " ".join(f"v{value.index}" for value in step.inputs) or "image"
    shape = " x ".join(map(str, step.output.shape(n, h, w)))
    mmac = f"{step_macs(step, n, h, w) / 1e6:.1f}"
    return (str(index), step.op, step.detail(), reads, f"v{step.output.index}", shape, mmac, step.name)
