"""Checks that each kernel computes correct results on this machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import native
from . import (
    KERNELS,
    _triton,
    attention_gate,
    attention_gate_reference,
    bn_act_dropout,
    bn_act_dropout_reference,
    conv_bn_act,
    conv_bn_act_reference,
    conv_train,
    deconv_add,
    deconv_add_reference,
    max_pool_train,
    quantize,
    quantize_reference,
    shared_block,
    shared_block_reference,
    shared_block_train,
    shared_block_train_reference,
    stem,
    stem_reference,
    upsample_add,
    upsample_add_reference,
    upsample_argmax,
    upsample_argmax_reference,
    upsample_bilinear,
    upsample_bilinear_reference,
    upsample_cross_entropy,
    upsample_cross_entropy_reference,
    upsample_softmax_sum,
    upsample_softmax_sum_reference,
)
from . import _selftest_codes as codes
from ._backends import unavailable

# Largest error relative to the largest reference value. Sums of a few hundred float32 products are good to
# about 1e-6, a float16 result to 5e-4 after every step; labels must be equal.
LIMIT = 1e-5
GPU_LIMIT = 5e-3

# Ops for training, and the backends whose gradients are tested. A convolution's gradients on a GPU are
# torch's. Ops that others build on come first: once switched off, the others are tested without them.
TRAINING = {
    "bn_act_dropout": KERNELS["bn_act_dropout"],
    "conv_train": ("native",),
    "max_pool_train": ("native",),
    "shared_block_train": KERNELS["bn_act_dropout"],
    "upsample_bilinear": KERNELS["upsample_bilinear"],
    "upsample_cross_entropy": KERNELS["upsample_cross_entropy"],
}
# Ops whose native kernels take or return uint8 values.
CODES = dict.fromkeys(
    ("attention_gate", "conv_bn_act", "deconv_add", "quantize", "stem", "upsample_add"), ("native",)
)
# Ops and backends by what is tested: the op on floats; its result and all gradients; the op on uint8 values.
KINDS: dict[str, Mapping[str, tuple[str, ...]]] = {"": KERNELS, "gradient": TRAINING, "codes": CODES}


@dataclasses.dataclass(frozen=True)
class Result:
    """One kernel's test, of one of `KINDS`; `error` is None if it could not run, for `reason`."""

    op: str
    backend: str
    error: float | None
    reason: str | None
    kind: str = ""

    @property
    def name(self) -> str:
        """What was tested."""
        return f"{self.op}{self.kind and f', {self.kind}'} ({self.backend})"

    @property
    def failed(self) -> bool:
        """Whether the kernel ran and was wrong."""
        limit = LIMIT if self.backend == "native" else GPU_LIMIT
        return self.error is not None and not self.error <= limit


class Case(NamedTuple):
    """Public op, reference, float64 tensors, other arguments.

    Public ops take no quantized tensors; for those cases `public` runs kernels. Both may return several
    results.
    """

    public: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    arguments: dict[str, Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _cases() -> dict[str, Case]:
    """A case for each op, with odd sizes on purpose."""
    x, size = _random(2, 19, 7, 9), (13, 20)
    image = torch.arange(2 * 30 * 33 * 3, dtype=torch.uint8).view(2, 30, 33, 3)
    norms = [_random(19) for _ in range(4)]
    residual = _far_from_zero(_random(2, 19, 7, 9)) - F.batch_norm(x, None, None, norms[0], norms[1], True)
    mean, std = torch.full((3,), 0.45, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64)
    stem_weights = (_random(20, 3, 7, 7) / 12, _random(20), _random(20), mean, std)
    cases: dict[str, tuple[Any, ...]] = {
        "attention_gate": (attention_gate, attention_gate_reference, (x, _random(5, 19), *_pair(5)), {}),
        "bn_act_dropout": (
            _of_modules(bn_act_dropout, bn=_norm(19)),
            _of_modules(bn_act_dropout_reference, bn=_norm(19)),
            (x, *norms[:2], residual),
            dict(slope=0.01),
        ),
        "conv_bn_act": (
            conv_bn_act,
            conv_bn_act_reference,
            (x, _random(21, 19, 3, 3) / 13, *_pair(21), _random(2, 21, 4, 5), _random(2, 21, 4, 5)),
            dict(stride=2, padding=1, slope=0.01),
        ),
        "deconv_add": (
            deconv_add,
            deconv_add_reference,
            (x, _random(19, 6, 3, 3) / 6, _random(6), _random(2, 6, 14, 18)),
            {},
        ),
        "quantize": (quantize, quantize_reference, (x,), dict(step=1 / 32)),
        "shared_block": (
            shared_block,
            shared_block_reference,
            (x, _random(19, 19, 3, 3) / 13, *norms),
            dict(slope=0.01, skip=True),
        ),
        "stem": (stem, stem_reference, (image, *stem_weights), dict(size=(32, 64))),
        "upsample_add": (
            upsample_add,
            upsample_add_reference,
            (x, _random(2, 19, 14, 18), _random(2, 19)),
            {},
        ),
        "upsample_argmax": (upsample_argmax, upsample_argmax_reference, (x,), dict(size=size, crop=(12, 17))),
        "upsample_bilinear": (
            upsample_bilinear,
            upsample_bilinear_reference,
            (x,),
            dict(size=size, crop=(12, 17)),
        ),
        "upsample_cross_entropy": (
            upsample_cross_entropy,
            upsample_cross_entropy_reference,
            (x, torch.arange(2 * 12 * 17).view(2, 12, 17) * 7 % 19),
            dict(size=size, ignore_index=5, label_smoothing=0.1),
        ),
        "upsample_softmax_sum": (
            _into_zeros(upsample_softmax_sum),
            _into_zeros(upsample_softmax_sum_reference),
            (x,),
            dict(size=size, crop=(12, 17), mirror=True),
        ),
    }
    return {op: Case(*case) for op, case in cases.items()}


def _training_cases() -> dict[str, Case]:
    """A case for each op of `TRAINING`.

    If rounding changed the sign of an activation's argument, its gradient would jump: all arguments are far
    from 0, those of the block because of its norms' biases.
    """
    x, norm = _random(2, 19, 7, 9), (1 + 0.1 * _random(19), 4 * _random(19, 1)[:, 0].sign())
    conv, pool = nn.Conv2d(32, 32, 3, padding=1, device="meta"), nn.MaxPool2d(3, 2, 1)
    block = dict(
        conv=nn.Conv2d(19, 19, 3, padding=1, bias=False, device="meta"), bn1=_norm(19), bn2=_norm(19)
    )
    shared = {op: case for op, case in _cases().items() if op in TRAINING}
    return shared | {
        "conv_train": Case(
            _of_modules(lambda x, conv, backend: conv_train(x, conv), conv=conv),
            _of_modules(lambda x, conv: conv(x), conv=conv),
            # Enough pixels and channels for Winograd's filtering.
            (_random(2, 32, 33, 34), _random(32, 32, 3, 3) / 17, _random(32)),
            {},
        ),
        "max_pool_train": Case(
            lambda x, backend: max_pool_train(x, pool), pool, (_random(2, 19, 9, 11),), {}
        ),
        "shared_block_train": Case(
            _of_modules(shared_block_train, **block),
            _of_modules(shared_block_train_reference, **block),
            (x, _random(19, 19, 3, 3) / 13, *norm, *norm),
            dict(slope=0.01, skip=True),
        ),
    }


def _codes_cases() -> dict[str, Case]:
    """A case for each op of `CODES`."""
    return {op: Case(*case) for op, case in codes.cases().items()}


class _Modules(nn.Module):
    """An op applied to x, modules and other tensors."""

    def __init__(self, op: Callable[..., Tensor], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.op, self.parts = op, nn.ModuleDict(modules)

    def forward(self, x: Tensor, *others: Tensor, **arguments: Any) -> Tensor:
        return self.op(x, *self.parts.values(), *others, **arguments)


def _of_modules(op: Callable[..., Tensor], **modules: nn.Module) -> Callable[..., Tensor]:
    """Wraps an op of modules to take their parameters as tensors, in order, after x; a norm's are float32."""
    module = _Modules(op, modules)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *tensors: Tensor, **arguments: Any) -> Tensor:
        given = dict(zip(names, tensors, strict=False))
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = {name: value.to(wide) if ".bn" in name else value for name, value in given.items()}
        return torch.func.functional_call(module, parameters, (x, *tensors[len(names) :]), arguments)

    return call


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False, device="meta")


def _far_from_zero(x: Tensor) -> Tensor:
    return x + torch.copysign(torch.tensor(0.5), x)


def _into_zeros(add: Callable[..., None]) -> Callable[..., Tensor]:
    """Wraps an op that adds to `out` to return what it adds."""

    def added(scores: Tensor, size: tuple[int, int], crop: tuple[int, int], **arguments: Any) -> Tensor:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        out = scores.new_zeros((*scores.shape[:2], *crop), dtype=dtype)
        add(scores, size, out, **arguments)
        return out

    return added


def _pair(channels: int) -> tuple[Tensor, Tensor]:
    return _random(channels), _random(channels, 1)[:, 0]


def _with_gradients(op: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """An op's result and the gradients of all floating inputs, for a random gradient of the result."""

    def call(*tensors: Tensor, **arguments: Any) -> list[Tensor]:
        tensors = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in tensors)
        leaves = [t for t in tensors if t.requires_grad]
        with torch.enable_grad():
            result = op(*tensors, **arguments)
            # Rounded to float16, so that it is the same in every dtype.
            weights = _random(*result.shape).half().to(result)
            return [result.detach(), *torch.autograd.grad(result, leaves, weights)]

    return call


def _unavailable(op: str, backend: str) -> str | None:
    parts = (op, "bn_act_dropout") if op == "shared_block_train" else (op,)
    return next(filter(None, (unavailable(part, backend) for part in parts)), None)


@functools.cache
def run(op: str, backend: str = "native", kind: str = "") -> Result:
    """Tests one kernel, once per process: in float32 on the CPU, in float16, which all kernels take, on a
    GPU.

    kind: one of `KINDS`, which must include the op. A kernel that fails is switched off for the process.
    """
    reason = _unavailable(op, backend)
    if reason is None and backend == "triton" and _triton.INTERPRETED:
        reason = "Triton interprets its kernels here, which is only for tests"
    if reason is not None:
        return Result(op, backend, None, reason, kind)
    result = Result(op, backend, _error(op, backend, kind), None, kind)
    if result.failed:
        because = f"its self-test failed on this machine: {result.name} has an error of {result.error:.1e}"
        native.disable(op, because, backend)
    return result


def _case(op: str, kind: str) -> Case:
    if kind == "codes":
        return _codes_cases()[op]
    return (_training_cases() if kind else _cases())[op]


def _error(op: str, backend: str, kind: str) -> float:
    """The largest error relative to the largest reference value, over all result tensors."""
    public, reference, tensors, arguments = _case(op, kind)
    device, dtype = ("cpu", torch.float32) if backend == "native" else ("cuda", torch.float16)
    narrow = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    # A GPU's result is compared with the exact result of its rounded inputs.
    exact = tensors if backend == "native" else [t.double() if t.is_floating_point() else t for t in narrow]
    there = [t.to(device) for t in narrow]
    if kind == "gradient":
        public, reference = _with_gradients(public), _with_gradients(reference)
    truths = _listed(reference(*exact, **arguments))
    results = _listed(public(*there, **arguments, backend=backend))
    pairs = [(found.double().cpu(), truth.double()) for found, truth in zip(results, truths, strict=True)]
    errors = torch.stack([(found - truth).abs().max() / truth.abs().max() for found, truth in pairs])
    # torch's maximum, unlike Python's, is NaN if any value is.
    return errors.max().item()


def _listed(results: Tensor | list[Tensor]) -> list[Tensor]:
    return results if isinstance(results, list) else [results]


def run_all() -> list[Result]:
    """Tests every kernel of every op, of each kind, except the emulated ones, which are for tests."""
    tests = [
        (op, backend, kind)
        for kind, ops in KINDS.items()
        for op, backends in ops.items()
        for backend in backends
    ]
    return [run(*test) for test in tests if test[1] != "emulated"]
