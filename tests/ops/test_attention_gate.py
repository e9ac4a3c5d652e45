from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from parity import BACKENDS, DTYPES, assert_as_exact, each_isa, layouts, needs_native, nhwc, poisoned, random

from shelfkern import native, ops
from shelfkern.ops import attention_gate_reference

SHAPES = [
    (1, 64, 8, 16, 64),
    (2, 128, 4, 4, 32),
    (3, 19, 5, 7, 3),
    (1, 1, 1, 1, 1),
    (1, 13, 1, 300, 5),
    (0, 8, 3, 3, 8),
]


def arguments(n, c, h, w, k, dtype=torch.float32):
    x = random(n, c, h, w, dtype=dtype) + 0.5
    return x, random(k, c, seed=1), random(k, seed=2), random(k, seed=3)


def check(result, *args):
    exact = attention_gate_reference(*(t.double() for t in args))
    # The sigmoid's argument has errors of a few roundings of |w| @ |mean|: a gate is below 1.
    assert_as_exact(result, exact, attention_gate_reference(*args), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, dtype, backend):
    args = arguments(*shape, dtype)
    result = ops.attention_gate(*args, backend=backend)
    assert result.dtype is torch.float32 and result.shape == (shape[0], shape[4])
    check(result, *args)


def test_large_maps_keep_their_mean():
    # A float32 running sum over a million pixels would lose three digits.
    x = torch.full((1, 3, 1024, 1024), 0.1)
    args = x, torch.eye(3), torch.full((3,), 10.0), torch.full((3,), -1.0)
    expected = torch.sigmoid(10 * x[0, 0, 0, 0].double() - 1)
    assert (ops.attention_gate(*args).double() - expected).abs().max() < 1e-6


@needs_native
@given(
    n=st.integers(0, 3), c=st.integers(1, 70), h=st.integers(1, 40), w=st.integers(1, 20),
    k=st.integers(1, 40), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_isa_and_number_of_threads(n, c, h, w, k, dtype, threads):
    x, weight, scale, shift = arguments(n, c, h, w, k, dtype)
    x = nhwc(x)

    def run(isa):
        results = []
        for count in (1, threads):
            out = poisoned((n, k), torch.float32)
            native.module.attention_gate(
                x.data_ptr(), weight.data_ptr(), scale.data_ptr(), shift.data_ptr(), out.data_ptr(),
                native.DTYPE_CODES[dtype], n, h * w, c, k, count,
            )  # fmt: skip
            results.append(out)
        assert torch.equal(*results)
        check(results[0], x, weight, scale, shift)

    each_isa(run)


@needs_native
def test_any_strides():
    x, weight, scale, shift = arguments(2, 12, 3, 5, 7)
    expected = ops.attention_gate(x, weight, scale, shift)
    for name, x_layout in layouts(x):
        result = ops.attention_gate(
            x_layout, weight.T.contiguous().T, torch.stack([scale, shift], 1)[:, 0], shift, backend="native"
        )
        assert torch.equal(result, expected), name
    halves = (t.bfloat16() for t in (weight, scale, shift))
    assert ops.attention_gate(x.bfloat16(), *halves, backend="native").isfinite().all()


def test_gradient():
    args = [t.double().requires_grad_() for t in arguments(2, 3, 2, 3, 4)]
    torch.autograd.gradcheck(ops.attention_gate, args)


@needs_native
def test_native_refuses_to_lose_a_gradient():
    for needing in range(4):
        args = [t.requires_grad_(i == needing) for i, t in enumerate(arguments(1, 3, 2, 2, 2))]
        assert ops.attention_gate(*args).requires_grad
        with pytest.raises(RuntimeError, match="grad"):
            ops.attention_gate(*args, backend="native")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(1, 3)), ValueError, "x is"),
        (dict(w=torch.zeros(4, 2)), ValueError, r"w is \(4, 2\).*needs \(K, 3\)"),
        (dict(w=torch.zeros(4, 3, device="meta")), ValueError, "w is on meta"),
        (dict(scale=torch.zeros(3)), ValueError, r"scale is \(3,\)"),
        (dict(scale=torch.zeros(4, device="meta")), ValueError, "scale is on meta"),
        (dict(shift=torch.zeros(4, 1)), ValueError, r"shift is \(4, 1\)"),
        (dict(backend="gpu"), ValueError, "backend is 'gpu'"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict(
        x=torch.zeros(1, 3, 2, 2), w=torch.zeros(4, 3), scale=torch.zeros(4), shift=torch.zeros(4)
    )
    with pytest.raises(error, match=f"^attention_gate: {message}"):
        ops.attention_gate(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (0, 3, 2, 2, 4), (1, 1, 1, 1, 1)])
def test_opcheck(shape):
    torch.library.opcheck(torch.ops.shelfkern.attention_gate.default, (*arguments(*shape), "native"))


@needs_native
def test_compile_and_export():
    args = arguments(2, 8, 3, 4, 5)
    expected = ops.attention_gate(*args)
    compiled = torch.compile(lambda *args: ops.attention_gate(*args) * 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), expected)

    class Gate(torch.nn.Module):
        def forward(self, *args):
            return ops.attention_gate(*args)

    program = torch.export.export(Gate(), args)
    assert "shelfkern.attention_gate" in str(program.graph)
    assert torch.equal(program.module()(*args), expected)
