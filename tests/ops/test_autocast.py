from __future__ import annotations

import pytest
import torch
from parity import needs_native

from shelfkern import ops
from shelfkern.ops import selftest

# Convolutions, and the sum that ends in one, take autocast's dtype; the others compute in float32 anyway.
CAST = ("conv_bn_act", "deconv_add", "shared_block", "stem", "upsample_add")


def call(op, **options):
    public, _, tensors, arguments = selftest._cases()[op]
    narrow = [t.float() if t.is_floating_point() else t for t in tensors]
    return public(*narrow, **arguments, **options)


@needs_native
@pytest.mark.parametrize("op", ops.NAMES)
def test_autocast_gives_convolutions_its_dtype(op):
    full = call(op)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in {"auto", "native", "reference"} & {"auto", "reference", *ops.KERNELS[op]}:
            result = call(op, backend=backend)
            assert result.dtype is (torch.bfloat16 if op in CAST else full.dtype), backend
            assert (result.double() - full.double()).abs().max() <= 0.05 * full.double().abs().max()
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(call(op), full)


@needs_native
@pytest.mark.parametrize("op", ops.NAMES)
def test_compiled_under_autocast(op):
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        public, _, tensors, arguments = selftest._cases()[op]
        narrow = [t.float() if t.is_floating_point() else t for t in tensors]
        compiled = torch.compile(
            lambda *args: public(*args, **arguments) * 1, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(*narrow), public(*narrow, **arguments))


def test_float64_is_left_alone():
    x = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv_bn_act(x, torch.zeros(2, 2, 1, 1)).dtype is torch.float64


def test_activations_of_two_dtypes_become_one():
    x, skip = torch.ones(1, 2, 2, 2, dtype=torch.bfloat16), torch.ones(1, 2, 4, 4)
    with pytest.raises(TypeError, match=r"skip is torch\.float32"):
        ops.upsample_add(x, skip)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.upsample_add(x, skip).dtype is torch.bfloat16
