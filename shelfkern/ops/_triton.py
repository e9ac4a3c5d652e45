"""Triton, if installed, and helpers shared by the Triton kernels."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native

# Triton takes longer to import than the rest of shelfkern, so it is imported only where its kernels can be
# used. Setting the variable to 0 also requests it, to compile kernels for a GPU that need not be present.
_WANTED = torch.version.cuda is not None or "TRITON_INTERPRET" in os.environ

triton: Any = None
tl: Any = None
gdc_launch_dependents: Any = None
gdc_wait: Any = None
why_not: str | None = "this torch is built without CUDA; with TRITON_INTERPRET=1 kernels run interpreted"
if _WANTED:
    try:
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")
        cuda = importlib.import_module("triton.language.extra.cuda")
        gdc_launch_dependents, gdc_wait = cuda.gdc_launch_dependents, cuda.gdc_wait
    except ImportError as error:
        why_not = f"Triton does not load ({error}): pip install triton"
    else:
        why_not = None

# Interpreted kernels run on the CPU, operation by operation, in numpy.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
# The interpreter multiplies bfloat16 bit patterns as if they were integers, and does not round to nearest.
WIDEN = None if tl is None else tl.constexpr(INTERPRETED)


def jit(kernel: Callable[..., Any]) -> Any:
    """triton.jit, or without Triton the function itself, so that the module can be imported."""
    return kernel if triton is None else triton.jit(kernel)


def reason() -> str | None:
    """Reason why Triton kernels cannot run in this process, None if they can."""
    if why_not is not None or INTERPRETED or torch.cuda.is_available():
        return why_not
    return native.NO_GPU


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which launches go to the GPU that x is on, to torch's current stream there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def overlaps_launches(x: Tensor) -> bool:
    """Whether kernels on x's GPU can start before their predecessor has ended."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


@jit
def rounded(values, pointer):
    """float32 values in the dtype that the pointer points to, rounded to nearest, ties to even."""
    if WIDEN and pointer.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, near.to(tl.float32, bitcast=True), values)
    return values.to(pointer.dtype.element_ty)
