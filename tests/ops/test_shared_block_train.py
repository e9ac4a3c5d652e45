from __future__ import annotations

import copy

import pytest
import torch
from parity import DTYPES, assert_as_exact, layouts, moved, needs_native, needs_triton, nhwc, random
from torch import nn

from shelfkern import ops


@needs_triton
def of_triton():
    """Carries the marks of a test of Triton kernels."""


KERNELS = [
    pytest.param("native", marks=needs_native),
    pytest.param("triton", marks=getattr(of_triton, "pytestmark", [])),
]


class Block(nn.Module):
    """A convolution and two norms with any parameters and statistics."""

    def __init__(self, channels: int, bias: bool = True, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels, **options), nn.BatchNorm2d(channels, **options)
        for i, tensor in enumerate(self.parameters()):
            if tensor.ndim == 1:
                tensor.data.copy_(random(channels, seed=i))

    def forward(self, x, **options):
        return ops.shared_block_train(x, self.conv, self.bn1, self.bn2, **options)


def trained(block, x, grad, dtype=None, seed=3, **options):
    """Result, gradients and state of one call of a copy, of another dtype if one is given."""
    block = copy.deepcopy(block).to(x.device, torch.float64 if dtype is torch.float64 else torch.float32)
    x = x.detach().clone().to(dtype or x.dtype).requires_grad_()
    torch.manual_seed(seed)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype is torch.bfloat16):
        result = block(x, **options)
    result.backward(grad.to(result.dtype))
    found = {"result": result, "x": x.grad}
    found |= {name: p.grad for name, p in block.named_parameters()}
    found |= {name: value for name, value in block.named_buffers() if value.is_floating_point()}
    return {name: value.detach().cpu() for name, value in found.items()}


def check(block, x, grad, backend, **options):
    found = trained(block, *moved(backend, x, grad), backend=backend, **options)
    eager = trained(block, x, grad, backend="reference", **options)
    truth = trained(block, x, grad, torch.float64, backend="reference", **options)
    assert found.keys() == eager.keys()
    for name, exact in truth.items():
        assert found[name].dtype == eager[name].dtype, name
        # One rounding of the largest value; of a parameter's gradient, for few channels a lottery, those of a
        # sum; and of the convolution's bias, which the norms cancel, those of what sums up to nothing.
        count, largest = x.numel() // x.shape[1], float(exact.abs().max())
        if name.endswith(("weight", "bias")):
            terms = count if name == "conv.bias" else count**0.5
            largest = max(largest, 4 * terms * float(grad.abs().max()))
        floor = torch.finfo(x.dtype if name == "conv.bias" else found[name].dtype).eps * largest
        try:
            assert_as_exact(found[name], exact, eager[name], floor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# In bfloat16 some arguments of relu change their sign, in eager others: enough elements that these are many.
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "shape, slope, dtype",
    [
        ((2, 16, 9, 8), 0.01, torch.float32),
        ((3, 7, 5, 6), 0.0, torch.float32),
        ((4, 3, 1, 1), None, torch.float32),
        ((2, 16, 25, 24), 0.01, torch.bfloat16),
        ((3, 7, 31, 30), 0.0, torch.bfloat16),
    ],
    ids=str,
)
def test_is_the_composition(shape, slope, skip, dtype, backend):
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    check(Block(shape[1]), x, grad, backend, slope=slope, skip=skip)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_dropout(dtype):
    x, grad = random(4, 24, 15, 16, dtype=dtype), random(4, 24, 15, 16, dtype=dtype, seed=1)
    check(Block(24), x, grad, "native", slope=0.01, p=0.25)
    check(Block(24, bias=False), x, grad, "native", p=0.5, skip=True)
    check(Block(24, momentum=None, affine=False), x, grad, "native", p=0.5)


@needs_native
def test_one_seed_drops_the_channels_that_torch_drops():
    block, x = Block(24), random(8, 24, 5, 5)
    runs = [trained(block, x, x, backend=backend, p=0.5) for backend in ("native", "reference")]
    # Other channels dropped would be errors of the size of the values.
    torch.testing.assert_close(runs[0]["result"], runs[1]["result"], rtol=1e-4, atol=1e-4)
    other = trained(block, x, x, seed=4, backend="native", p=0.5)
    assert (runs[0]["result"] - other["result"]).abs().max() > 0.1


@needs_native
def test_what_is_kept_for_the_gradient():
    """x, two results of convolutions and two bits an element; eager keeps three more tensors."""
    shape = (2, 32, 16, 16)
    x, block = nhwc(random(*shape)).requires_grad_(), Block(32)
    block.conv.to(memory_format=torch.channels_last)
    parameters = {p.data_ptr() for p in block.parameters()}
    kept = {}
    for backend in ("native", "reference"):
        saved = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        )
        with hooks:
            block(x, p=0.5, backend=backend)
        kept[backend] = sum(t.nbytes for at, t in saved.items() if at not in parameters) / x.numel()
    small = 4 * (4 * 32 + 2 * 32) / x.numel()  # means, variances and noise
    assert kept["native"] == pytest.approx(3 * 4 + 2 / 8 + small)
    assert kept["reference"] >= 6 * 4


@needs_native
def test_any_strides():
    block, x, grad = Block(20), random(2, 20, 6, 7), random(2, 20, 6, 7, seed=1)
    expected = trained(block, x, grad, backend="native", p=0.3, skip=True)
    for (name, a), (_, g) in zip(layouts(x), layouts(grad), strict=True):
        found = trained(block, a, g, backend="native", p=0.3, skip=True)
        for key in expected:
            assert torch.equal(found[key], expected[key]), (name, key)
    x.requires_grad_()
    block(x, backend="native").sum().backward()
    assert x.grad.isfinite().all()


@needs_native
@pytest.mark.parametrize("frozen", ["x", "conv.weight", "conv.bias", "bn1.weight", "bn2"])
def test_frozen_inputs(frozen):
    block, x = Block(8), random(2, 8, 5, 5).requires_grad_(frozen != "x")
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    leaves = [t for t in (x, *block.parameters()) if t.requires_grad]
    runs = []
    for backend in ("native", "reference"):
        twin = copy.deepcopy(block)
        leaves = [t for t in (x, *twin.parameters()) if t.requires_grad]
        runs.append(torch.autograd.grad(twin(x, backend=backend).square().sum(), leaves))
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert not block(x, backend="native").requires_grad


def test_gradient():
    block = Block(2).double()
    x = random(2, 2, 3, 3).double().requires_grad_()

    def call(x, *parameters):
        torch.manual_seed(1)
        named = dict(zip(dict(block.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(block, named, (x,), dict(slope=0.1, p=0.3, skip=True))

    torch.autograd.gradcheck(call, (x, *block.parameters()))


def test_other_convolutions_and_norms_are_called():
    x, block = random(2, 4, 5, 5), Block(4)
    block.bn2.eval()
    expected = torch.relu(block.bn2(block.conv(torch.relu(copy.deepcopy(block).bn1(block.conv(x))))) + x)
    torch.testing.assert_close(block(x), expected)
    block.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    assert block(x).shape == x.shape
    for change, message in (
        (dict(bn2=block.bn2), "bn2 is in eval mode"),
        (dict(bn1=nn.SyncBatchNorm(4)), "bn1 is SyncBatchNorm"),
        (dict(conv=block.conv), "padding_mode=reflect"),
        (dict(conv=nn.Identity()), "conv is Identity"),
    ):
        arguments = dict(conv=nn.Conv2d(4, 4, 3, padding=1), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4))
        with pytest.raises(RuntimeError, match=message):
            ops.shared_block_train(x, **{**arguments, **change}, backend="native")


@needs_native
@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, 4)), ValueError, "x is"),
        (dict(conv=nn.Conv2d(3, 4, 3, padding=1)), ValueError, "conv.weight is"),
        (dict(bn1=nn.BatchNorm2d(4)), ValueError, "bn1 has 4 channels"),
        (dict(bn2=nn.BatchNorm2d(4)), ValueError, "bn2 has 4 channels"),
        (dict(bn2=None), TypeError, "bn2 is NoneType, it must be a torch"),
        (dict(conv=None), TypeError, "conv is NoneType, it must be a torch"),
        (
            dict(x=torch.zeros(2, 3, 4, 4).bfloat16()),
            TypeError,
            "conv.weight is torch.float32, x is torch.bfl",
        ),
        (dict(slope=-1), ValueError, "slope is -1"),
        (dict(p=-0.5), ValueError, "p is -0.5"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(
        x=torch.zeros(2, 3, 4, 4), conv=nn.Conv2d(3, 3, 3, padding=1), bn1=nn.BatchNorm2d(3),
        bn2=nn.BatchNorm2d(3), backend="native",
    )  # fmt: skip
    with pytest.raises(error, match=f"^shared_block_train: {message}"):
        ops.shared_block_train(**{**arguments, **change})


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full, backend):
    x = moved(backend, random(2, 6, 3, 4))[0].requires_grad_()
    block = Block(6, affine=full, bias=full).to(x.device)
    norms = (block.bn1.weight, block.bn1.bias, block.bn2.weight, block.bn2.bias)
    noise = torch.ones(2, 6, device=x.device) if full else None
    arguments = (x, block.conv.weight, block.conv.bias, *norms, noise, 1e-5, 1e-5, 0.1, full, backend)
    torch.library.opcheck(torch.ops.shelfkern.shared_block_train.default, arguments, rtol=1e-3, atol=1e-4)


@needs_native
def test_compile():
    torch.compiler.reset()
    x, eager = random(2, 8, 4, 4).requires_grad_(), Block(8)
    block = copy.deepcopy(eager)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        runs = []
        for module, twin in ((eager, eager), (compiled, block)):
            torch.manual_seed(2)
            loss = module(x, slope=0.01, p=0.3, backend="native").square().sum()
            runs.append(torch.autograd.grad(loss, [x, *twin.parameters()]))
        assert all(map(torch.equal, *runs))
    assert all(map(torch.equal, block.state_dict().values(), eager.state_dict().values()))
