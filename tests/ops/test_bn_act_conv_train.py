from __future__ import annotations

import copy

import pytest
import torch
from parity import layouts, needs_native, random
from torch import nn
from torch.testing import assert_close

from shelfkern import ops

pytestmark = needs_native


def two_ops(x, bn, conv, *, slope=0.0, p=0.0, backend="reference"):
    """What it is made of."""
    return conv(ops.bn_act_dropout(x, bn, slope=slope, p=p, backend=backend))


def trained(call, x, bn, conv, dtype=torch.float32, **options) -> dict[str, torch.Tensor]:
    """Result, all gradients and the norm's buffers, by copies."""
    torch.manual_seed(3)
    parts = nn.ModuleDict({"bn": copy.deepcopy(bn), "conv": copy.deepcopy(conv)}).to(dtype)
    x = x.detach().clone().to(dtype).requires_grad_()
    result = call(x, parts["bn"], parts["conv"], **options)
    result.backward(random(*result.shape, seed=1).to(dtype))
    found = {"result": result.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in parts.named_parameters()}
    return found | {name: b.float() for name, b in parts["bn"].named_buffers()}


def norm(c: int, **options) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(c, **options)
    if bn.affine:
        with torch.no_grad():
            bn.weight.copy_(1 + 0.3 * random(c, seed=4))
            bn.bias.copy_(0.3 * random(c, seed=5))
    return bn


def distance(found: dict, truth: dict, name: str) -> float:
    return ((found[name].double() - truth[name]).norm() / truth[name].norm().clamp_min(1e-6)).item()


CONVS = {
    "3x3": dict(kernel_size=3, padding=1, bias=False),
    "1x1 with bias": dict(kernel_size=1),
    "stride 2": dict(kernel_size=3, stride=2, padding=1),
    "groups": dict(kernel_size=3, padding=2, dilation=2, groups=2),
}


@pytest.mark.parametrize("slope, p", [(0.0, 0.0), (0.01, 0.3), (None, 0.0)])
@pytest.mark.parametrize("kind", list(CONVS))
def test_as_near_to_float64_as_one_after_the_other(kind, slope, p) -> None:
    torch.manual_seed(2)
    x, bn, conv = random(3, 34, 17, 18), norm(34), nn.Conv2d(34, 36, **CONVS[kind])
    options = dict(slope=slope, p=0.0)
    found, eager = (trained(op, x, bn, conv, **options) for op in (ops.bn_act_conv_train, two_ops))
    truth = trained(two_ops, x, bn, conv, torch.float64, **options)
    assert found.keys() == truth.keys()
    for name in truth:
        # Winograd's error is 4.5 times eager's.
        assert distance(found, truth, name) <= 5 * distance(eager, truth, name) + 1e-6, name
    found, eager = (trained(op, x, bn, conv, slope=slope, p=p) for op in (ops.bn_act_conv_train, two_ops))
    for name in eager:
        assert_close(found[name], eager[name], rtol=1e-3, atol=1e-3 * eager[name].abs().max().item() + 1e-6)


def test_any_strides_give_the_same_bits() -> None:
    x, bn, conv = random(2, 32, 12, 13), norm(32), nn.Conv2d(32, 40, 3, padding=1)
    expected = trained(ops.bn_act_conv_train, x, bn, conv)
    for name, given in layouts(x):
        found = trained(ops.bn_act_conv_train, given, bn, conv)
        assert torch.equal(found["result"], expected["result"]), name
        assert torch.equal(found["x"], expected["x"]), name


def kept_bytes(call, *arguments) -> int:
    """Of what is kept for the gradient, without parameters."""
    kept: dict[int, int] = {}

    def keep(t):
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call(*arguments)
    return sum(kept.values())


def test_only_x_is_kept() -> None:
    x, bn, conv = random(2, 32, 12, 12).requires_grad_(), norm(32), nn.Conv2d(32, 64, 3, padding=1)
    bits, statistics = x.numel() // 8, 2 * 4 * 32
    assert kept_bytes(ops.bn_act_conv_train, x, bn, conv) == x.nbytes + bits + statistics
    assert kept_bytes(two_ops, x, bn, conv) >= 2 * x.nbytes


@pytest.mark.parametrize("frozen", ["x", "bn", "conv", "all but conv.bias"])
def test_frozen_inputs(frozen) -> None:
    x, bn, conv = random(2, 8, 6, 6).requires_grad_(frozen != "x"), norm(8), nn.Conv2d(8, 160, 3, padding=1)
    bn.requires_grad_(frozen != "bn")
    conv.requires_grad_(frozen != "conv")
    if frozen == "all but conv.bias":
        x.requires_grad_(False)
        bn.requires_grad_(False)
        conv.weight.requires_grad_(False)
    leaves = [t for t in (x, *bn.parameters(), *conv.parameters()) if t.requires_grad]
    found = torch.autograd.grad(ops.bn_act_conv_train(x, bn, conv).square().sum(), leaves)
    expected = torch.autograd.grad(two_ops(x, bn, conv).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_norms_without_parameters_and_in_eval_mode() -> None:
    x, conv = random(2, 8, 6, 6), nn.Conv2d(8, 9, 1)
    for bn in (norm(8, affine=False), norm(8, track_running_stats=False), norm(8).eval()):
        found, expected = (trained(op, x, bn, conv) for op in (ops.bn_act_conv_train, two_ops))
        for name in expected:
            assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_autocast_rounds_what_is_convolved() -> None:
    x, bn, conv = random(2, 32, 12, 12), norm(32), nn.Conv2d(32, 40, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.bn_act_conv_train(x, bn, conv).dtype is torch.bfloat16
        given, plain = x.bfloat16().requires_grad_(), x.bfloat16().requires_grad_()
        result = ops.bn_act_conv_train(given, bn, conv)
        expected = two_ops(plain, copy.deepcopy(bn), conv)
    assert result.dtype is torch.bfloat16
    assert_close(result, expected, rtol=0.05, atol=0.05)
    result.float().square().mean().backward()
    expected.float().square().mean().backward()
    assert (given.grad - plain.grad).float().norm() <= 0.02 * plain.grad.float().norm()


def test_compilers_see_both_ops() -> None:
    x, bn, conv = random(2, 8, 6, 6), norm(8), nn.Conv2d(8, 9, 3)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.bn_act_conv_train(x, bn, conv), fullgraph=True, backend="eager")
    assert_close(compiled(x), ops.bn_act_conv_train(x, bn, conv), rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_fit() -> None:
    x, bn, conv = random(2, 8, 6, 6), norm(8), nn.Conv2d(8, 9, 3)
    with pytest.raises(ValueError, match="p is 2, it may be from 0 to 1"):
        ops.bn_act_conv_train(x, bn, conv, p=2)
    with pytest.raises(TypeError, match="conv is NoneType, it must be a torch"):
        ops.bn_act_conv_train(x, bn, None)
    with pytest.raises(TypeError, match="bn is NoneType, it must be a torch"):
        ops.bn_act_conv_train(x, None, conv)
    with pytest.raises(ValueError, match="bn has 9 channels"):
        ops.bn_act_conv_train(x, norm(9), conv)
    with pytest.raises(ValueError, match=r"conv\.weight is \(9, 7, 3, 3\)"):
        ops.bn_act_conv_train(x, bn, nn.Conv2d(7, 9, 3))
    with pytest.raises(TypeError, match=r"conv\.weight is torch\.float64"):
        ops.bn_act_conv_train(x, bn, nn.Conv2d(8, 9, 3).double())
