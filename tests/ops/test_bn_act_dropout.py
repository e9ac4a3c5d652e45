from __future__ import annotations

import copy
import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import (
    CUDA_DTYPES,
    DTYPES,
    INTERPRETED,
    assert_as_exact,
    each_isa,
    layouts,
    moved,
    needs_native,
    needs_triton,
    nhwc,
    poisoned,
    random,
)
from torch import nn
from torch.nn import functional as F

from shelfkern import ops
from shelfkern.ops.bn_act_dropout import (
    bn_act_dropout_backward_native,
    bn_act_dropout_backward_triton,
    bn_act_dropout_native,
    bn_act_dropout_triton,
)


@needs_triton
def of_triton():
    """Carries the marks of a test of Triton kernels."""


KERNELS = [
    pytest.param("native", marks=needs_native),
    pytest.param("triton", marks=getattr(of_triton, "pytestmark", [])),
]
NAMES = ("result", "x", "residual", "weight", "bias", "running_mean", "running_var")
# Channels that fill vectors, groups of 16, and neither; one pixel an image; one image; pieces cut short.
SHAPES = [(2, 64, 9, 8), (3, 19, 5, 7), (7, 6, 1, 1), (1, 16, 13, 11), (2, 81, 1, 3), (2, 8, 17, 16)]


def norm(channels: int, **options) -> nn.BatchNorm2d:
    """A norm in training whose parameters and statistics are anything."""
    bn = nn.BatchNorm2d(channels, **options)
    for i, tensor in enumerate((*bn.parameters(), bn.running_mean)):
        if tensor is not None:
            tensor.data.copy_(random(channels, seed=i + 5))
    return bn


def trained(x, bn, residual=None, grad=None, dtype=None, seed=3, **options):
    """Result, gradients and statistics of one call on copies, of another dtype if one is given."""
    device, wide = x.device, dtype is torch.float64
    bn = copy.deepcopy(bn).to(device, torch.float64 if wide else torch.float32)
    leaves = [
        None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, residual)
    ]
    torch.manual_seed(seed)
    result = ops.bn_act_dropout(leaves[0], bn, leaves[1], **options)
    result.backward(torch.ones_like(result) if grad is None else grad.to(result.dtype))
    found = [result, leaves[0].grad, None if residual is None else leaves[1].grad]
    found += [p if p is None else p.grad for p in (bn.weight, bn.bias)]
    return [None if t is None else t.detach().cpu() for t in (*found, bn.running_mean, bn.running_var)]


def check(x, bn, residual, grad, backend, seed=3, **options):
    """The kernel's result, gradients and statistics beside eager's."""
    found = trained(
        *moved(backend, x), bn, *moved(backend, residual, grad), backend=backend, seed=seed, **options
    )
    # Noise is drawn on the device: on another one the reference draws other noise.
    noisy = options.get("p") and backend == "triton" and not INTERPRETED
    place = (lambda t: None if t is None else t.cuda()) if noisy else (lambda t: t)
    eager, truth = (
        trained(place(x), bn, place(residual), place(grad), dtype, seed, backend="reference", **options)
        for dtype in (None, torch.float64)
    )
    count = x.numel() // x.shape[1]
    for name, a, b, exact in zip(NAMES, found, eager, truth, strict=True):
        assert (a is None) == (exact is None), name
        if a is None:
            continue
        assert a.dtype == b.dtype, name
        # Where eager is exact by luck: one rounding of the largest value; and of the gradients of so few
        # channels, sums of float32 that round at random, those of a sum.
        floor = torch.finfo(a.dtype).eps * float(exact.abs().max())
        if name in ("weight", "bias"):
            floor = max(floor, torch.finfo(torch.float32).eps * 4 * float(grad.abs().max()) * count**0.5)
        try:
            assert_as_exact(a, exact, b, floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slope, with_residual, p", [(0.0, True, 0.0), (0.01, False, 0.3), (None, True, 0.5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_composition(shape, slope, with_residual, p, dtype, backend):
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    residual = random(*shape, dtype=dtype, seed=2) if with_residual else None
    check(x, norm(shape[1]), residual, grad, backend, slope=slope, p=p)


@needs_triton
def test_float16_on_a_gpu():
    x, residual, grad = (random(2, 24, 6, 5, dtype=torch.float16, seed=i) for i in range(3))
    check(x, norm(24), residual, grad, "triton", slope=0.01, p=0.2)


@pytest.mark.parametrize("backend", KERNELS)
def test_many_pieces(backend, monkeypatch):
    monkeypatch.setattr(importlib.import_module("shelfkern.ops.bn_act_dropout"), "TRITON_PIECES", 3)
    shape = (2, 16, 150, 100) if backend == "native" else (2, 64, 20, 15)
    x, grad = random(*shape), random(*shape, seed=1)
    check(x, norm(shape[1]), None, grad, backend, slope=0.01)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_far_from_zero(backend):
    shape = (2, 16, 12, 12)
    x, grad = random(*shape) + 100, random(*shape, seed=1)
    check(x, norm(16), None, grad, backend)


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=None),
        dict(momentum=0.0),
        dict(momentum=1.0),
        dict(eps=0.5),
        dict(affine=False),
        dict(track_running_stats=False),
    ],
    ids=str,
)
def test_statistics_move_as_those_of_the_norm(options, backend):
    ours = nn.BatchNorm2d(5, **options)
    eager = copy.deepcopy(ours)
    ours = ours.to(moved(backend, torch.empty(0))[0].device)
    for step in range(3):
        x = random(2, 5, 3, 4, seed=step) * 3 + 1
        result = ops.bn_act_dropout(*moved(backend, x), ours, slope=None, backend=backend)
        torch.testing.assert_close(result.cpu(), eager(x))
    state = ours.state_dict()
    assert state.keys() == eager.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(state[name].cpu(), value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_one_seed_drops_the_channels_that_torch_drops(p, dtype, backend):
    x, bn = random(6, 33, 4, 3, dtype=dtype), norm(33)
    x = moved(backend, x)[0]
    bn = bn.to(x.device)
    torch.manual_seed(11)
    ours = ops.bn_act_dropout(x, bn, slope=None, p=p, backend=backend)
    after = torch.rand(1, device=x.device)
    torch.manual_seed(11)
    eager = F.dropout2d(bn(x), p)
    assert torch.equal(ours == 0, eager == 0) and (p in (0, 1) or 0 < (eager == 0).float().mean() < 1)
    assert torch.equal(torch.rand(1, device=x.device), after)


@pytest.mark.parametrize("backend", KERNELS)
def test_any_strides(backend):
    x, residual, grad = (random(2, 20, 6, 7, seed=i) for i in range(3))
    bn = norm(20)
    expected = trained(*moved(backend, x), bn, *moved(backend, residual, grad), backend=backend, p=0.3)
    for (name, a), (_, b), (_, g) in zip(*map(layouts, (x, residual, grad)), strict=True):
        a, b, g = moved(backend, a, b, g)
        found = trained(a, bn, b, g, backend=backend, p=0.3)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), name
        assert found[0].permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
def test_an_expanded_gradient(backend):
    x = moved(backend, random(2, 20, 6, 7))[0].requires_grad_()
    bn = norm(20).to(x.device)
    ops.bn_act_dropout(x, bn, backend=backend).sum().backward()
    found, x.grad = x.grad, None
    ops.bn_act_dropout(x, bn, backend=backend).backward(torch.ones(x.shape, device=x.device))
    assert torch.equal(found, x.grad)


@needs_native
def test_threads_change_no_bit():
    x, residual, grad = (random(3, 70, 31, 29, seed=i) for i in range(3))
    runs = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        runs.append(trained(x, norm(70), residual, grad, backend="native", slope=0.01, p=0.2))
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def run_kernels(forward, backward, x, bn, residual, noise, grad, slope):
    """Raw kernels into poisoned memory: all that they write."""
    n, c, h, w = x.shape
    shape, vector = tuple(x.shape), (c,)
    out, grad_x, grad_residual = (nhwc(poisoned(shape, x.dtype)) for _ in range(3))
    mean, var, grad_weight, grad_bias = (poisoned(vector, torch.float32) for _ in range(4))
    mask = None if slope is None else torch.full((n, h, w, (c + 7) // 8), 255, dtype=torch.uint8)
    tensors = (out, mean, var, mask)
    forward(x, bn.weight, bn.bias, residual, noise, bn.eps, slope, *tensors)
    gradients = (grad_x, None if residual is None else grad_residual, grad_weight, grad_bias)
    backward(grad, x, bn.weight, mean, var, noise, mask, bn.eps, slope, *gradients)
    return [t for t in (*tensors[:3], *gradients) if t is not None], mask


sizes = dict(
    n=st.integers(1, 3), c=st.integers(1, 83), h=st.integers(1, 12), w=st.integers(1, 12),
    slope=st.sampled_from([0.0, 0.1, None]), with_residual=st.booleans(), with_noise=st.booleans(),
)  # fmt: skip


def check_drawn(forward, backward, n, c, h, w, slope, with_residual, with_noise, dtype):
    x, residual, grad = (nhwc(random(n, c, h, w, dtype=dtype, seed=i)) for i in range(3))
    bn = norm(c).requires_grad_(False)
    noise = random(n, c, seed=7).abs() if with_noise else None
    found, mask = run_kernels(
        forward, backward, x, bn, residual if with_residual else None, noise, grad, slope
    )
    assert not any(t.isnan().any() for t in found)
    z = (x.double() - found[1].double()[:, None, None]) / (found[2].double() + bn.eps).sqrt()[:, None, None]
    z = z * bn.weight.double()[:, None, None] + bn.bias.double()[:, None, None]
    z = z + residual.double() if with_residual else z
    y = z if slope is None else F.leaky_relu(z, slope)
    y = y if noise is None else y * noise.double()[:, :, None, None]
    torch.testing.assert_close(found[0], y.to(dtype), rtol=1e-4 + 2 * torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(found[1].double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[2].double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6
    )
    if mask is None:
        return
    bits = mask[..., None] >> torch.arange(8) & 1
    positive = bits.flatten(3)[..., :c].permute(0, 3, 1, 2) == 1
    assert torch.equal(positive | (z.abs() < 1e-5), (z > 0) | (z.abs() < 1e-5))
    assert not bits.flatten(3)[..., c:].any()


@needs_native
@given(**sizes, dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_every_isa_writes_all_of_the_outputs(**drawn):
    each_isa(lambda isa: check_drawn(bn_act_dropout_native, bn_act_dropout_backward_native, **drawn))


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="the check is on the CPU")
@given(**sizes, dtype=st.sampled_from(CUDA_DTYPES))
@settings(max_examples=15, deadline=None)
def test_triton_writes_all_of_the_outputs(**drawn):
    check_drawn(bn_act_dropout_triton, bn_act_dropout_backward_triton, **drawn)


def test_gradient():
    x, residual = (random(2, 3, 3, 2, seed=i).double().requires_grad_() for i in range(2))
    bn = norm(3).double()

    def call(x, residual, weight, bias):
        torch.manual_seed(1)
        twin = copy.deepcopy(bn)
        del twin.weight, twin.bias
        twin.weight, twin.bias = weight, bias
        return ops.bn_act_dropout(x, twin, residual, slope=0.1, p=0.3)

    torch.autograd.gradcheck(call, (x, residual, bn.weight, bn.bias))


@needs_native
def test_what_is_kept_for_the_gradient():
    x = nhwc(random(2, 32, 16, 16)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bn_act_dropout(x, norm(32), torch.ones_like(x), p=0.5, backend="native")
    beyond_x = sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr())
    # A bit an element; weight, mean and variance; and the noise.
    assert beyond_x == x.numel() // 8 + 3 * 32 * 4 + 2 * 32 * 4


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("needed", ["x", "residual", "parameters"])
def test_frozen_inputs(needed, backend):
    x, residual = moved(backend, *(random(2, 4, 3, 3, seed=i) for i in range(2)))
    bn = norm(4).to(x.device).requires_grad_(needed == "parameters")
    x.requires_grad_(needed == "x")
    residual.requires_grad_(needed == "residual")
    result = ops.bn_act_dropout(x, bn, residual, backend=backend)
    (eager,) = torch.autograd.grad(
        result.square().sum(), bn.weight if needed == "parameters" else x if needed == "x" else residual
    )
    assert eager.isfinite().all() and eager.any()
    with torch.no_grad():
        assert not ops.bn_act_dropout(x, bn, residual, backend=backend).requires_grad


def test_other_norms_are_called():
    x = random(2, 4, 3, 3)
    frozen = norm(4).eval()
    for bn in (
        frozen,
        nn.SyncBatchNorm(4).eval(),
        nn.GroupNorm(2, 4),
        norm(4).double().float().bfloat16().float(),
    ):
        expected = torch.relu(bn(x))
        torch.testing.assert_close(ops.bn_act_dropout(x, bn), expected)
    with pytest.raises(RuntimeError, match="bn is in eval mode"):
        ops.bn_act_dropout(x, frozen, backend="native")
    with pytest.raises(RuntimeError, match="bn is GroupNorm"):
        ops.bn_act_dropout(x, nn.GroupNorm(2, 4), backend="native")
    with pytest.raises(RuntimeError, match=r"bn.weight is torch.float64"):
        ops.bn_act_dropout(x, norm(4).double(), backend="native")
    assert ops.bn_act_dropout(x[:0], norm(4)).shape == (0, 4, 3, 3)


def without_variance(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels)
    bn.running_var = None
    return bn


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, 4)), ValueError, "x is"),
        (dict(x=torch.zeros(2, 3, 4, 4, dtype=torch.int64)), TypeError, "x is torch.int64"),
        (dict(residual=torch.zeros(2, 3, 4, 1)), ValueError, "residual is"),
        (dict(residual=torch.zeros(2, 3, 4, 4).bfloat16()), TypeError, "residual is torch.bfloat16"),
        (dict(slope=2), ValueError, "slope is 2"),
        (dict(p=1.5), ValueError, "p is 1.5"),
        (dict(p="x"), TypeError, "p is 'x', it must be a number"),
        (dict(bn=nn.BatchNorm2d(4)), ValueError, "bn has 4 channels"),
        (dict(bn=None), TypeError, "bn is NoneType, it must be a torch"),
        (dict(bn=without_variance(3)), ValueError, "bn has one of running_mean and running_var"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
@needs_native
def test_refusals(change, error, message):
    arguments = dict(x=torch.zeros(2, 3, 4, 4), bn=nn.BatchNorm2d(3), backend="native")
    with pytest.raises(error, match=f"^bn_act_dropout: {message}"):
        ops.bn_act_dropout(**{**arguments, **change})


@needs_native
def test_one_value_per_channel_is_refused_as_torch_refuses_it():
    for backend in ("native", "reference"):
        bn = nn.BatchNorm2d(3)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            ops.bn_act_dropout(torch.zeros(1, 3, 1, 1), bn, backend=backend)
        assert not bn.running_mean.any()


@needs_native
def test_autocast_keeps_the_dtype_of_x():
    x, bn = random(2, 8, 4, 4, dtype=torch.bfloat16).requires_grad_(), norm(8)
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.bn_act_dropout(x, bn, random(2, 8, 4, 4, seed=1), slope=0.01, backend="native")
    assert result.dtype is torch.bfloat16
    result.sum().backward()
    assert x.grad.dtype is torch.bfloat16 and bn.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("slope, full", [(0.1, True), (None, False)])
def test_opcheck(slope, full, backend):
    x, residual = moved(backend, *(random(2, 9, 3, 4, seed=i).requires_grad_() for i in range(2)))
    weight, bias = (random(9, seed=i).to(x.device).requires_grad_() for i in range(2))
    noise = torch.ones(2, 9, device=x.device)
    optional = (weight, bias, residual, noise) if full else (None,) * 4
    torch.library.opcheck(
        torch.ops.shelfkern.bn_act_dropout.default, (x, *optional, 1e-5, slope, backend), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", KERNELS)
def test_compile(backend):
    torch.compiler.reset()
    x, residual = moved(backend, *(random(2, 8, 4, 4, seed=i).requires_grad_() for i in range(2)))
    eager = norm(8).to(x.device)
    bn = copy.deepcopy(eager)

    def call(x, residual, bn):
        return ops.bn_act_dropout(x, bn, residual, slope=0.01, p=0.3, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(2)
        expected = torch.autograd.grad(call(x, residual, eager).square().sum(), [x, residual, eager.weight])
        torch.manual_seed(2)
        found = torch.autograd.grad(compiled(x, residual, bn).square().sum(), [x, residual, bn.weight])
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, bn.state_dict().values(), eager.state_dict().values()))
    assert bn.num_batches_tracked == 2
