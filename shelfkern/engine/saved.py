"""Files of accelerated networks: safetensors with folded float32 weights and the plan as JSON metadata."""

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

# Version of the layout that `_encoded` writes; files of other versions are refused.
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
    """What a network has beside its plan.

    Attributes:
        normalisation: mean and standard deviation that raw images are normalised with.
        align_corners: whether the final bilinear resize aligns corners.
        classes: a name per class, or None.
        palette: an (r, g, b) per class, or None.
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
        plan: the fused ops; their weights may be mapped from `file`.
        dtype: the dtype passed to `accelerate`.
        on_gpu: whether the plan was made for GPU kernels; only 8-bit plans depend on it.
        facts: the model's.
        file: the memory-mapped file that the plan was read from, if any.
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
        """Drops the memory pages of a step's weights; later reads load them from the file again."""
        if self.file is not None:
            for weight in step.weights():
                self.file.forget(weight)


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds an accelerated network, of any format version."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def read_saved(path: str | os.PathLike[str]) -> Saved:
    """Reads a file of `Saved.write`. Its weights are memory-mapped, so it must not be overwritten in place.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is truncated, is not an accelerated network, or has another format version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file, it must be one that FastShelfNet.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        about = json.loads(metadata.get(KEY, "null"))
    except (SafetensorError, ValueError) as error:
        raise RuntimeError(f"{path} is cut short or not an accelerated network ({error})") from error
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
        raise RuntimeError(
            f"{path} is an accelerated network whose parts do not fit together ({error})"
        ) from error


class _Mapped:
    """The tensors of a memory-mapped safetensors file.

    The map is private and never written to, so its pages can be dropped at any time.
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
        """Drops the pages that hold only this tensor."""
        begin = tensor.data_ptr() - self._begin
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def __reduce__(self) -> Any:
        # Copies and pickles hold the weights as ordinary tensors.
        return type(None), ()


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value in JSON types. Tensors go to `tensors`, each once even if several steps share it."""
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
    """The inverse of `_encoded`."""
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
    """Raises ValueError unless the weights and strides of all steps fit together: kernels rely on it."""
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
    """Stride of the activation that a step reads."""
    return (step.inputs[0].stride or 0) if step.inputs else 1
