"""The compiled module `shelfkern._native`: loaded if it can be, otherwise the reason why not.

Kernels take addresses and sizes; shelfkern/ops checks tensors before their addresses come here.
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

# As the enums in csrc/cpu/kernels.h and csrc/cuda.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2, torch.float16: 3}
# What convolutions multiply on a CPU: as `Product` in csrc/cpu/kernels.h.
PRODUCT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int16: 3}

NO_COMPILER = "shelfkern was installed without a C++ compiler; install one and reinstall"
NO_EMULATOR = "shelfkern was installed without the emulator; set SHELFKERN_EMULATION=1 and reinstall"
NO_GPU = "there is no GPU that torch can use"

# Ops whose CPU kernel is another op's.
BUILT_ON = {
    "conv_train": "conv_bn_act",
    "deconv_add": "conv_bn_act",
    "shared_block": "conv_bn_act",
    "shared_block_train": "bn_act_dropout",
}

_RUNTIMES = re.compile(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$")


def _load(name: str = "_native", missing: str = NO_COMPILER) -> tuple[Any, str | None]:
    """A compiled module and None, or None and why not: `missing` where it was not built."""
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
    # torch's own comes first where another library brought one too.
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
# The CUDA C++ kernels: on a GPU, and on the CPU thread by thread.
cuda = getattr(module, "cuda", None)
emulation, why_not_emulated = _load("_emulation", NO_EMULATOR)
thread_runtime = "threads of its own"
# Kernels that a self-test found wrong, by backend and op.
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
    """Why an op's CPU kernel cannot run in this process, None if it can."""
    return why_not or disabled_reason(op, "native") or disabled_reason(BUILT_ON.get(op, op), "native")


def cuda_reason() -> str | None:
    """Why CUDA C++ kernels cannot run in this process, None if they can."""
    if cuda is None:
        return why_not or "shelfkern was installed without nvcc; install it and reinstall"
    # Asked when needed: the first question starts CUDA, after which the process may not fork.
    return None if torch.cuda.is_available() else NO_GPU


def disabled_reason(op: str, backend: str) -> str | None:
    """Why an op's kernel was switched off, None if it was not."""
    return disabled.get((backend, op))


def disable(op: str, because: str, backend: str = "native") -> None:
    """Switches an op's kernel off in this process."""
    disabled[backend, op] = because


def has_product(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of bfloat16, int8 or int16; of float32 all have."""
    return module is not None and module.has_product(str(dtype).removeprefix("torch."))


def empty(shape: tuple[int, ...], dtype: torch.dtype, pooled: bool = True) -> Tensor:
    """An uninitialised CPU tensor, in huge pages where there are some to be had.

    Fresh memory of many megabytes costs a page fault every 4 KiB, more than most kernels that fill it.

    Args:
        pooled: whether the memory is reused once the tensor and all its views are gone; if not, as of
            weights, which stay, it goes back to the system then.

    Raises:
        MemoryError: there is not so much.
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
    """Gives free memory back to the system: idle buffers, and what the C library keeps of what was freed.

    For after work that took much more than what follows, which meets fresh pages: it takes milliseconds.
    """
    if module is not None:
        module.give_back()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's first element is; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
