"""What every GPU kernel takes of a multiprocessor, found by compiling it: no GPU is needed.

Triton's kernels are compiled here for every configuration that can be chosen; CUDA C++ ones were when
shelfkern was built, and are read from its compiled module.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import native
from .ops import _conv_triton as conv
from .ops import _triton

ARCHS = (80, 90)
# Of a multiprocessor: 32-bit registers, threads, bytes of shared memory, and what each block takes of it
# beside its own (CUDA C++ programming guide, compute capabilities).
REGISTERS, THREADS, RESERVED_SHARED = 65536, 2048, 1024
SHARED = {80: 164 * 1024, 90: 228 * 1024}

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_FLOAT32 = ("scale", "shift", "bias", "gate", "parts")
_TENSORS = ("x", "weight", "residual", "skip", "out", "scores", *_FLOAT32)
_SCALARS = ("slope", "step_y", "step_x")


@dataclasses.dataclass(frozen=True)
class Case:
    """One Triton kernel with one set of constants.

    Attributes:
        op, kernel: op's name, and its kernel's: an attribute of the op's module.
        variant: what tells it from the op's other cases, to read.
        dtype: of the activations.
        constants: the kernel's constexpr arguments.
        warps, stages: of a program.
        multiplies: whether it must use tensor cores.
        aligned: whether pointers and strides are multiples of 16.
    """

    op: str
    kernel: str
    variant: str
    dtype: torch.dtype
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    multiplies: bool = False
    aligned: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """What a compiled kernel takes.

    Attributes:
        op, kernel, variant: which; arch: 80 or 90, for which it was compiled.
        registers: of a thread. local: bytes of a thread's stack, spills among them.
        shared: bytes of a block, None where they are asked for at launch.
        blocks: that fit on a multiprocessor, None where that depends on the launch.
        tensor_cores: "wgmma", "mma" or "".
    """

    op: str
    kernel: str
    variant: str
    arch: int
    registers: int
    local: int
    shared: int | None
    blocks: int | None
    tensor_cores: str

    @property
    def fault(self) -> str | None:
        """What is wrong with it, None if nothing is."""
        if self.local:
            return f"{self.local} bytes of a thread's registers are in memory"
        if self.shared is not None and self.shared > SHARED[self.arch] - RESERVED_SHARED:
            return f"a block takes {self.shared} bytes of shared memory"
        return None


def reason() -> str | None:
    """Why Triton's kernels cannot be compiled in this process, None if they can."""
    if _triton.INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted, not compiled"
    return _triton.why_not or _tool_reason()


def _tool() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and _triton.triton is not None:
        own = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(own) if own.exists() else None
    return found


def _tool_reason() -> str | None:
    return None if _tool() else "there is no cuobjdump, which comes with Triton and with CUDA"


def _convolutions() -> Iterator[Case]:
    everything = dict(HAS_SCALE=True, HAS_SHIFT=True, HAS_RESIDUAL=True, HAS_SKIP=True, ACT="leaky")
    layers = {"3x3": (3, 1, 1, 256), "1x1": (1, 1, 0, 256), "3x3 stride 2": (3, 2, 1, 256),
              "7x7 of 3 channels": (7, 2, 3, 3), "3x3 of 40 channels": (3, 1, 1, 40)}  # fmt: skip
    for dtype, precision, config in _configurations():
        for layer, (size, stride, padding, c) in layers.items():
            # The layer changes counts and constants only: one configuration shows it.
            first = (conv.CONFIGS if c % 16 == 0 else conv.SMALL_CONFIGS)[0]
            if layer != "3x3" and config != first:
                continue
            problem = conv.Problem(16384, 256, size * size, c, dtype)
            constants = dict(
                everything, C=c, KERNEL_H=size, KERNEL_W=size, STRIDE=stride, PADDING=padding,
                SPLIT=config.split, **_tile(config, problem, precision),
            )  # fmt: skip
            yield _case("conv_bn_act", "conv_kernel", layer, dtype, precision, config, constants, c % 16 == 0)
    for dtype in _POINTERS:
        for split in sorted({config.split for config in conv.CONFIGS} - {1}):
            constants = dict(everything, BLOCK_M=16, BLOCK_N=64, SPLIT=split)
            yield Case("conv_bn_act", "sum_kernel", f"{_name(dtype)}, {split} parts", dtype, constants)


def _deconvolutions() -> Iterator[Case]:
    for dtype, precision, config in _configurations():
        if config.split == 1:
            tile = _tile(config, conv.Problem(4096, 256, 9, 512, dtype), precision)
            yield _case("deconv_add", "deconv_kernel", "", dtype, precision, config, dict(C=512, **tile))


def _resamplings() -> Iterator[Case]:
    for dtype in _POINTERS:
        for gated in (False, True):
            constants = dict(GATED=gated, BLOCK_M=16, BLOCK_C=64)
            variant = f"{_name(dtype)}{', gated' if gated else ''}"
            yield Case("upsample_add", "upsample_add_kernel", variant, dtype, constants)
        for align in (False, True):
            constants = dict(ALIGN=align, BLOCK_X=32, BLOCK_C=32)
            variant = f"{_name(dtype)}{', corners aligned' if align else ''}"
            yield Case("upsample_bilinear", "upsample_bilinear_kernel", variant, dtype, constants)


def _configurations() -> Iterator[tuple[torch.dtype, str, conv.Config]]:
    for dtype in _POINTERS:
        yield from ((dtype, "tf32", config) for config in conv.CONFIGS + conv.SMALL_CONFIGS)
    yield from ((torch.float32, "ieee", config) for config in conv.SMALL_CONFIGS)


def _tile(config: conv.Config, problem: conv.Problem, precision: str) -> dict[str, Any]:
    return dict(
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=conv.block_k(config, problem),
        SWAP=config.swap, PRECISION=precision,
    )  # fmt: skip


def _case(
    op: str, kernel: str, layer: str, dtype: torch.dtype, precision: str, config: conv.Config,
    constants: dict[str, Any], aligned: bool = True,
) -> Case:  # fmt: skip
    numbers = precision if dtype is torch.float32 else _name(dtype)
    shape = f"{config.block_m}x{config.block_n}{', swapped' if config.swap else ''}"
    split = f", split {config.split}" if config.split > 1 else ""
    variant = ", ".join(filter(None, (layer, numbers, f"{shape}{split}")))
    options = (config.warps, config.stages, precision == "tf32", aligned)
    return Case(op, kernel, variant, dtype, constants, *options)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> list[Case]:
    """Every Triton kernel at every configuration that can be chosen."""
    return [*_convolutions(), *_deconvolutions(), *_resamplings()]


def compile_case(case: Case, arch: int) -> Row:
    """Compiles one kernel for one architecture."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton = _triton.triton
    kernel = getattr(importlib.import_module(f"shelfkern.ops.{case.op}"), case.kernel)
    # Launches overlap where the GPU can.
    constants = dict(case.constants, OVERLAP=arch >= 90)
    signature = {name: _type(name, case, constants) for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if _is_aligned(name, kind, case)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = dict(num_warps=case.warps, num_stages=case.stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        ((_, registers, local, static),) = _usage(cubin.name)
    shared = max(static, compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    cores = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    blocks = occupancy(arch, registers, 32 * case.warps, shared)
    return Row(case.op, case.kernel, case.variant, arch, registers, local, shared, blocks, cores)


def _type(name: str, case: Case, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _TENSORS:
        return "*fp32" if name in _FLOAT32 else _POINTERS[case.dtype]
    return "fp32" if name in _SCALARS else "i32"


def _is_aligned(name: str, kind: str, case: Case) -> bool:
    strided = kind == "i32" and re.fullmatch(r"(x|residual|skip|scores|out_stride)_[nhw]", name)
    return kind.startswith("*") or bool(case.aligned and (strided or name == "channels"))


def occupancy(arch: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit on a multiprocessor: by registers, which warps get in 256s, threads, shared memory."""
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (warp_registers * (threads // 32))
    by_shared = SHARED[arch] // (shared + RESERVED_SHARED)
    return min(by_registers, THREADS // threads, by_shared)


_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _usage(path: str) -> list[tuple[str, int, int, int]]:
    """Of each kernel in a file: name, registers, bytes of stack and local memory, static shared memory."""
    done = subprocess.run([_tool() or "", "-res-usage", path], capture_output=True, text=True, check=True)
    found = _RESOURCES.findall(done.stdout)
    return [
        (name, int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found
    ]


def triton_rows(archs: Sequence[int] = ARCHS, op: str | None = None) -> list[Row]:
    """Compiles every case, in as many processes as there are processors.

    Raises:
        RuntimeError: they cannot be compiled here; the message says why.
    """
    because = reason()
    if because is not None:
        raise RuntimeError(f"Triton's kernels cannot be compiled here: {because}")
    wanted = [(case, arch) for arch in archs for case in cases() if op in (None, case.op)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        return list(pool.map(compile_case, *zip(*wanted, strict=True), chunksize=4)) if wanted else []


def cuda_rows(archs: Sequence[int] = ARCHS, op: str | None = None) -> list[Row]:
    """What the compiled module says of its CUDA C++ kernels; none if it was built without them."""
    if native.cuda is None or _tool() is None:
        return []
    rows = []
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            extract = [_tool() or "", "-xelf", f"sm_{arch}", native.module.__file__]
            subprocess.run(extract, cwd=folder, capture_output=True, check=True)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                rows += [_cuda_row(arch, *usage) for usage in _usage(str(cubin))]
    return [row for row in rows if op in (None, row.op)]


def _cuda_row(arch: int, mangled: str, registers: int, local: int, shared: int) -> Row:
    name = _demangled(mangled)
    # The file's name is in that of its anonymous namespace.
    source = re.search(r"_\d+_([a-z_]+)_cu_", mangled)
    match = re.search(r"(\w+_kernel)(?:<(.*)>)?\(", name)
    kernel, arguments = match.groups() if match else (name, None)
    variant = re.sub(r"shelfkern::cuda::|\(anonymous namespace\)::|\((?:int|bool)\)", "", arguments or "")
    return Row(source.group(1) if source else kernel, kernel, variant, arch, registers, local, None, None, "")


def _demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
