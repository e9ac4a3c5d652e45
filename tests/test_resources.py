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
    assert compiled == {(case.op, case.variant, arch) for case in resources.cases() for arch in case.archs}
    assert {op for op, _, _ in compiled} == {op for op, names in ops.KERNELS.items() if "triton" in names}


@needs_triton
def test_every_configuration_is_compiled(rows):
    variants = " ".join(row.variant + ";" for row in rows if row.kernel == "conv_kernel")
    for config in conv.CONFIGS + conv.SMALL_CONFIGS:
        swap = ", swapped" if config.swap else ""
        split = f", split {config.split}" if config.split > 1 else ""
        for numbers in ("tf32", "float16", " int8", " float8_e4m3fn"):
            assert f"{numbers}, {config.block_m}x{config.block_n}{swap}{split};" in variants


@needs_triton
def test_nothing_spills_and_all_fits(rows):
    faults = {f"{row.kernel} {row.variant} sm_{row.arch}": row.fault for row in rows if row.fault}
    assert not faults
    for row in rows:
        assert row.local == 0 and 0 < row.registers <= 255, row
        assert row.shared is None or row.shared <= {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}[row.arch]
        assert row.blocks is None or row.blocks >= 1, row


@needs_triton
def test_convolutions_use_tensor_cores(rows):
    convolutions = [row for row in rows if row.kernel in CONVOLUTIONS]
    assert convolutions
    for row in convolutions:
        words = row.variant.split(", ")
        cores = {80: "mma", 89: "mma", 90: "wgmma"}[row.arch]
        cores += " s8" * ("int8" in words) + " e4m3" * ("float8_e4m3fn" in words)
        assert row.tensor_cores == ("" if "ieee" in words else cores), row


@needs_triton
def test_codes_are_multiplied_on_every_gpu_that_can(rows):
    for name, archs in (("int8", {80, 89, 90}), ("float8_e4m3fn", {89, 90})):
        words = ((row, row.variant.split(", ")) for row in rows if row.kernel == "conv_kernel")
        of_codes = [row for row, found in words if name in found]
        for op in ("conv_bn_act", "shared_block"):
            # The block's one configuration is more than sm_89 holds.
            held = archs - {89} if op == "shared_block" else archs
            assert {row.arch for row in of_codes if row.op == op} == held


@needs_triton
@pytest.mark.skipif(native.cuda is None, reason="built without CUDA")
def test_every_cuda_kernel_is_read(rows):
    found = {(row.op, row.arch) for row in rows if row.shared is None}
    with_cuda = [op for op, kernels in ops.KERNELS.items() if "cuda" in kernels]
    assert found == {(op, arch) for op in with_cuda for arch in resources.MAIN_ARCHS}
    for row in rows:
        if row.shared is None and row.op in ("stem", "shared_block"):
            assert row.tensor_cores == ("" if "float" in row.variant else "mma"), row


# By hand, from the CUDA programming guide: 65536 registers, 2048 threads, 32 blocks, 164 and 228 KB; of
# sm_89 1536 threads, 24 blocks, 100 KB.
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
        (89, 32, 256, 0, 6),
        (89, 16, 32, 0, 24),
        (89, 32, 128, 40 * 1024, 2),
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
        (torch.empty(3, dtype=torch.int8, device="meta"), ("*i8", True)),
        (torch.empty(3, dtype=torch.float8_e4m3fn, device="meta"), ("*fp8e4nv", True)),
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
    compiling(code)


@needs_triton
@pytest.mark.parametrize("op, number", [("conv_bn_act", 0), ("conv_bn_act", -1), ("deconv_add", 0)])
def test_weights_are_fetched_before_the_wait(op, number):
    compiling(f"""
from shelfkern import resources
case = [case for case in resources.cases() if case.op == {op!r}][{number}]
overlapping = resources.launches(case, 90)[0]
ptx = resources.compiled(overlapping, 90).asm["ptx"]
wait = ptx.index("griddepcontrol.wait")
assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("prefetch.global.L2") < wait
# Nothing is loaded ahead of it, and nothing fetched after it.
assert "prefetch" not in ptx[wait:] and "ld.global" not in ptx[:wait] and "cp.async" not in ptx[:wait]
alone = resources.launches(case, 80)[0]
assert "prefetch" not in resources.compiled(alone, 90).asm["ptx"]
""")


@needs_triton
def test_float8_is_rounded_once_and_summed_in_float32():
    # The same but for what is multiplied: the rest of the additions are the epilogue's.
    compiling("""
from shelfkern import resources
def ptx(words):
    case = next(case for case in resources.cases() if words in case.variant)
    return resources.compiled(resources.launches(case, 90)[0], 90).asm["ptx"]
codes, wide = ptx("3x3, float8_e4m3fn, 128x128"), ptx("3x3 to float8_e4m3fn, float16, 128x128")
assert "cvt.rn.satfinite.e4m3x2.f32" in codes and "cvt.rn.satfinite.e4m3x2.f32" in wide
# Every 128 products each of 256 threads adds its 64 short sums to its long ones.
additions = [code.count("add.f32") + code.count("add.rn.f32") for code in (codes, wide)]
assert additions[0] >= additions[1] + 64, additions
""")


def compiling(code):
    """Runs code in a process that compiles kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
