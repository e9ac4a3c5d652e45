"""Files of accelerated networks: safetensors with folded float32 weights and the plan as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..nn.extents import Extents
from ..nn.shelfnet import MOST_ENLARGED, MOST_PARTS
from ..normalisation import Normalisation
from ..ops.quantize import Quantum
from . import plan as p
from .quantization import KINDS

# Version of the layout that `_encoded` writes; files of other versions are refused.
FORMAT = 1
KEY = "shelfkern_plan"

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
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
# Of what a file holds, and of the fields of each record.
PARTS = dict(steps=tuple, num_classes=int, extents=Extents, dtype=torch.dtype, on_gpu=bool, facts=Facts)
TYPES = {name: typing.get_type_hints(kind) for name, kind in RECORDS.items()}


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
        return _checked(_decoded(about, mapped.tensors), mapped)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
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
            return torch.empty(shape, device="cpu")
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
    if "record" not in value:
        return parts
    record = RECORDS[value["record"]](**parts)
    _check_fields(record)
    return record


def _check_fields(record: Any) -> None:
    """Raises ValueError unless what a record holds is of the types that it declares."""
    name = type(record).__name__
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if not _is_of(value, TYPES[name][field.name]):
            raise ValueError(f"{name} has the {field.name} {value!r:.100}")


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a decoded value is of a type: numbers are finite, and booleans none."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, part) for part in parts)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(wanted) and all(map(_is_of, value, wanted))
    return type(value) is kind


def _checked(parts: dict[str, Any], file: _Mapped) -> Saved:
    """What is read. Raises ValueError unless its parts fit together: kernels rely on it."""
    for name, kind in PARTS.items():
        if type(parts[name]) is not kind:
            raise ValueError(f"its {name} is {parts[name]!r:.100}")
    for step in parts["steps"]:
        if not isinstance(step, STEPS):
            raise ValueError(f"a step is {type(step).__name__}")
    dtype, on_gpu, extents = parts["dtype"], parts["on_gpu"], parts["extents"]
    if not 1 <= extents.scale <= MOST_ENLARGED or extents.scale.denominator > MOST_PARTS:
        raise ValueError(f"images are enlarged {extents.scale} times")
    if dtype not in (*FLOATING, *(KINDS if on_gpu else [torch.int8])):
        raise ValueError(f"its dtype is {dtype}")
    plan = p.Plan(parts["steps"], parts["num_classes"], extents)
    signed_or_not = dtype if on_gpu else torch.uint8
    plan.check(signed_or_not if dtype in KINDS else None)
    return Saved(plan, dtype, on_gpu, parts["facts"], file)
