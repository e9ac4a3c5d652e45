"""Where tests of the GPU engine run: on a GPU, and with its kernels emulated and interpreted on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shelfkern import native
from shelfkern.ops import _triton

_EMULATED = native.why_not_emulated or (None if _triton.INTERPRETED else "Triton is not interpreted")
needs_emulation = pytest.mark.skipif(_EMULATED is not None, reason=f"no emulated kernels: {_EMULATED}")
needs_gpu = pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA: {native.cuda_reason()}")
ENGINES = [
    pytest.param("emulated", marks=needs_emulation),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
]
# For what does not depend on the kernels: torch's calls in place of emulated ones, which are slow.
BEHAVIOUR = ["torch", ENGINES[1]]


def options(engine: str) -> dict[str, Any]:
    """Arguments of `accelerate`."""
    return dict(device="cuda") if engine == "cuda" else dict(device="cpu", backend="emulated")


def device_of(engine: str) -> torch.device:
    return torch.device("cuda" if engine == "cuda" else "cpu")
