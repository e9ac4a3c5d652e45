from __future__ import annotations

import copy
import importlib

import pytest
import torch
from parity import layouts, needs_native, random
from torch import nn
from torch.nn import functional as F

from shelfkern import ops

conv_train = importlib.import_module("shelfkern.ops.conv_train")

# Of Winograd's error and eager's: the root mean square, as in test_conv_winograd.py, and the largest, which
# is a lottery, as in parity.py.
BOUNDS = 4.5, 2 * 4.5


def convolution(c: int, k: int, bias: bool = True, **options) -> nn.Conv2d:
    torch.manual_seed(5)
    return nn.Conv2d(c, k, 3, padding=1, bias=bias, **options)


def trained(call, x, conv, grad, dtype=torch.float32):
    """Result and gradients of a call of a copy."""
    conv = copy.deepcopy(conv).to(dtype)
    x = x.detach().clone().to(dtype).requires_grad_()
    result = call(x, conv)
    result.backward(grad.to(dtype))
    return {"result": result.detach(), "x": x.grad} | {name: p.grad for name, p in conv.named_parameters()}


def eager(x, conv):
    return conv(x)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what Winograd's kernel is given."""
    found, kernel = [], conv_train.conv_winograd_native
    monkeypatch.setattr(
        conv_train, "conv_winograd_native", lambda x, *rest: found.append(tuple(x.shape)) or kernel(x, *rest)
    )
    return found


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape, k", [((2, 32, 32, 32), 32), ((1, 40, 47, 45), 72), ((3, 80, 30, 31), 33)])
def test_result_and_gradients(shape, k, bias, passes):
    n, c, h, w = shape
    x, grad, conv = random(*shape), random(n, k, h, w, seed=1), convolution(c, k, bias)
    found = trained(ops.conv_train, x, conv, grad)
    assert passes == [shape, (n, k, h, w)]
    expected, truth = trained(eager, x, conv, grad), trained(eager, x, conv, grad, torch.float64)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        errors, allowed = (found[name] - exact).abs(), (expected[name] - exact).abs()
        if name in ("result", "x"):
            assert errors.square().mean().sqrt() <= BOUNDS[0] * allowed.square().mean().sqrt(), name
            assert errors.max() <= BOUNDS[1] * allowed.max(), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-3)


@needs_native
def test_any_strides(passes):
    x, grad, conv = random(2, 32, 32, 33), random(2, 32, 32, 33, seed=1), convolution(32, 32)
    expected = trained(ops.conv_train, x, conv, grad)
    for (name, a), (_, g) in zip(layouts(x), layouts(grad), strict=True):
        found = trained(ops.conv_train, a, conv.to(memory_format=torch.channels_last), g)
        assert torch.equal(found["result"], expected["result"]) and torch.equal(found["x"], expected["x"]), (
            name
        )
        torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-4, atol=1e-3)
    x.requires_grad_()
    ops.conv_train(x, conv).sum().backward()
    found, x.grad = x.grad, None
    ops.conv_train(x, conv).backward(torch.ones(2, 32, 32, 33))
    assert torch.equal(found, x.grad)


@needs_native
def test_threads_change_no_bit():
    x, grad, conv = random(2, 32, 40, 41), random(2, 48, 40, 41, seed=1), convolution(32, 48)
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(trained(ops.conv_train, x, conv, grad))
    for run in runs[1:]:
        assert torch.equal(run["result"], runs[0]["result"]) and torch.equal(run["x"], runs[0]["x"])


@needs_native
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs(frozen, passes):
    x, conv = random(2, 32, 32, 32).requires_grad_(frozen != "x"), convolution(32, 32)
    conv.weight.requires_grad_(frozen != "weight")
    conv.bias.requires_grad_(frozen != "bias")
    leaves = [t for t in (x, *conv.parameters()) if t.requires_grad]
    found = torch.autograd.grad(ops.conv_train(x, conv).square().sum(), leaves)
    expected = torch.autograd.grad(conv(x).square().sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    assert len(passes) == (1 if frozen == "x" else 2)
    with torch.no_grad():
        assert not ops.conv_train(x, conv).requires_grad


@pytest.mark.parametrize(
    "x, conv",
    [
        (random(1, 32, 45, 45), convolution(32, 32)),  # few pixels
        (random(2, 31, 40, 40), convolution(31, 32)),  # few channels
        (random(2, 32, 40, 40).double(), convolution(32, 32).double()),
        (random(2, 32, 40, 40).bfloat16(), convolution(32, 32).bfloat16()),
        (random(2, 32, 40, 40), convolution(32, 32, stride=2)),
        (random(2, 32, 40, 40), convolution(32, 32, padding_mode="reflect")),
        (random(2, 32, 40, 40), nn.Conv2d(32, 32, 1)),
        (random(2, 32, 40, 40), nn.Identity()),
        (random(32, 50, 50), convolution(32, 32)),
    ],
)
def test_others_are_called(x, conv, passes, monkeypatch):
    monkeypatch.setattr(conv_train, "ONEDNN_HAS_BFLOAT16", True)
    assert torch.equal(ops.conv_train(x, conv), conv(x)) and not passes


@needs_native
def test_autocast_and_compilers_see_torchs_own(passes, monkeypatch):
    monkeypatch.setattr(conv_train, "ONEDNN_HAS_BFLOAT16", True)
    x, conv = random(2, 32, 40, 40), convolution(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.conv_train(x, conv), conv(x))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.conv_train(x, conv), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), conv(x)) and not passes
    with pytest.raises(RuntimeError, match="channels"):
        ops.conv_train(random(2, 33, 40, 40), conv)


@needs_native
@pytest.mark.parametrize("extent", [40, 5], ids=["winograd", "product"])
def test_gradients_within_autocast(extent):
    x, conv = random(2, 64, extent, extent).requires_grad_(), convolution(64, 64)
    leaves = [x, *conv.parameters()]
    expected = torch.autograd.grad(ops.conv_train(x, conv).square().sum(), leaves)
    result = ops.conv_train(x, conv).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(result, leaves)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind, shape, k, options, kernel_passes",
    [
        (nn.Conv2d, (2, 32, 32, 33), 40, dict(kernel_size=3, padding=1), 2),
        (nn.Conv2d, (2, 8, 20, 20), 16, dict(kernel_size=3, padding=1, stride=2, bias=False), 0),
        (nn.Conv2d, (2, 8, 5, 5), 64, dict(kernel_size=1), 0),
        (nn.Conv2d, (1, 3, 33, 40), 16, dict(kernel_size=7, padding=3, stride=2), 0),
        (nn.ConvTranspose2d, (2, 16, 9, 8), 8, dict(kernel_size=3, stride=2, padding=1, output_padding=1), 0),
        (nn.ConvTranspose2d, (2, 16, 9, 8), 8, dict(kernel_size=2, groups=2, bias=False), 0),
    ],
    ids=str,
)
def test_without_kernels_of_onednn_bfloat16_is_computed_in_float32(
    kind, shape, k, options, kernel_passes, autocast, passes, monkeypatch
):
    monkeypatch.setattr(conv_train, "ONEDNN_HAS_BFLOAT16", False)
    torch.manual_seed(5)
    x, conv = random(*shape), kind(shape[1], k, **options)
    grad = random(*conv(x).shape, seed=1)
    seen = []
    for name in ("conv2d", "conv_transpose2d"):
        function = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *rest, f=function: seen.append(x.dtype) or f(x, *rest))

    def call(x, conv):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ops.conv_train(x, conv)

    dtype = torch.float32 if autocast else torch.bfloat16
    found = trained(call, x, conv, grad.bfloat16(), dtype)
    assert len(passes) == kernel_passes and seen == [torch.float32] * (not kernel_passes)
    monkeypatch.setattr(conv_train, "takes_float32", lambda *_: False)
    expected = trained(call, x, conv, grad.bfloat16(), dtype)
    truth = trained(eager, x, conv, grad, torch.float64)
    for name, exact in truth.items():
        assert found[name].dtype is expected[name].dtype
        error, allowed = ((one[name] - exact).norm() / exact.norm() for one in (found, expected))
        assert error <= 2 * allowed, name


@needs_native
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_inside_a_shared_block(p, passes):
    """Both convolutions and both gradients, at no more than Winograd's part of eager's error."""
    x, grad, conv = random(2, 32, 34, 33), random(2, 32, 34, 33, seed=1), convolution(32, 32)
    norms = nn.BatchNorm2d(32), nn.BatchNorm2d(32)

    def block(backend):
        def call(x, conv):
            torch.manual_seed(2)
            bn1, bn2 = (copy.deepcopy(bn).to(x.dtype) for bn in norms)
            return ops.shared_block_train(x, conv, bn1, bn2, slope=0.5, p=p, backend=backend)

        return call

    found = trained(block("native"), x, conv, grad)
    assert len(passes) == 4
    expected = trained(block("reference"), x, conv, grad)
    for name, limit in (("result", 1e-5), ("x", 1e-5), ("weight", 1e-4)):
        apart = (found[name] - expected[name]).square().mean().sqrt()
        assert apart <= limit * expected[name].square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=1),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=3, padding=1),
        dict(kernel_size=3, padding=1, stride=2),
        dict(kernel_size=(3, 1), padding=(2, 0), dilation=(2, 1), bias=False),
    ],
    ids=str,
)
def test_few_pixels_make_the_weights_gradient_by_a_product(options, dtype, monkeypatch):
    torch.manual_seed(5)
    x, conv = random(2, 24, 9, 7), nn.Conv2d(24, 136, **options)
    grad = random(*conv(x).shape, seed=1)
    expected, truth = (trained(eager, x, conv, grad, kind) for kind in (dtype, torch.float64))
    made, product = [], conv_train._weight_gradient
    monkeypatch.setattr(conv_train, "_weight_gradient", lambda *all: made.append(1) or product(*all))
    for _, given in layouts(x):
        found = trained(ops.conv_train, given, conv.to(memory_format=torch.channels_last), grad, dtype)
        for name, exact in truth.items():
            error, allowed = ((one[name] - exact).norm() / exact.norm() for one in (found, expected))
            # The others are torch's, of which eager's takes another algorithm for other strides.
            assert error <= (2 if name in ("weight", "bias") else 5) * allowed + 1e-7, name
    assert len(made) == len(list(layouts(x)))


def test_a_gradient_of_weights_is_added_to_another():
    for c, k, extent in ((8, 64, 5), (8, 16, 9)):
        x, weight, grad = (
            random(2, c, extent, extent),
            random(k, c, 3, 3),
            random(2, k, extent, extent, seed=1),
        )
        total = random(k, c, 3, 3, seed=2).contiguous(memory_format=torch.channels_last)
        needed, before = (False, True, False), total.clone()
        _, expected, _ = conv_train.convolve_backward(grad, x, weight, False, needed)
        _, found, _ = conv_train.convolve_backward(grad, x, weight, False, needed, total=total)
        assert found.data_ptr() == total.data_ptr()
        torch.testing.assert_close(found, before + expected, rtol=1e-5, atol=1e-4)
