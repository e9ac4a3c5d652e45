"""The compiled module `shelfkern._native`, loaded if possible, otherwise the reason why it is not.

Kernels take addresses and sizes; shelfkern/ops checks tensors before passing their addresses.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Matches the enums in csrc/cpu/kernels.h and csrc/cuda.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float16: 3}
# dtypes of products on a CPU: matches `Product` in csrc/cpu/kernels.h.
PRODUCT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int16: 3}

NO_COMPILER = "shelfkern was installed without a C++ compiler; install one and reinstall"
NO_EMULATOR = "shelfkern was installed without the emulator; set SHELFKERN_EMULATION=1 and reinstall"
NO_GPU = "there is no GPU that torch can use"

# Ops implemented by another op's CPU kernel.
BUILT_ON = {
    "conv_train": "conv_bn_act",
    "deconv_add": "conv_bn_act",
    "shared_block": "conv_bn_act",
    "shared_block_train": "bn_act_dropout",
}

_RUNTIMES = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def _load(name: str = "_native", missing: str = NO_COMPILER) -> tuple[Any, str | None]:
    """A compiled module and None, or None and the reason: `missing` where it was not built."""
    try:
        return importlib.import_module(f".{name}", __package__), None
    except ImportError as error:
        if f"No module named '{__package__}.{name}'" in str(error):
            return None, missing
        return None, f"shelfkern.{name} does not load: {error}"


def _openmp_runtime() -> tuple[str, int] | None:
    """Path and GOMP_parallel of the OpenMP runtime that torch uses in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    # torch's own comes first, in case another library also loaded one.
    torch_home = str(Path(torch.__file__).parent)
    for path in sorted(filter(_RUNTIMES.search, paths), key=lambda path: not path.startswith(torch_home)):
        try:
            entry = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
        if entry:
            return path, entry
    return None


module, why_not = _load()
# The CUDA C++ kernels: on a GPU, and emulated on the CPU.
cuda = getattr(module, "cuda", None)
emulation, why_not_emulated = _load("_emulation", NO_EMULATOR)
thread_runtime = "threads of its own"
# Kernels that failed a self-test, by backend and op.
disabled: dict[tuple[str, str], str] = {}


def _start() -> None:
    global thread_runtime
    if module is None:
        return
    runtime = _openmp_runtime()
    if runtime is not None:
        thread_runtime = runtime[0]
        module.set_parallel_runtime(runtime[1])
    isa = os.environ.get("SHELFKERN_ISA")
    if isa and not module.force_isa(isa):
        raise ImportError(f"SHELFKERN_ISA is {isa!r}, this CPU can run {', '.join(module.isas())}")


_start()


def reason(op: str) -> str | None:
    """Reason why an op's CPU kernel cannot run in this process, None if it can."""
    return why_not or disabled_reason(op, "native") or disabled_reason(BUILT_ON.get(op, op), "native")


def cuda_reason() -> str | None:
    """Reason why CUDA C++ kernels cannot run in this process, None if they can."""
    if cuda is None:
        return why_not or "shelfkern was installed without nvcc; install it and reinstall"
    # Checked only when needed: the first check initialises CUDA, after which the process may not fork.
    return None if torch.cuda.is_available() else NO_GPU


def disabled_reason(op: str, backend: str) -> str | None:
    """Reason why an op's kernel was switched off, None if it was not."""
    return disabled.get((backend, op))


def disable(op: str, because: str, backend: str = "native") -> None:
    """Switches an op's kernel off in this process."""
    disabled[backend, op] = because


def has_product(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for bfloat16, int8 or int16 products; always true for float32."""
    return module is not None and module.has_product(str(dtype).removeprefix("torch."))


def empty(shape: tuple[int, ...], dtype: torch.dtype, pooled: bool = True) -> Tensor:
    """An uninitialised CPU tensor, in huge pages where available.

    Fresh memory of many megabytes costs a page fault every 4 KiB, which takes longer than most kernels that
    fill it.

    Args:
        pooled: whether the memory is reused once the tensor and all its views are gone; otherwise it then
            returns to the system, as for weights, which stay.

    Raises:
        MemoryError: there is not enough memory.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if module is None or nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    try:
        buffer = module.Buffer(nbytes, pooled)
    except MemoryError:
        raise MemoryError(f"there is no memory for {tuple(shape)} {dtype}, {nbytes} bytes") from None
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def give_back() -> None:
    """Returns free memory to the system: idle buffers, and memory retained by the C library.

    For use after work that took much more memory than the work that follows, which will get fresh pages: it
    takes milliseconds.
    """
    if module is not None:
        module.give_back()


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
