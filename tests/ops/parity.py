"""What the tests of ops share: inputs, hostile layouts, and the rule by which a result passes."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Callable, Container, Iterator

import pytest
import torch
from torch import Tensor

from shelfkern import native
from shelfkern.ops import _triton

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
BACKENDS = [pytest.param("native", marks=needs_native), "reference"]
# The CUDA C++ kernels: on the CPU, thread by thread, and on a GPU where there is one.
needs_emulator = pytest.mark.skipif(
    native.emulation is None, reason=f"no emulator: {native.why_not_emulated}"
)
needs_cuda = pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA: {native.cuda_reason()}")
CUDA_BACKENDS = [
    pytest.param("emulated", marks=needs_emulator),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
# Triton kernels run on the GPU where there is one, otherwise interpreted: a process knows one of the two.
INTERPRETED = _triton.INTERPRETED
_no_triton = _triton.why_not or (
    None if INTERPRETED or torch.cuda.is_available() else "no GPU, and TRITON_INTERPRET is not 1"
)
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.skipif(_no_triton is not None, reason=f"no Triton: {_no_triton}"),
        *([] if INTERPRETED else [pytest.mark.gpu]),
    ],
)
_no_gpu = _no_triton or ("the kernels are interpreted" if INTERPRETED else None)
DTYPES = [torch.float32, torch.bfloat16]
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name in Python from 3.13
ISAS = native.module.isas() if native.module else []


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nhwc(x: Tensor) -> Tensor:
    """x with NHWC storage, whatever its sizes."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


# What a convolution may have after its sum.
EVERY = ("scale", "shift", "residual", "skip")


@dataclasses.dataclass
class Layer:
    """A convolution and what follows it, in the dtypes and layouts of a kernel's own."""

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    skip: Tensor | None
    stride: int
    padding: int
    slope: float | None

    def only(self, present: Container[str]) -> Layer:
        """With those of `EVERY` that are present."""
        return dataclasses.replace(self, **{name: None for name in EVERY if name not in present})


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Equal tensors that lie differently in memory."""
    yield "contiguous", x.contiguous()
    yield "channels_last", nhwc(x)
    yield "sliced", torch.cat([x, x], 1)[:, : x.shape[1]]
    yield "strided", x.repeat_interleave(2, 3)[..., ::2]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "offset", nhwc(torch.cat([x[:1], x]))[1:]


def needs_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of Triton kernels, on the GPU where there is one."""
    test = pytest.mark.skipif(_no_triton is not None, reason=f"no Triton: {_no_triton}")(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


def needs_triton_on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what only the compiled kernels can show."""
    return pytest.mark.gpu(pytest.mark.skipif(_no_gpu is not None, reason=f"no GPU: {_no_gpu}")(test))


def moved(backend: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors on the device that the backend's kernels run on."""
    if backend != "cuda" and (backend != "triton" or INTERPRETED):
        return list(tensors)
    return [None if t is None else t.cuda() for t in tensors]


@contextlib.contextmanager
def far_apart(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: object = "cpu", stride: int = 2**31 + 16
) -> Iterator[Tensor]:
    """A zeroed (N, C, H, W) tensor in NHWC storage whose images are more than 2**31 elements apart.

    On the CPU the memory between them is reserved and never touched.
    """
    n, c, h, w = shape
    count = (n - 1) * stride + c * h * w
    if torch.device(device).type == "cpu":
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | MAP_NORESERVE)
        storage = torch.frombuffer(memory, dtype=dtype)
    else:
        storage = torch.empty(count, dtype=dtype, device=device)
    images = storage.as_strided((n, c, h, w), (stride, 1, w * c, c))
    yield images if storage.device.type == "cpu" else images.zero_()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_as_exact(result: Tensor, truth: Tensor, eager: Tensor, floor: float = 0.0) -> None:
    """The error is at most twice eager's, in the root mean square; the floor is for where eager is exact.

    The largest of a few hundred roundings is a lottery: eager's own differs twofold from one CPU to the
    next. It is held below four times eager's, which finds a wrong pixel.
    """
    assert truth.dtype is torch.float64 and result.shape == truth.shape
    if truth.numel() == 0:
        return
    errors, allowed = (result.double() - truth).abs(), (eager.double() - truth).abs()
    for name, found, limit in (
        ("root mean square", errors.square().mean().sqrt(), 2 * allowed.square().mean().sqrt()),
        ("largest", errors.max(), 4 * allowed.max()),
    ):
        assert found <= max(float(limit), floor), f"{name} error {found:.3g}, allowed {limit:.3g}"


def each_isa(run: Callable[[str], None]) -> None:
    """Calls run once for every instruction set this CPU has, then goes back to the one chosen before."""
    before = native.module.isa()
    try:
        for isa in ISAS:
            assert native.module.force_isa(isa)
            run(isa)
    finally:
        native.module.force_isa(before)
