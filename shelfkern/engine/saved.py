"""Accelerated networks in files: a plan with its folded weights, and what its codes stand for.

A file is a safetensors one: the weights in float32, and in its metadata the plan as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..nn.extents import Extents
from ..normalisation import Normalisation
from ..ops.quantize import Quantum
from . import plan as p

# Of the form that `_encoded` gives: of another number a file is refused.
FORMAT = 1
KEY = "shelfkern_plan"

STEPS = (
    p.Stem,
    p.Conv,
    p.SharedBlockStep,
    p.AttentionGate,
    p.UpsampleAdd,
    p.DeconvAdd,
    p.MaxPool,
    p.QuantizedConv,
    p.QuantizedBlock,
    p.Quantize,
)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a network beside its plan.

    Attributes:
        normalisation: of raw images.
        align_corners: of the final resize.
        classes: a name per class, where known.
        palette: an (r, g, b) per class, where known.
    """

    normalisation: Normalisation
    align_corners: bool
    classes: tuple[str, ...] | None
    palette: tuple[tuple[int, int, int], ...] | None


RECORDS = {
    kind.__name__: kind for kind in (*STEPS, p.Value, p.Activation, Quantum, Extents, Facts, Normalisation)
}


@dataclasses.dataclass(frozen=True)
class Saved:
    """An accelerated network without its model.

    Attributes:
        plan: its weights may lie in `file`.
        dtype: as `accelerate` was asked for.
        on_gpu: whether the plan is for a GPU's kernels, where it is of 8 bits.
        facts: the model's.
        file: what was read, mapped.
    """

    plan: p.Plan
    dtype: torch.dtype
    on_gpu: bool
    facts: Facts
    file: _Mapped | None = None

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file in one step.

        Raises:
            OSError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        plan = self.plan
        parts = dict(steps=plan.steps, num_classes=plan.num_classes, extents=plan.extents)
        parts |= dict(dtype=self.dtype, on_gpu=self.on_gpu, facts=self.facts)
        about = {"format": FORMAT, **{name: _encoded(part, tensors) for name, part in parts.items()}}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {KEY: json.dumps(about)})

    def forget(self, step: p.Step) -> None:
        """Takes the pages of a step's weights out of memory: the next to read them has them from the file."""
        if self.file is not None:
            for weight in step.weights():
                self.file.forget(weight)


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds an accelerated network, of this version or another."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_saved(path: str | os.PathLike[str]) -> Saved:
    """The network in a file of `Saved.write`, its weights mapped: the file may be replaced, not overwritten.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: the file is cut short, or none of this library's, or of another version of it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file, it must be one that FastShelfNet.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        about = json.loads(metadata.get(KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise RuntimeError(f"{path} is cut short or no accelerated network ({error})") from error
    if about is None:
        raise RuntimeError(f"{path} has no plan in its metadata, FastShelfNet.save writes one that has")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise RuntimeError(f"{path} has the format {found}, this version reads {FORMAT}: save it again")
    try:
        mapped = _Mapped(path)
        found = _decoded(about, mapped.tensors)
        _check(found["steps"])
        plan = p.Plan(found["steps"], found["num_classes"], found["extents"])
        return Saved(plan, found["dtype"], found["on_gpu"], found["facts"], mapped)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RuntimeError(f"{path} is no accelerated network that fits together ({error})") from error


class _Mapped:
    """The tensors of a safetensors file, in pages that are read when they are looked at.

    The map is private and never written, so that pages can be dropped at any time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with Path(path).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + size])
        header.pop("__metadata__")
        self._begin = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self.tensors = {name: self._tensor(entry, 8 + size) for name, entry in header.items()}

    def _tensor(self, entry: dict[str, Any], start: int) -> Tensor:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32":
            raise ValueError(f"a weight is {entry['dtype']}")
        count = (end - begin) // torch.float32.itemsize
        if not count:
            return torch.empty(shape)
        return torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=start + begin).view(shape)

    def forget(self, tensor: Tensor) -> None:
        """Drops the pages that hold nothing but this tensor."""
        begin = tensor.data_ptr() - self._begin
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def __reduce__(self) -> Any:
        # Copies and pickles hold their weights themselves.
        return type(None), ()


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON has it; tensors go to `tensors`, those that several steps hold once."""
    if isinstance(value, Tensor):
        return {"tensor": _name(value, tensors)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    if dataclasses.is_dataclass(value):
        fields = {f.name: _encoded(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return {"record": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encoded(part, tensors) for part in value]
    return value


def _name(value: Tensor, tensors: dict[str, Tensor]) -> str:
    for name, known in tensors.items():
        if known.data_ptr() == value.data_ptr() and known.shape == value.shape:
            return name
    name = str(len(tensors))
    tensors[name] = value.contiguous()
    return name


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_encoded` encoded."""
    if isinstance(value, list):
        return tuple(_decoded(part, tensors) for part in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor"}:
        return tensors[value["tensor"]]
    if value.keys() == {"dtype"}:
        return getattr(torch, value["dtype"])
    if value.keys() == {"fraction"}:
        return Fraction(*value["fraction"])
    parts = {name: _decoded(part, tensors) for name, part in value.items() if name != "record"}
    return RECORDS[value["record"]](**parts) if "record" in value else parts


def _check(steps: tuple[Any, ...]) -> None:
    """Raises ValueError unless weights and strides fit what is read and written: kernels rely on it."""
    known: set[p.Value] = set()
    for step in steps:
        if not isinstance(step, STEPS):
            raise ValueError(f"a step is {type(step).__name__}")
        if not known.issuperset(step.inputs):
            raise ValueError(f"{step.name} reads what no step before it wrote")
        known.update(step.outputs)
        read = step.inputs[0].channels if step.inputs else 3
        written = step.output.channels
        square = (read, written) if isinstance(step, p.DeconvAdd) else (written, read)
        for weight in step.weights():
            if tuple(weight.shape[:2]) != (square if weight.ndim > 1 else (written,)):
                raise ValueError(f"{step.name} has weights of {tuple(weight.shape)}")
        if isinstance(step, p.Conv) and step.output.stride != step.stride * _stride(step):
            raise ValueError(f"{step.name} writes at the stride {step.output.stride}")


def _stride(step: p.Step) -> int:
    """Of what a step reads."""
    return (step.inputs[0].stride or 0) if step.inputs else 1
