from __future__ import annotations

import pytest
import torch
from parity import each_isa, layouts, needs_native, random
from torch import nn

from shelfkern import native, ops

POOL = nn.MaxPool2d(3, 2, 1)
pytestmark = needs_native


def trained(call, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    result = call(x, POOL)
    result.backward(grad)
    return result.detach(), x.grad


def plain(x: torch.Tensor, pool: nn.Module) -> torch.Tensor:
    return pool(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 8, 10), (1, 19, 7, 9), (2, 3, 1, 1), (1, 33, 2, 5), (1, 5, 6, 1)])
def test_result_and_gradient_of_every_isa_are_torchs(shape, dtype) -> None:
    n, c, h, w = shape
    # Few values, so that some are equal: the first counts.
    x, grad = random(*shape).mul(2).round().to(dtype), random(n, c, (h + 1) // 2, (w + 1) // 2, seed=1)
    grad = grad.to(dtype)
    expected, exact = trained(plain, x, grad)[0], trained(plain, x.double(), grad.double())[1]
    rounding = 2**-8 if dtype is torch.bfloat16 else 1e-6

    def check(isa: str) -> None:
        for _, given in layouts(x):
            result, gradient = trained(ops.max_pool_train, given, grad)
            assert torch.equal(result, expected), isa
            torch.testing.assert_close(gradient.double(), exact, rtol=rounding, atol=1e-6)

    each_isa(check)


def test_values_that_are_not_finite() -> None:
    x = random(2, 20, 9, 9)
    for value, at in ((float("nan"), 0.1), (float("inf"), 0.2), (float("-inf"), 0.7)):
        x[random(*x.shape, seed=int(10 * at)).abs() < at] = value
    grad = random(2, 20, 5, 5, seed=1)
    (result, gradient), (expected, exact) = trained(ops.max_pool_train, x, grad), trained(plain, x, grad)
    assert result.isnan().any() and expected.isneginf().any()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-6)


def test_a_byte_is_kept_for_each_result() -> None:
    kept: list[torch.Tensor] = []
    x = random(2, 16, 12, 14).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = ops.max_pool_train(x, POOL)
    assert sum(t.nbytes for t in kept) == result.numel()


@pytest.mark.parametrize(
    "x, pool",
    [
        (random(1, 4, 9, 9), nn.MaxPool2d(3, 2)),
        (random(1, 4, 9, 9), nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        (random(1, 4, 9, 9), nn.AvgPool2d(3, 2, 1)),
        (random(1, 4, 9, 9).double(), POOL),
        (random(4, 9, 9), POOL),
        (random(0, 4, 9, 9), POOL),
    ],
)
def test_others_are_called(x, pool, monkeypatch) -> None:
    def no(*arguments):
        raise AssertionError("the kernel")

    monkeypatch.setattr(native.module, "max_pool", no)
    assert torch.equal(ops.max_pool_train(x, pool), pool(x))


def test_compilers_see_torchs_own() -> None:
    x = random(1, 4, 9, 9)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.max_pool_train(x, POOL), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), POOL(x))
