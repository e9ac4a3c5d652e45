"""The plan: a network as a static list of fused ops over activations.

A plan knows no sizes: an activation is a channel count and a stride, and becomes a shape once the
input's size is known. It holds folded float32 weights and is immutable; backends turn its steps into
kernels (`cpu/algorithms.py`, `gpu/algorithms.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..nn.extents import Extents
from ..ops.quantize import Quantum


@dataclasses.dataclass(frozen=True)
class Value:
    """An activation (N, channels, H / stride, W / stride), or with stride None a gate (N, channels).

    H and W are those that the backbone sees, `Plan.extents` of the images'.

    Gates are float32, activations of the dtype the plan runs in, or with `codes` of that: on a GPU int8 or
    float8_e4m3fn, whose steps their readers and writers know, on a CPU uint8 of a `quantum`.
    """

    index: int
    channels: int
    stride: int | None
    codes: torch.dtype | None = None
    quantum: Quantum | None = None

    def shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        """Logical NCHW shape for n images seen as h x w."""
        if self.stride is None:
            return (n, self.channels)
        return (n, self.channels, h // self.stride, w // self.stride)

    def dtype(self, activations: torch.dtype) -> torch.dtype:
        """Its dtype where activations have the one given."""
        return torch.float32 if self.stride is None else self.codes or activations

    def bytes(self, n: int, h: int, w: int, activations: torch.dtype) -> int:
        """Its bytes for n images seen as h x w."""
        return math.prod(self.shape(n, h, w)) * self.dtype(activations).itemsize


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
    def outputs(self) -> tuple[Value, ...]:
        """All that it writes: `output` first."""
        return (self.output,)

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

    def weights_dtype(self, activations: torch.dtype) -> torch.dtype:
        """Of its filters where activations have the dtype given: codes are multiplied by signed codes."""
        codes = self.inputs[0].codes if self.inputs else None
        return torch.int8 if codes is torch.uint8 else codes or activations

    def detail(self) -> str:
        """What the op's name does not say: kernel, stride, activation."""
        return ""


@dataclasses.dataclass(frozen=True)
class Stem(Step):
    """max_pool3x3s2(act(scale * conv7x7s2(image) + shift)); reads the network's input.

    Attributes:
        raw: whether it may multiply pixels as they are in 8 bits, and those of floating images as they were.
    """

    op = "stem"
    weight: Tensor
    scale: Tensor
    shift: Tensor
    act: Activation
    raw: bool = False

    def macs_per_output(self) -> int:
        return 4 * self.weight[0].numel()

    def weights_dtype(self, activations: torch.dtype) -> torch.dtype:
        return torch.int8 if self.raw else activations

    def detail(self) -> str:
        return f"7x7/2, {self.act}, pool 3x3/2" + ", of raw pixels" * self.raw


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
class _OnCodes(Step):
    """A step that reads or writes codes of 8 bits.

    Attributes:
        x_step: what one step of x's codes is; not used where x is floating.
        codes_step: what one step of the codes written is.
        copy: the result's codes where `output` is floating and others read these; where only codes are
            read, `output` is the codes.
    """

    x_step: float = 1.0
    codes_step: float = 1.0
    copy: Value | None = None

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.output,) if self.copy is None else (self.output, self.copy)

    def written(self, outputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The floating result and its codes among the tensors of `outputs`, None where there is no such."""
        if self.output.codes is not None:
            return None, outputs[0]
        return outputs[0], outputs[1] if self.copy is not None else None

    def detail(self) -> str:
        parts = [f"of {_kind(self.inputs[0])}"] if self.inputs[0].codes else []
        if self.output.codes:
            parts.append(f"to {_kind(self.output)}")
        elif self.copy is not None:
            parts.append(f"to {_kind(self.copy)} too")
        return f"{super().detail()}, {' '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class QuantizedConv(_OnCodes, Conv):
    """A convolution that reads or writes codes."""


@dataclasses.dataclass(frozen=True)
class QuantizedBlock(_OnCodes, SharedBlockStep):
    """A shared block on codes, what lies between its convolutions too.

    `inputs` is x's codes, then x, which is added floating.

    Attributes:
        hidden_step: what one step of the codes of `hidden` is.
    """

    hidden_step: float = 1.0


@dataclasses.dataclass(frozen=True)
class Quantize(Step):
    """x / codes_step as codes, or as those of the output's quantum.

    Attributes:
        codes_step: what one step of the codes is; not used where `output` has a quantum.
    """

    op = "quantize"
    codes_step: float = 1.0

    def detail(self) -> str:
        return f"to {_kind(self.output)}"


def _kind(value: Value) -> str:
    """A dtype of codes, as it is called."""
    return "fp8" if value.codes is torch.float8_e4m3fn else str(value.codes).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in order; the last one's output is the scores at `scores.stride`.

    Attributes:
        extents: what becomes of the height and width of images.
        dtype: of activations, for `describe`.
        algorithms: what runs each step for n images seen as h x w, for `describe`; None where no
            program is bound to the plan.
    """

    steps: tuple[Step, ...]
    num_classes: int
    extents: Extents = dataclasses.field(default_factory=Extents)
    dtype: torch.dtype = torch.float32
    algorithms: Callable[[int, int, int], Sequence[str]] | None = dataclasses.field(
        default=None, compare=False
    )

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
        """Multiply-adds for n images seen as h x w."""
        return sum(step_macs(step, n, h, w) for step in self.steps)

    def weight_bytes(self) -> int:
        """Bytes of all folded weights."""
        tensors = {t.data_ptr(): t for step in self.steps for t in step.weights()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def describe(self, n: int = 1, h: int = 512, w: int = 512) -> str:
        """A table of the steps for n images of h x w: algorithms, least traffic and arithmetic."""
        h, w = self.extents.seen(h, w)
        chosen = self.algorithms(n, h, w) if self.algorithms else [""] * len(self.steps)
        rows = [_row(index, step, self.dtype, n, h, w) for index, step in enumerate(self.steps)]
        rows = [(*row[:6], name, *row[6:]) for row, name in zip(rows, chosen, strict=True)]
        header = ("", "op", "detail", "reads", "writes", "shape", "algorithm", "MB", "MFLOP", "module")
        used = [column for column, title in enumerate(header) if self.algorithms or title != "algorithm"]
        widths = {column: max(len(row[column]) for row in [header, *rows]) for column in used}
        lines = ["  ".join(row[column].ljust(widths[column]) for column in used) for row in [header, *rows]]
        moved = sum(step_bytes(step, self.dtype, n, h, w) for step in self.steps) / 1e6
        total = f"{len(rows)} steps, {2 * self.macs(n, h, w) / 1e9:.2f} GFLOP, {moved:.1f} MB"
        total += f" at {n} x 3 x {h} x {w}"
        lines = [line.rstrip() for line in lines]
        return "\n".join([*lines, f"{total}, {self.weight_bytes() / 2**20:.1f} MiB of weights in float32"])

    def __str__(self) -> str:
        return self.describe()


def step_macs(step: Step, n: int, h: int, w: int) -> int:
    """Multiply-adds of one step for n images seen as h x w."""
    return math.prod(step.output.shape(n, h, w)) * step.macs_per_output()


def step_bytes(step: Step, dtype: torch.dtype, n: int, h: int, w: int) -> int:
    """The least traffic of one step: everything read and written once, activations and weights of `dtype`.

    An image is counted in `dtype` too; codes, and the weights they are multiplied by, in a byte.
    """
    values = {*step.inputs, *step.outputs}
    moved = sum(value.bytes(n, h, w, dtype) for value in values)
    # Filters in the plan's dtype, scales and shifts in float32.
    filters = step.weights_dtype(dtype).itemsize
    moved += sum(t.numel() * (filters if t.ndim > 1 else 4) for t in step.weights())
    return moved if step.inputs else moved + n * 3 * h * w * dtype.itemsize


def _called(value: Value) -> str:
    return f"v{value.index}" + f":{_kind(value)}" * (value.quantum is not None)


def _row(index: int, step: Step, dtype: torch.dtype, n: int, h: int, w: int) -> tuple[str, ...]:
    reads = " ".join(map(_called, step.inputs)) or "image"
    shape = " x ".join(map(str, step.output.shape(n, h, w)))
    writes = " ".join(map(_called, step.outputs))
    mflop = f"{2 * step_macs(step, n, h, w) / 1e6:.1f}"
    moved = f"{step_bytes(step, dtype, n, h, w) / 1e6:.2f}"
    return (str(index), step.op, step.detail(), reads, writes, shape, moved, mflop, step.name)
