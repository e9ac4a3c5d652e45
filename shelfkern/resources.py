"""Resource usage of every GPU kernel on a multiprocessor, found by compiling it: no GPU is needed.

Triton kernels are compiled here as their launchers would launch them, for every configuration that can be
chosen; CUDA C++ kernels were compiled when shelfkern was built, and are read from its compiled module.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import native
from .ops import _conv_triton as conv
from .ops import _triton
from .ops.bn_act_dropout import bn_act_dropout_backward_triton, bn_act_dropout_triton
from .ops.conv_bn_act import conv_bn_act_triton
from .ops.deconv_add import deconv_add_triton
from .ops.quantize import quantize_triton
from .ops.shared_block import shared_block_triton
from .ops.upsample_add import upsample_add_triton
from .ops.upsample_bilinear import upsample_bilinear_backward_triton, upsample_bilinear_triton
from .ops.upsample_cross_entropy import Ohem, Problem, upsample_cross_entropy_triton

# Compute capabilities of A100; of L4 and RTX 4090, the first that multiply float8; and of H100 and H200.
ARCHS = (80, 89, 90)
# Architectures that every kernel supports, and for which CUDA C++ kernels are compiled.
MAIN_ARCHS = (80, 90)
# Limits per multiprocessor: 32-bit registers, threads and blocks (CUDA C++ programming guide, technical
# specifications by compute capability).
REGISTERS = 65536
THREADS = {80: 2048, 89: 1536, 90: 2048}
BLOCKS = {80: 32, 89: 24, 90: 32}
# Bytes of a multiprocessor's shared memory, and bytes per block that CUDA reserves.
SHARED = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
RESERVED_SHARED = 1024
# Allocation granularity of registers per warp, and of shared memory per block.
REGISTER_UNIT, SHARED_UNIT = 256, 128

_NO_TOOL = "there is no cuobjdump, which comes with Triton and with CUDA"
_FLOATING = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LABELS = {torch.uint8: "u8", torch.int64: "i64"}
_TYPES = {**_FLOATING, **_LABELS, torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32"}
# dtypes of convolutions, and precisions of float32 products.
_PRECISIONS = [*((dtype, "tf32") for dtype in _FLOATING), (torch.float32, "ieee")]
# 8-bit dtypes, and which of ARCHS have kernels for them.
_CODES = {torch.int8: (80, 89, 90), torch.float8_e4m3fn: (89, 90)}
# Sizes of a case's tensors, chosen so that few are multiples of 16, which the compiler would exploit.
_HEIGHT, _WIDTH = 30, 34


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an op's Triton launcher.

    Attributes:
        op: name of the op.
        variant: readable description that distinguishes it from the op's other cases.
        launch: the call, on tensors without memory.
        archs: architectures for which it is compiled.
    """

    op: str
    variant: str
    launch: Callable[[], None]
    archs: tuple[int, ...] = MAIN_ARCHS


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel: its arguments by name, and Triton's options, such as num_warps."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """Resource usage of a compiled kernel.

    Attributes:
        op, kernel, variant: identify the kernel.
        arch: one of `ARCHS`, for which it was compiled.
        registers: registers per thread.
        local: bytes of a thread's stack, including spills.
        shared: bytes of shared memory per block, None where they are set at launch.
        blocks: blocks that fit on a multiprocessor, None where that depends on the launch.
        tensor_cores: "wgmma", "mma" or "", followed by the 8-bit dtype they multiply, if any: "s8" or "e4m3".
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
    """Reason why Triton kernels cannot be compiled here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None if _tool() else _NO_TOOL


def cuda_reason() -> str | None:
    """Reason why there is no information about the CUDA C++ kernels, None if there is."""
    if native.cuda is None:
        return native.why_not or "shelfkern was installed without nvcc; install it and reinstall"
    return None if _tool() else _NO_TOOL


def _tool() -> str | None:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(own) if own.exists() else None
    return found


def cases() -> list[Case]:
    """Every Triton kernel at every configuration that can be chosen."""
    return [
        *_convolutions(),
        *_codes(),
        *_blocks(),
        *_deconvolutions(),
        *_resamplings(),
        *_losses(),
        *_norms(),
        *_quantizations(),
    ]


# Kernel size, stride, padding, input and output channels.
_LAYERS = {
    "3x3": (3, 1, 1, 256, 256),
    "1x1 to 150 channels": (1, 1, 0, 256, 150),
    "3x3 of 40 channels": (3, 1, 1, 40, 256),
    "3x3 stride 2": (3, 2, 1, 256, 256),
    "1x1": (1, 1, 0, 256, 256),
    "7x7 stride 2 of 3 channels": (7, 2, 3, 3, 64),
}


def _convolutions() -> Iterator[Case]:
    for layer, (size, stride, padding, c, k) in _LAYERS.items():
        for dtype, precision in _PRECISIONS:
            # Channel counts that are not a multiple of 16 take more registers, the last three layers differ
            # only in counts and constants, and bfloat16 compiles like float16: so not every combination is
            # compiled.
            thorough = layer == "3x3" or ("channels" in layer and size < 7 and dtype is not torch.bfloat16)
            for config in _configurations(_images(dtype, c), k, size * size, precision, thorough):
                arguments = (size, stride, padding, c, k, dtype, config, precision)
                variant = f"{layer}, {_words(dtype, precision, config)}"
                yield Case("conv_bn_act", variant, functools.partial(_launch_conv, *arguments))


def _launch_conv(
    size: int,
    stride: int,
    padding: int,
    c: int,
    k: int,
    dtype: torch.dtype,
    config: conv.Config,
    precision: str,
    codes: torch.dtype | None = None,
) -> None:
    x, out = _images(dtype, c, stride), _images(dtype if dtype in _FLOATING else torch.float16, k)
    weight, norm = _meta((k, size * size, c), dtype), _meta((k,))
    after = (norm, norm, out, out, out)
    coded = None if codes is None else _images(codes, k)
    conv_bn_act_triton(
        x, weight, *after, (size, size), stride, padding, 0.1, config, precision, True, None, coded, 0.1
    )


def _codes() -> Iterator[Case]:
    # The most that a layer can do: both results, residual and skip.
    for layer in ("3x3", "1x1 to 150 channels", "3x3 of 40 channels"):
        for codes, archs in _CODES.items():
            yield from _coded(layer, codes, codes, archs)
    # The layer before those that read 8-bit values, where its own arithmetic takes most registers.
    yield from _coded("3x3", torch.float16, torch.int8, (80,))
    yield from _coded("3x3", torch.float16, torch.float8_e4m3fn, (90,))


def _coded(layer: str, dtype: torch.dtype, codes: torch.dtype, archs: tuple[int, ...]) -> Iterator[Case]:
    size, stride, padding, c, k = _LAYERS[layer]
    made = "" if dtype is codes else f" to {_name(codes)}"
    for config in _configurations(_images(dtype, c), k, size * size, "tf32"):
        arguments = (size, stride, padding, c, k, dtype, config, "tf32", codes)
        launch = functools.partial(_launch_conv, *arguments)
        variant = f"{layer}{made}, {_words(dtype, 'tf32', config)}"
        yield Case("conv_bn_act", variant, launch, _that_hold(config, archs))


def _that_hold(config: conv.Config, archs: tuple[int, ...]) -> tuple[int, ...]:
    """The architectures whose blocks can have the configuration's shared memory."""
    return tuple(arch for arch in archs if config.shared_bytes <= SHARED[arch] - RESERVED_SHARED)


def _blocks() -> Iterator[Case]:
    # These launch conv_bn_act's kernel, which has its own cases: one configuration of each is enough.
    for dtype, precision in _PRECISIONS:
        for config in _configurations(_images(dtype, 128), 128, 9, precision, thorough=False):
            launch = functools.partial(_launch_block, dtype, config, precision)
            yield Case("shared_block", _words(dtype, precision, config), launch)
    for dtype, archs in _CODES.items():
        for config in _configurations(_images(dtype, 128), 128, 9, "tf32", thorough=False):
            launch = functools.partial(_launch_block, dtype, config, "tf32")
            yield Case("shared_block", _words(dtype, "tf32", config), launch, _that_hold(config, archs))


def _launch_block(dtype: torch.dtype, config: conv.Config, precision: str) -> None:
    x, weight, norm = _images(dtype, 128), _meta((128, 9, 128), dtype), _meta((128,))
    out, codes = (x, None) if dtype in _FLOATING else (_images(torch.float16, 128), x)
    norms = (norm, norm, norm, norm)
    shared_block_triton(x, weight, *norms, x, out, 0.0, True, config, precision, True, None, out, codes)


def _deconvolutions() -> Iterator[Case]:
    for words, k in (("", 256), ("to 150 channels, ", 150)):
        for dtype, precision in _PRECISIONS:
            for config in _configurations(_images(dtype, 512), k, 9, precision):
                if config.split == 1:
                    launch = functools.partial(_launch_deconv, k, dtype, config, precision)
                    yield Case("deconv_add", f"{words}{_words(dtype, precision, config)}", launch)


def _launch_deconv(k: int, dtype: torch.dtype, config: conv.Config, precision: str) -> None:
    x, out = _images(dtype, 512), _images(dtype, k, 2)
    weight, bias = _meta((k, 9, 512), dtype), _meta((k,))
    deconv_add_triton(x, weight, bias, out, out, config, precision, overlap=True)


def _configurations(
    x: Tensor, channels: int, taps: int, precision: str, thorough: bool = True
) -> list[conv.Config]:
    """All that the launchers can choose for a layer, or the one whose programs are largest."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    aligned = conv.is_aligned(x) and channels % 16 == 0
    problem = conv.Problem(pixels, channels, taps, x.shape[1], x.dtype, aligned)
    found = conv.configurations(problem, precision, 132)
    return found if thorough else [max(found, key=lambda config: config.block_m * config.block_n)]


def _words(dtype: torch.dtype, precision: str, config: conv.Config) -> str:
    numbers = precision if dtype is torch.float32 else _name(dtype)
    swap = ", swapped" if config.swap else ""
    split = f", split {config.split}" if config.split > 1 else ""
    return f"{numbers}, {config.block_m}x{config.block_n}{swap}{split}"


def _resamplings() -> Iterator[Case]:
    for dtype in _FLOATING:
        for words, channels in (("", 128), (", 21 channels", 21)):
            for gated in (False, True):
                variant = f"{_name(dtype)}{words}{', gated' if gated else ''}"
                yield Case("upsample_add", variant, functools.partial(_launch_add, dtype, channels, gated))
            for align in (False, True):
                variant = f"{_name(dtype)}{words}{', corners aligned' if align else ''}"
                launch = functools.partial(_launch_bilinear, dtype, channels, align)
                yield Case("upsample_bilinear", variant, launch)
        for align in (False, True):
            variant = f"{_name(dtype)}, gradient{', corners aligned' if align else ''}"
            launch = functools.partial(_launch_bilinear_backward, dtype, align)
            yield Case("upsample_bilinear", variant, launch)


def _launch_add(dtype: torch.dtype, channels: int, gated: bool) -> None:
    x, out = _images(dtype, channels), _images(dtype, channels, 2)
    upsample_add_triton(x, out, _meta((2, channels)) if gated else None, out, overlap=True)


def _launch_bilinear(dtype: torch.dtype, channels: int, align: bool) -> None:
    size = (8 * _HEIGHT + 1, 8 * _WIDTH + 1)
    out = _meta((2, channels, *size), dtype)
    upsample_bilinear_triton(_images(dtype, channels), size, out, align, overlap=True)


def _launch_bilinear_backward(dtype: torch.dtype, align: bool) -> None:
    size = (8 * _HEIGHT + 1, 8 * _WIDTH + 1)
    gradient, out = _meta((2, 19, *size), dtype), _meta((2, 19, _HEIGHT, _WIDTH), dtype)
    upsample_bilinear_backward_triton(gradient, size, out, align)


def _norms() -> Iterator[Case]:
    for dtype in _FLOATING:
        for words, channels in (("", 128), (", 21 channels", 21)):
            # Everything at once, and the minimum.
            for slope, full in ((0.01, True), (0.0, False), (None, False)):
                act = "no activation" if slope is None else f"slope {slope:g}"
                variant = f"{_name(dtype)}{words}, {act}{', residual, dropout' if full else ''}"
                launch = functools.partial(_launch_norm, dtype, channels, slope, full)
                yield Case("bn_act_dropout", variant, launch)


def _launch_norm(dtype: torch.dtype, channels: int, slope: float | None, full: bool) -> None:
    x, vector = _images(dtype, channels), _meta((channels,))
    n, _, h, w = x.shape
    noise, weight, residual = (_meta((n, channels)), vector, x) if full else (None, None, None)
    mask = None if slope is None else _meta((n, h, w, (channels + 7) // 8), torch.uint8)
    bn_act_dropout_triton(x, weight, weight, residual, noise, 1e-5, slope, x, vector, vector, mask)
    # The forward part that the shared block's gradient recomputes.
    bn_act_dropout_triton(x, weight, weight, None, noise, 1e-5, slope, x, vector, vector, None, given=True)
    bn_act_dropout_backward_triton(
        x, x, weight, vector, vector, noise, mask, 1e-5, slope, x, residual, vector, vector
    )


def _losses() -> Iterator[Case]:
    # With everything that takes registers, and with nothing, for wide labels and few classes.
    for dtype in _FLOATING:
        words = f"{_name(dtype)}, weights, smoothing, mining"
        yield Case(
            "upsample_cross_entropy", words, functools.partial(_launch_loss, dtype, torch.uint8, 19, True)
        )
    for labels in _LABELS:
        for classes in (2, 19):
            words = f"float32, {classes} classes in {_name(labels)}"
            launch = functools.partial(_launch_loss, torch.float32, labels, classes, False)
            yield Case("upsample_cross_entropy", words, launch)


def _launch_loss(dtype: torch.dtype, labels: torch.dtype, classes: int, full: bool) -> None:
    size = (8 * _HEIGHT + 1, 8 * _WIDTH + 1)
    options = (_meta((classes,)), 0.1, Ohem()) if full else (None, 0.0, None)
    problem = Problem(_images(dtype, classes), _meta((2, *size), labels), size, not full, 255, *options)
    upsample_cross_entropy_triton(problem, _meta((2, classes, _HEIGHT, _WIDTH)))


def _quantizations() -> Iterator[Case]:
    for dtype in _FLOATING:
        for codes, archs in _CODES.items():
            for words, channels in (("", 128), (", 21 channels", 21)):
                launch = functools.partial(_launch_quantize, dtype, channels, codes)
                yield Case("quantize", f"{_name(dtype)} to {_name(codes)}{words}", launch, archs)


def _launch_quantize(dtype: torch.dtype, channels: int, codes: torch.dtype) -> None:
    quantize_triton(_images(dtype, channels), 0.1, _images(codes, channels), overlap=True)


def _images(dtype: torch.dtype, channels: int, scale: int = 1) -> Tensor:
    shape = (2, channels, scale * _HEIGHT, scale * _WIDTH)
    return _meta(shape, dtype).to(memory_format=torch.channels_last)


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def triton_rows(archs: Sequence[int] = ARCHS, op: str | None = None) -> list[Row]:
    """Compiles every case, in as many processes as there are processors.

    Raises:
        RuntimeError: they cannot be compiled here; the message says why.
    """
    because = reason()
    if because is not None:
        raise RuntimeError(f"Triton's kernels cannot be compiled here: {because}")
    jobs = [
        (case, arch) for arch in archs for case in cases() if op in (None, case.op) and arch in case.archs
    ]
    if not jobs:
        return []
    spawn = multiprocessing.get_context("spawn")
    # This process may have Triton's interpreter enabled, or Triton not loaded.
    compiled = mock.patch.dict(os.environ, TRITON_INTERPRET="0")
    with compiled, concurrent.futures.ProcessPoolExecutor(os.cpu_count(), spawn) as pool:
        rows = list(pool.map(compile_case, *zip(*jobs, strict=True), chunksize=4))
    return [row for of_case in rows for row in of_case]


def compile_case(case: Case, arch: int) -> list[Row]:
    """Compiles the kernels that a case launches on GPUs of one architecture."""
    return [_row(case, launch, arch) for launch in launches(case, arch)]


def launches(case: Case, arch: int) -> list[Launch]:
    """The launches of a case on GPUs of one architecture, in a process that compiles kernels."""
    from triton import JITFunction

    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: object, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments.update({name: named.pop(name) for name in kernel.arg_names if name in named})
        found.append(Launch(kernel, arguments, named))

    instead_of_run = mock.patch.object(JITFunction, "run", record)
    with instead_of_run, mock.patch.object(_triton, "overlaps_launches", lambda x: arch >= 90):
        case.launch()
    return found


def compiled(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for a launch: its `asm` has "ptx" and "cubin"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, by_16 = ("constexpr", False) if parameter.is_constexpr else _specialised(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        if by_16:
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def _row(case: Case, launch: Launch, arch: int) -> Row:
    built = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        ((_, registers, local, static),) = _usage(cubin.name)
    shared = max(static, built.metadata.shared)
    blocks = occupancy(arch, registers, 32 * built.metadata.num_warps, shared)
    name, cores = launch.kernel.__name__, _cores(built.asm["ptx"])
    return Row(case.op, name, case.variant, arch, registers, local, shared, blocks, cores)


def _cores(ptx: str) -> str:
    """The tensor core instructions of a kernel, as `Row.tensor_cores`."""
    match = re.search(r"(?:(wgmma)\.mma_async|(mma))\.sync\S*", ptx)
    if match is None:
        return ""
    codes = next((codes for codes in ("s8", "e4m3") if codes in match.group().split(".")), "")
    return f"{match.group(1) or match.group(2)} {codes}".rstrip()


def _specialised(value: Tensor | float | None) -> tuple[str, bool]:
    """The type for which Triton compiles an argument, and whether it is assumed to be a multiple of 16."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", True  # torch aligns memory to 16 bytes
    if isinstance(value, float):
        return "fp32", False
    if value is None or value == 1:
        return "constexpr", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def occupancy(arch: int, registers: int, threads: int, shared: int) -> int:
    """Blocks of `threads` threads and `shared` bytes that fit on a multiprocessor."""
    by_registers = REGISTERS // (_rounded(registers * 32, REGISTER_UNIT) * (threads // 32))
    by_shared = SHARED[arch] // _rounded(shared + RESERVED_SHARED, SHARED_UNIT)
    return min(by_registers, THREADS[arch] // threads, by_shared, BLOCKS[arch])


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _usage(path: str) -> list[tuple[str, int, int, int]]:
    """For each kernel in a file: name, registers, bytes of stack and local memory, static shared memory."""
    found = _RESOURCES.findall(_dump("-res-usage", path))
    return [
        (name, int(reg), int(stack) + int(local), int(shared)) for name, reg, stack, shared, local in found
    ]


def _dump(*arguments: str, folder: str | None = None) -> str:
    """Output of cuobjdump; it runs in `folder` if it writes files."""
    command = [_tool() or "", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


def cuda_rows(archs: Sequence[int] = ARCHS, op: str | None = None) -> list[Row]:
    """Rows of the compiled module's CUDA C++ kernels; none if `cuda_reason` gives a reason."""
    if cuda_reason() is not None:
        return []
    rows = []
    for arch in (arch for arch in archs if arch in MAIN_ARCHS):
        with tempfile.TemporaryDirectory() as folder:
            _dump("-xelf", f"sm_{arch}", native.module.__file__, folder=folder)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                rows += _cuda_rows(arch, str(cubin))
    return [row for row in rows if op in (None, row.op)]


def _cuda_rows(arch: int, cubin: str) -> list[Row]:
    usage = _usage(cubin)
    cores = _tensor_cores(cubin)
    rows = []
    for (mangled, registers, local, _), name in zip(usage, _demangled([of[0] for of in usage]), strict=True):
        # The anonymous namespace's mangled name contains the file's name.
        source = re.search(r"_\d+_([a-z_]+)_cu_", mangled)
        match = re.search(r"(\w+_kernel)(?:<(.*)>)?\(", name)
        kernel, arguments = match.groups() if match else (name, None)
        variant = re.sub(r"shelfkern::cuda::|\(anonymous namespace\)::|\((?:int|bool)\)", "", arguments or "")
        op = source.group(1) if source else kernel
        rows.append(Row(op, kernel, variant, arch, registers, local, None, None, cores[mangled]))
    return rows


def _tensor_cores(cubin: str) -> dict[str, str]:
    """The tensor core instructions of each kernel in a file."""
    _, *parts = re.split(r"Function : (\S+)", _dump("-sass", cubin))
    names, codes = parts[::2], parts[1::2]
    kinds = ("wgmma" if "HGMMA." in code else "mma" if "HMMA." in code else "" for code in codes)
    return dict(zip(names, kinds, strict=True))


def _demangled(names: list[str]) -> list[str]:
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
