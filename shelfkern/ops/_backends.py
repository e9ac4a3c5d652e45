"""The backends of an op: why one cannot take a tensor, and the choice among those that can."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _triton

_logger = logging.getLogger("shelfkern")

# native: C++ on the CPU. cuda: CUDA C++. triton: Triton, on a GPU or interpreted. emulated: the CUDA C++
# kernels run on the CPU, thread by thread. reference: torch's own calls.
BACKENDS = ("auto", "native", "cuda", "triton", "emulated", "reference")

# Every op and the backends that implement it, in order of preference for "auto" on each device.
KERNELS = {
    "attention_gate": ("native", "cuda", "emulated"),
    "bn_act_dropout": ("native", "triton"),
    "conv_bn_act": ("native", "triton"),
    "deconv_add": ("native", "triton"),
    "quantize": ("native", "triton"),
    "shared_block": ("native", "cuda", "triton", "emulated"),
    "stem": ("native", "cuda", "emulated"),
    "upsample_add": ("native", "cuda", "triton", "emulated"),
    "upsample_argmax": ("native", "cuda", "emulated"),
    "upsample_bilinear": ("native", "triton"),
    "upsample_cross_entropy": ("native", "triton"),
    "upsample_softmax_sum": ("native", "cuda", "emulated"),
}

NATIVE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)

# For each backend that implements an op, in order of preference: why it cannot run, None if it can.
Reasons = dict[str, str | None]


def unavailable(op: str, backend: str) -> str | None:
    """Reason why an op's kernel cannot run in this process, whatever the tensors; None if it can."""
    if backend == "native":
        return native.reason(op)
    if backend == "triton":
        return _triton.reason() or native.disabled_reason(op, backend)
    if backend == "emulated":
        return native.why_not_emulated or native.disabled_reason(op, backend)
    return native.cuda_reason() or native.disabled_reason(op, backend)


def reasons(op: str, x: Tensor, name: str = "x") -> Reasons:
    """Reason why each of an op's kernels cannot take x, the argument `name`; None for those that can."""
    return {backend: unavailable(op, backend) or _unfit(backend, x, name) for backend in KERNELS[op]}


def _unfit(backend: str, x: Tensor, name: str) -> str | None:
    on_cpu = backend in ("native", "emulated") or (backend == "triton" and _triton.INTERPRETED)
    if x.device.type != ("cpu" if on_cpu else "cuda"):
        return f"{name} is on {x.device}, the {backend} kernel runs on {'the cpu' if on_cpu else 'a GPU'}"
    dtypes = NATIVE_DTYPES if backend == "native" else CUDA_DTYPES
    if x.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{name} is {x.dtype}, the {backend} kernel takes {names}"
    if not on_cpu and torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
        capability = "{}.{}".format(*torch.cuda.get_device_capability(x.device))
        return f"{name} is on a GPU of compute capability {capability}, the {backend} kernel needs 8.0"
    return None


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def choose(op: str, backend: str, why: Reasons, without_gradient: Sequence[Tensor | None] = ()) -> str:
    """The backend that runs: the requested one if it can, or for "auto" the first that can.

    Emulated and interpreted kernels are thousands of times slower than torch, so they run only by name.

    Args:
        without_gradient: the inputs for which the op's kernels register no gradient. If autograd needs
            one of them, only torch's own calls can run.

    Raises:
        ValueError: backend is not one of `BACKENDS`.
        RuntimeError: the backend asked for cannot run, or autograd would need its gradient.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, it may be one of {', '.join(BACKENDS)}")
    if needs_grad(*without_gradient):
        no_gradient = "an input requires grad, and the {} kernel has no gradient"
        why = {name: because or no_gradient.format(name) for name, because in why.items()}
    if backend == "reference":
        return backend
    if backend != "auto":
        because = why.get(backend, f"{op} has no such kernel")
        if because is not None:
            raise RuntimeError(f"{op}: backend is {backend!r}, which cannot run: {because}")
        return backend
    for name, because in why.items():
        if because is None and name != "emulated" and not (name == "triton" and _triton.INTERPRETED):
            return name
    _log_once(op, why)
    return "reference"


_logged: set[tuple[str, str]] = set()


def _log_once(op: str, why: Reasons) -> None:
    # torch.compile traces this function, and calling the logger would break its graph.
    if torch.compiler.is_compiling():
        return
    for name, because in why.items():
        if because is not None and (op, because) not in _logged:
            _logged.add((op, because))
            _logger.info("%s: the %s kernel cannot run: %s", op, name, because)


def call_cuda(backend: str, overlap: bool, op: str, x: Tensor, *arguments: Any) -> None:
    """Calls an op's CUDA C++ kernel on the device and current stream of x, or on the emulator.

    overlap: whether the kernel may start before its predecessor in the stream has ended. It then reads
        weights without waiting, so they must have been written long before. The emulator always checks the
        waits.
    """
    if backend == "emulated":
        getattr(native.emulation, op)(*arguments, (0, True))
        return
    with torch.cuda.device(x.device):
        getattr(native.cuda, op)(*arguments, (torch.cuda.current_stream().cuda_stream, overlap))


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; an H200's for the emulator."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def shared_bytes(x: Tensor) -> int:
    """Shared memory available to a block on x's GPU; an H200's elsewhere."""
    if not x.is_cuda:
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(x.device)  # the type stub lacks the attribute
    return properties.shared_memory_per_block_optin


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as shelfkern::name, which torch.compile and torch.export see as one op."""
    # The kernels would misread the addresses of tensors on other devices.
    return torch.library.custom_op(
        f"shelfkern::{name}", mutates_args=tuple(mutates_args), device_types=("cpu", "cuda")
    )
