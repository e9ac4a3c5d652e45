"""Whether each kernel computes the right thing on this very machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    deconv_add,
    deconv_add_reference,
    quantize,
    quantize_reference,
    shared_block,
    shared_block_reference,
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
from ._backends import unavailable

# Largest error over the truth's largest value. Sums of a few hundred float32 products are good to
# about 1e-6, a float16 result to 5e-4 after every step; labels must be equal.
LIMIT = 1e-5
GPU_LIMIT = 5e-3


@dataclasses.dataclass(frozen=True)
class Result:
    """One kernel's test: `error` is None where it could not run, for `reason`."""

    op: str
    backend: str
    error: float | None
    reason: str | None

    @property
    def failed(self) -> bool:
        """Whether the kernel ran and was wrong."""
        limit = LIMIT if self.backend == "native" else GPU_LIMIT
        return self.error is not None and not self.error <= limit


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _cases() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple, dict]]:
    """For each op: public op, reference, float64 tensors, other arguments. Odd sizes on purpose."""
    x, size = _random(2, 19, 7, 9), (13, 20)
    image = torch.arange(2 * 30 * 33 * 3, dtype=torch.uint8).view(2, 30, 33, 3)
    norms = [_random(19) for _ in range(4)]
    mean, std = torch.full((3,), 0.45, dtype=torch.float64), torch.full((3,), 0.25, dtype=torch.float64)
    stem_weights = (_random(20, 3, 7, 7) / 12, _random(20), _random(20), mean, std)
    return {
        "attention_gate": (attention_gate, attention_gate_reference, (x, _random(5, 19), *_pair(5)), {}),
        "bn_act_dropout": (
            _with_norm(bn_act_dropout),
            _with_norm(bn_act_dropout_reference),
            (x, *norms[:2], _random(2, 19, 7, 9)),
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
            _and_gradient(upsample_cross_entropy),
            _and_gradient(upsample_cross_entropy_reference),
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


class _Normalised(nn.Module):
    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op, self.bn = op, nn.BatchNorm2d(19, track_running_stats=False)

    def forward(self, x: Tensor, residual: Tensor, **arguments: Any) -> Tensor:
        return self.op(x, self.bn, residual, **arguments)


def _with_norm(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An op of a batch norm in training, as one of the norm's parameters."""
    module = _Normalised(op)

    def normalised(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, **arguments: Any) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        parameters = {"bn.weight": weight.to(wide), "bn.bias": bias.to(wide)}
        return torch.func.functional_call(module, parameters, (x, residual), arguments)

    return normalised


def _into_zeros(add: Callable[..., None]) -> Callable[..., Tensor]:
    """What an op that adds to `out` adds."""

    def added(scores: Tensor, size: tuple[int, int], crop: tuple[int, int], **arguments: Any) -> Tensor:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        out = scores.new_zeros((*scores.shape[:2], *crop), dtype=dtype)
        add(scores, size, out, **arguments)
        return out

    return added


def _pair(channels: int) -> tuple[Tensor, Tensor]:
    return _random(channels), _random(channels, 1)[:, 0]


def _and_gradient(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss, and its gradient where each pixel has one of about 1."""

    def both(scores: Tensor, target: Tensor, **arguments: Any) -> Tensor:
        scores = scores.detach().requires_grad_()
        with torch.enable_grad():
            result = loss(scores, target, **arguments)
            (gradient,) = torch.autograd.grad(result * target.numel(), scores)
        return torch.cat([result.detach().double().view(1), gradient.double().flatten()])

    return both


@functools.cache
def run(op: str, backend: str = "native") -> Result:
    """Tests one kernel once a process: float32 on the CPU, float16, which all take, on a GPU.

    A wrong one is switched off for the process.
    """
    reason = unavailable(op, backend)
    if reason is None and backend == "triton" and _triton.INTERPRETED:
        reason = "Triton interprets its kernels here, which is for tests"
    if reason is not None:
        return Result(op, backend, None, reason)
    public, reference, tensors, arguments = _cases()[op]
    device, dtype = ("cpu", torch.float32) if backend == "native" else ("cuda", torch.float16)
    narrow = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    # A GPU's result is judged beside what its rounded inputs give.
    exact = tensors if backend == "native" else [t.double() if t.is_floating_point() else t for t in narrow]
    truth = reference(*exact, **arguments).double()
    found = public(*(t.to(device) for t in narrow), **arguments, backend=backend).double().cpu()
    result = Result(op, backend, ((found - truth).abs().max() / truth.abs().max()).item(), None)
    if result.failed:
        because = f"its self-test failed on this machine, with an error of {result.error:.1e}"
        native.disable(op, because, backend)
    return result


def run_all() -> list[Result]:
    """Tests every kernel of every op, but the emulated ones, which are for tests."""
    return [
        run(op, backend) for op, kernels in KERNELS.items() for backend in kernels if backend != "emulated"
    ]
