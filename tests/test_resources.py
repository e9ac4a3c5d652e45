from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from shelfkern import native, ops, resources
from shelfkern.ops import _conv_triton as conv

needs_triton = pytest.mark.skipif(resources.reason() is not None, reason=str(resources.reason()))
CONVOLUTIONS = ("conv_kernel", "deconv_kernel")


@pytest.fixture(scope="module")
def rows():
    # A process of its own: in this one kernels may be interpreted.
    command = [sys.executable, "-m", "shelfkern", "resources", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.stdout, done.stderr
    return [resources.Row(**json.loads(line)) for line in done.stdout.splitlines()]


@needs_triton
def test_every_triton_kernel_is_compiled_for_every_arch(rows):
    compiled = {(row.op, row.variant, row.arch) for row in rows if row.shared is not None}
    assert compiled == {
        (case.op, case.variant, arch) for case in resources.cases() for arch in resources.ARCHS
    }
    assert {op for op, _, _ in compiled} == {op for op, names in ops.KERNELS.items() if "triton" in names}


@needs_triton
def test_every_configuration_is_compiled(rows):
    variants = " ".join(row.variant + ";" for row in rows if row.kernel == "conv_kernel")
    for config in conv.CONFIGS + conv.SMALL_CONFIGS:
        swap = ", swapped" if config.swap else ""
        split = f", split {config.split}" if config.split > 1 else ""
        for numbers in ("tf32", "float16"):
            assert f"{numbers}, {config.block_m}x{config.block_n}{swap}{split};" in variants


@needs_triton
def test_nothing_spills_and_all_fits(rows):
    faults = {f"{row.kernel} {row.variant} sm_{row.arch}": row.fault for row in rows if row.fault}
    assert not faults
    for row in rows:
        assert row.local == 0 and 0 < row.registers <= 255, row
        assert row.shared is None or row.shared <= {80: 163 * 1024, 90: 227 * 1024}[row.arch], row
        assert row.blocks is None or row.blocks >= 1, row


@needs_triton
def test_convolutions_use_tensor_cores(rows):
    convolutions = [row for row in rows if row.kernel in CONVOLUTIONS]
    assert convolutions
    for row in convolutions:
        exact = "ieee" in row.variant
        assert row.tensor_cores == ("" if exact else {80: "mma", 90: "wgmma"}[row.arch]), row


@needs_triton
@pytest.mark.skipif(native.cuda is None, reason="built without CUDA")
def test_every_cuda_kernel_is_read(rows):
    found = {(row.op, row.arch) for row in rows if row.shared is None}
    with_cuda = [op for op, kernels in ops.KERNELS.items() if "cuda" in kernels]
    assert found == {(op, arch) for op in with_cuda for arch in resources.ARCHS}
    for row in rows:
        if row.shared is None and row.op in ("stem", "shared_block"):
            assert row.tensor_cores == ("" if "float" in row.variant else "mma"), row


# By hand, from the CUDA programming guide: 65536 registers, 2048 threads, 32 blocks, 164 and 228 KB.
@pytest.mark.parametrize(
    "arch, registers, threads, shared, blocks",
    [
        (80, 32, 256, 0, 8),  # all threads
        (80, 255, 256, 0, 1),  # 256 registers a thread after rounding
        (90, 128, 256, 0, 2),
        (90, 40, 128, 0, 12),  # 40 x 32 = 1280 registers a warp, 5120 a block
        (80, 32, 128, 100 * 1024, 1),
        (90, 32, 128, 100 * 1024, 2),
        (80, 16, 32, 0, 32),  # no more than 32 blocks
        (80, 32, 128, 40 * 1024, 4),  # 40 KB and the 1 KB that CUDA takes
    ],
)
def test_occupancy(arch, registers, threads, shared, blocks):
    assert resources.occupancy(arch, registers, threads, shared) == blocks


def test_a_kernel_that_spills_or_does_not_fit_is_a_fault():
    row = resources.Row("op", "kernel", "", 80, 255, 8, 0, 1, "")
    assert row.fault == "8 bytes of a thread's registers are in memory"
    row = resources.Row("op", "kernel", "", 80, 255, 0, 200_000, 0, "")
    assert row.fault == "a block takes 200000 bytes of shared memory"
    assert resources.Row("op", "kernel", "", 90, 255, 0, 200_000, 1, "").fault is None


# As Triton's own launcher does: ones are constants, multiples of 16 are known to be, large integers are i64.
@pytest.mark.parametrize(
    "value, expected",
    [
        (None, ("constexpr", False)),
        (1, ("constexpr", False)),
        (17, ("i32", False)),
        (32, ("i32", True)),
        (2**31 - 1, ("i32", False)),
        (2**31, ("i64", True)),
        (1.0, ("fp32", False)),
        (torch.empty(3, dtype=torch.bfloat16, device="meta"), ("*bf16", True)),
    ],
)
def test_what_an_argument_is_compiled_for(value, expected):
    assert resources._specialised(value) == expected


# In a process that compiles: what launches overlap, and how many there are.
@needs_triton
@pytest.mark.parametrize("arch, overlap", [(80, False), (90, True)])
def test_launches_are_as_on_the_gpu(arch, overlap):
    code = f"""
from shelfkern import resources
split = next(case for case in resources.cases() if case.op == "conv_bn_act" and "split 2" in case.variant)
first, second = resources.launches(split, {arch})
assert (first.kernel.__name__, second.kernel.__name__) == ("conv_kernel", "sum_kernel")
for launch in (first, second):
    assert launch.arguments["OVERLAP"] is {overlap}
    assert launch.options.get("launch_pdl", False) is {overlap}
    assert set(launch.arguments) == set(launch.kernel.arg_names)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
