"""The plan: a network as a static list of fused ops over activations.

A plan has no sizes: an activation is a channel count and a stride, and gets a shape once the input's size is
known. A plan holds folded float32 weights and is immutable; the backends turn its steps into kernels
(`cpu/algorithms.py`, `gpu/algorithms.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..nn.extents import STRIDE, Extents
from ..ops.quantize import LARGEST, Quantum

# Channels and stride of an activation.
Form = tuple[int, int | None]


@dataclasses.dataclass(frozen=True)
class Value:
    """An activation (N, channels, H / stride, W / stride), or with stride None a gate (N, channels).

    H and W are the size that the backbone sees: `Plan.extents` of the images' size.

    Gates are float32. Activations have the dtype the plan runs in, or the dtype `codes`: on a GPU int8 or
    float8_e4m3fn, whose steps are stored in the steps that read and write them; on a CPU uint8 with a
    `quantum`.
    """

    index: int
    channels: int
    stride: int | None
    codes: torch.dtype | None = None
    quantum: Quantum | None = None

    @property
    def form(self) -> Form:
        """Its channels and stride."""
        return self.channels, self.stride

    def check(self) -> None:
        """Raises ValueError if there can be no such activation."""
        # Heights and widths are multiples of STRIDE.
        whole = self.stride is None or (self.stride > 0 and STRIDE % self.stride == 0)
        if self.index < 0 or self.channels < 1 or not whole:
            raise ValueError(f"v{self.index} has {_named(self.form)}")
        kinds = (None, *LARGEST) if self.quantum is None else (torch.uint8,)
        if self.codes not in kinds or (self.stride is None and self.codes is not None):
            raise ValueError(f"v{self.index} has codes of {self.codes} and the quantum {self.quantum}")
        if self.quantum is not None and not (_is_step(self.quantum.step) and 0 <= self.quantum.zero <= 255):
            raise ValueError(f"v{self.index} has the quantum {self.quantum}")

    def shape(self, n: int, h: int, w: int) -> tuple[int, ...]:
        """Logical NCHW shape for n images seen as h x w."""
        if self.stride is None:
            return (n, self.channels)
        return (n, self.channels, h // self.stride, w // self.stride)

    def dtype(self, activations: torch.dtype) -> torch.dtype:
        """dtype of this value, given the plan's dtype of activations."""
        return torch.float32 if self.stride is None else self.codes or activations

    def bytes(self, n: int, h: int, w: int, activations: torch.dtype) -> int:
        """Size in bytes for n images seen as h x w."""
        return math.prod(self.shape(n, h, w)) * self.dtype(activations).itemsize


@dataclasses.dataclass(frozen=True)
class Activation:
    """relu (slope 0), leaky relu, or with slope None no activation."""

    slope: float | None = None

    def __str__(self) -> str:
        if self.slope is None:
            return "none"
        return f"leaky_relu({self.slope:g})" if self.slope else "relu"


@dataclasses.dataclass(frozen=True)
class Step:
    """One fused op: its inputs, its outputs, and its folded weights.

    Attributes:
        name: name of the module it came from.
        inputs: activations read, in the op's order.
        output: activation written; never one of the inputs.
    """

    op: ClassVar[str]

    name: str
    inputs: tuple[Value, ...]
    output: Value

    @property
    def outputs(self) -> tuple[Value, ...]:
        """All values that the step writes, `output` first."""
        return (self.output,)

    @property
    def temporaries(self) -> tuple[Value, ...]:
        """Activations that live only inside the step."""
        return ()

    def made(self) -> Form:
        """Channels and stride of what the op makes of its inputs.

        Raises:
            ValueError: inputs and weights do not fit each other.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError unless inputs, weights and what it writes fit each other: kernels rely on it."""
        made = self.made()
        for value in (*self.outputs, *self.temporaries):
            value.check()
            if value.form != made:
                raise ValueError(f"{self.name} writes {_named(value.form)}, its inputs make {_named(made)}")
        if not self._has_kernel():
            kinds = ", ".join(f"v{value.index} {value.codes}" for value in (*self.inputs, *self.outputs))
            raise ValueError(f"{self.name} has no kernel for such codes: {kinds}")

    def _has_kernel(self) -> bool:
        """Whether there is one for what it reads and writes as codes and what floating."""
        values = (*self.inputs, *self.outputs, *self.temporaries)
        return {value.codes for value in values if value.stride is not None} in ({None}, {torch.uint8})

    def _reads(self, features: int, gates: int = 0) -> list[tuple[int, int]]:
        """Channels and stride of the features that it reads, as many as given, then gates."""
        found = [(value.channels, value.stride) for value in self.inputs if value.stride is not None]
        if [v.stride is None for v in self.inputs] != [False] * features + [True] * gates:
            needs = f"{features} and {gates} gates" if gates else f"{features}"
            raise ValueError(f"{self.name} reads {len(found)} of {len(self.inputs)} inputs, it needs {needs}")
        return found

    def _expect(self, shape: tuple[int, ...], *weights: Tensor | None) -> None:
        for weight in weights:
            if weight is not None and tuple(weight.shape) != shape:
                raise ValueError(f"{self.name} has weights of {tuple(weight.shape)}, they must be {shape}")

    def _expect_added(self, added: Sequence[Form], made: Form) -> None:
        for form in added:
            if form != made:
                raise ValueError(f"{self.name} adds {_named(form)} to {_named(made)}")

    def _expect_slope(self, act: Activation) -> None:
        # The kernels for unsigned codes take the larger of x and slope * x.
        most = 1 if torch.uint8 in {value.codes for value in (*self.inputs, *self.outputs)} else math.inf
        if act.slope is not None and not (0 <= act.slope <= most and math.isfinite(act.slope)):
            may = "from 0 to 1 where results are unsigned 8-bit values" if most == 1 else "finite and from 0"
            raise ValueError(f"{self.name} has an activation of the slope {act.slope}, it must be {may}")

    def macs_per_output(self) -> int:
        """Multiply-adds per element written."""
        return 0

    def weights(self) -> tuple[Tensor, ...]:
        """The weight tensors of the step."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in fields if isinstance(value, Tensor))

    def weights_dtype(self, activations: torch.dtype) -> torch.dtype:
        """dtype of the filters, given the activations' dtype: quantized activations use 8-bit weights."""
        codes = self.inputs[0].codes if self.inputs else None
        return torch.int8 if codes is torch.uint8 else codes or activations

    def detail(self) -> str:
        """What the op's name does not say: kernel size, stride, activation."""
        return ""


@dataclasses.dataclass(frozen=True)
class Stem(Step):
    """max_pool3x3s2(act(scale * conv7x7s2(image) + shift)); reads the network's input.

    Attributes:
        raw: whether it may multiply unnormalised 8-bit pixels, recovered from floating images if necessary.
    """

    op = "stem"
    weight: Tensor
    scale: Tensor
    shift: Tensor
    act: Activation
    raw: bool = False

    def made(self) -> Form:
        self._reads(0)
        channels = self.output.channels
        self._expect((channels, 3, 7, 7), self.weight)
        self._expect((channels,), self.scale, self.shift)
        self._expect_slope(self.act)
        return channels, 4

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
        """Padding on each side."""
        return self.weight.shape[2] // 2

    def made(self) -> Form:
        others = self.residual + self.skip
        (read, stride), *added = self._reads(1 + others) if self.inputs or others else [(3, 1)]
        channels, kernel = self.output.channels, self.weight.shape[-1:]
        self._expect((channels, read, *kernel, *kernel), self.weight)
        if kernel[0] % 2 == 0 or self.stride not in (1, 2):
            raise ValueError(f"{self.name} has the kernel {kernel[0]} and the stride {self.stride}")
        self._expect((channels,), self.scale, self.shift)
        self._expect_slope(self.act)
        made = channels, stride * self.stride
        self._expect_added(added, made)
        return made

    def _has_kernel(self) -> bool:
        if {value.codes for value in self.inputs} == {torch.uint8}:
            return self.output.codes in (None, torch.uint8)
        return self.output.codes is None and super()._has_kernel()

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
    # In which it reads x.
    forms: ClassVar[int] = 1

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

    def made(self) -> Form:
        (channels, stride), *added = self._reads(self.forms)
        self._expect((channels, channels, 3, 3), self.weight)
        self._expect((channels,), self.scale1, self.shift1, self.scale2, self.shift2)
        self._expect_slope(self.act)
        self._expect_added(added, (channels, stride))
        return channels, stride

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

    def made(self) -> Form:
        ((read, _),) = self._reads(1)
        channels = self.output.channels
        self._expect((channels, read), self.weight)
        self._expect((channels,), self.scale, self.shift)
        return channels, None

    def macs_per_output(self) -> int:
        return self.weight.shape[1]


@dataclasses.dataclass(frozen=True)
class UpsampleAdd(Step):
    """skip + gate * nearest_x2(x); `inputs` is x, skip, gate."""

    op = "upsample_add"

    def made(self) -> Form:
        (channels, stride), skip = self._reads(2, gates=1)
        if self.inputs[2].channels != channels:
            raise ValueError(f"{self.name} has a gate of {self.inputs[2].channels} channels for {channels}")
        self._expect_added([skip], (channels, stride // 2))
        return skip

    def macs_per_output(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class DeconvAdd(Step):
    """conv_transpose2d(x, stride 2, padding 1, output padding 1) + bias + skip; `inputs` is x, skip."""

    op = "deconv_add"
    weight: Tensor
    bias: Tensor

    def made(self) -> Form:
        (read, stride), skip = self._reads(2)
        channels = self.output.channels
        self._expect((read, channels, 3, 3), self.weight)
        self._expect((channels,), self.bias)
        self._expect_added([skip], (channels, stride // 2))
        return skip

    def macs_per_output(self) -> int:
        # The nine taps are shared by four output pixels.
        return self.weight.shape[0] * 9 // 4

    def detail(self) -> str:
        return "3x3 transposed, stride 2"


@dataclasses.dataclass(frozen=True)
class MaxPool(Step):
    """3x3 maximum, stride 2, padding 1: only where the features before pooling are used too."""

    op = "max_pool"

    def made(self) -> Form:
        ((channels, stride),) = self._reads(1)
        return channels, 2 * stride

    def _has_kernel(self) -> bool:
        return self.output.codes is None and super()._has_kernel()


@dataclasses.dataclass(frozen=True)
class _OnCodes(Step):
    """A step that reads or writes 8-bit values.

    Attributes:
        x_step: quantization step of x; not used where x is floating.
        codes_step: quantization step of the 8-bit result.
        copy: the 8-bit result where `output` is floating and other steps read both; where only the 8-bit
            result is read, it is `output`.
    """

    x_step: float = 1.0
    codes_step: float = 1.0
    copy: Value | None = None

    @property
    def outputs(self) -> tuple[Value, ...]:
        return (self.output,) if self.copy is None else (self.output, self.copy)

    def check(self) -> None:
        super().check()
        if not (_is_step(self.x_step) and _is_step(self.codes_step)):
            raise ValueError(f"{self.name} has codes of the steps {self.x_step} and {self.codes_step}")

    def _has_kernel(self) -> bool:
        kinds = {value.codes for value in (*self.inputs[:1], *self.outputs)} - {None}
        added = {value.codes for value in self.inputs[1:]}
        only_copy = self.copy is None or (self.output.codes is None and self.copy.codes is not None)
        return len(kinds) == 1 and kinds <= LARGEST.keys() and added <= {None} and only_copy

    def written(self, outputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The floating and the 8-bit result among the tensors of `outputs`, None for a missing one."""
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
    """A convolution that reads or writes 8-bit values."""


@dataclasses.dataclass(frozen=True)
class QuantizedBlock(_OnCodes, SharedBlockStep):
    """A shared block on 8-bit values, including the intermediate between its convolutions.

    `inputs` is the 8-bit x, then the floating x for the additions.

    Attributes:
        hidden_step: quantization step of `hidden`.
    """

    forms = 2
    hidden_step: float = 1.0

    def check(self) -> None:
        super().check()
        if not _is_step(self.hidden_step):
            raise ValueError(f"{self.name} has hidden codes of the step {self.hidden_step}")

    def _has_kernel(self) -> bool:
        kind = self.inputs[0].codes
        return kind is not None and kind is self.hidden.codes and super()._has_kernel()


@dataclasses.dataclass(frozen=True)
class Quantize(Step):
    """x / codes_step as 8-bit values, or uint8 with the output's quantum.

    Attributes:
        codes_step: quantization step; not used where `output` has a quantum.
    """

    op = "quantize"
    codes_step: float = 1.0

    def made(self) -> Form:
        (form,) = self._reads(1)
        return form

    def check(self) -> None:
        super().check()
        if not _is_step(self.codes_step):
            raise ValueError(f"{self.name} has codes of the step {self.codes_step}")

    def _has_kernel(self) -> bool:
        return self.inputs[0].codes is None and self.output.codes is not None

    def detail(self) -> str:
        return f"to {_kind(self.output)}"


def _is_step(step: float) -> bool:
    return 0 < step < math.inf


def _named(form: Form) -> str:
    channels, stride = form
    return (
        f"{channels} channels of a gate" if stride is None else f"{channels} channels at the stride {stride}"
    )


def _kind(value: Value) -> str:
    """Short name of an 8-bit dtype."""
    return "fp8" if value.codes is torch.float8_e4m3fn else str(value.codes).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps in order; the last one's output is the scores at `scores.stride`.

    Attributes:
        extents: maps the images' height and width to the size that the backbone sees.
        dtype: dtype of activations, for `describe`.
        algorithms: name of each step's algorithm for n images seen as h x w, for `describe`; None where no
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

    def check(self, codes: torch.dtype | None = None) -> None:
        """Raises ValueError unless all steps fit what they read and write: kernels rely on it.

        codes: the dtype of codes: on a CPU uint8; None of a plan that has none.
        """
        if not self.steps:
            raise ValueError("there are no steps")
        known: set[Value] = set()
        taken: set[int] = set()
        for step in self.steps:
            if not known.issuperset(step.inputs):
                raise ValueError(f"{step.name} reads what no step before it wrote")
            step.check()
            for value in (*step.outputs, *step.temporaries):
                if value.index in taken:
                    raise ValueError(f"{step.name} writes v{value.index}, which is written already")
                taken.add(value.index)
            known.update(step.outputs)
        found = {value.codes for value in known} - {None}
        if found != {codes} - {None}:
            raise ValueError(f"the steps have codes of {', '.join(map(str, found))}, not of {codes}")
        scores = self.scores
        if scores.stride is None or scores.codes is not None or scores.channels != self.num_classes:
            raise ValueError(f"the scores have {_named(scores.form)}, of {self.num_classes} classes")

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
        """A table of the steps for n images of h x w: algorithms, minimum traffic and arithmetic."""
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
    """The minimum traffic of one step: everything read and written once, activations and weights of `dtype`.

    Images also count in `dtype`; 8-bit values, and the weights they are multiplied by, count one byte.
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
