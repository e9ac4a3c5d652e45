from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from shelfkern import native, ops, resources
from shelfkern.ops import _triton

needs_triton = pytest.mark.skipif(_triton.why_not is not None, reason=str(_triton.why_not))
CONVOLUTIONS = ("conv_kernel", "deconv_kernel")


def run(*arguments, **environment):
    """The command in a process of its own, in which kernels are compiled."""
    return subprocess.run(
        [sys.executable, "-m", "shelfkern", "resources", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def rows():
    done = run("--json")
    assert done.returncode == 0, done.stderr
    return [resources.Row(**json.loads(line)) for line in done.stdout.splitlines()]


@needs_triton
def test_every_triton_kernel_is_compiled_for_every_arch(rows):
    expected = {(case.kernel, case.variant, arch) for case in resources.cases() for arch in resources.ARCHS}
    assert {(row.kernel, row.variant, row.arch) for row in rows if row.shared is not None} == expected
    compiled = {"shared_block" if op == "conv_bn_act" else op for op in {row.op for row in rows}}
    assert compiled >= {op for op, kernels in ops.KERNELS.items() if "triton" in kernels} - {"conv_bn_act"}


@needs_triton
def test_nothing_spills_and_all_fits(rows):
    for row in rows:
        assert row.fault is None and row.local == 0, row
        assert 0 < row.registers <= 255, row
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


# Checked by the rules of the CUDA programming guide: 65536 registers, 2048 threads, 164 and 228 KB.
@pytest.mark.parametrize(
    "arch, registers, threads, shared, blocks",
    [
        (80, 32, 256, 0, 8),  # all threads
        (80, 255, 256, 0, 1),  # 256 registers a thread after rounding
        (90, 128, 256, 0, 2),
        (90, 40, 128, 0, 12),  # 40 x 32 = 1280 registers a warp, 5120 a block
        (80, 32, 128, 100 * 1024, 1),
        (90, 32, 128, 100 * 1024, 2),
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


@needs_triton
def test_one_op_of_one_arch_as_a_table():
    done = run("--op", "upsample_add", "--arch", "90", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert "upsample_add_kernel" in done.stdout and "sm_90" in done.stdout
    assert "conv_kernel" not in done.stdout and "sm_80" not in done.stdout


@needs_triton
def test_interpreted_kernels_cannot_be_compiled():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr == (
        "Error: Triton's kernels cannot be compiled here: "
        "TRITON_INTERPRET is set: kernels are interpreted, not compiled\n"
    )


def test_without_triton():
    code = "import sys; sys.modules['triton'] = None; from shelfkern.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "resources"], capture_output=True, text=True, timeout=300
    )
    assert (
        done.returncode == 1 and "Triton does not load" in done.stderr and "pip install triton" in done.stderr
    )
