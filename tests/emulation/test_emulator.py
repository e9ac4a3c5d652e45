"""The emulator of CUDA blocks: right kernels give right numbers, planted bugs are reported, at any seed."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TOYS = Path(__file__).with_name("toys.cu")
SEEDS = range(8)
CXX = next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)
BUGS = re.search(r"enum class Bug \{(.*?)\}", TOYS.read_text(), re.S)[1].replace(",", "").split()

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    library = tmp_path_factory.mktemp("toys") / "toys.so"
    sources = ["-x", "c++", str(TOYS), str(ROOT / "csrc/emulation/emulator.cpp")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([CXX, *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.set_seed.argtypes = [ctypes.c_uint64]
    for name in ("matmul", "stencil", "fragments", "product", "shape"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def check(message):
    if message is not None:
        raise RuntimeError(message.decode())


def bfloat16(values):
    """Bits of float32 values cut to bfloat16, and what they stand for."""
    bits = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
    return (bits >> 16).astype(np.uint16), bits.view(np.float32)


def matmul(toys, bug="none", m=40, n=48, k=72):
    """The largest error of a product with each number drawn from a few exact ones."""
    draw = np.random.default_rng(0)
    a_bits, a = bfloat16(draw.integers(-8, 9, (m, k)))
    b_bits, b = bfloat16(draw.integers(-8, 9, (k, n)))
    c = np.full((m, n), np.nan, np.float32)
    check(toys.matmul(BUGS.index(bug), address(a_bits), address(b_bits), address(c), m, n, k))
    return np.abs(c - a.astype(np.float64) @ b).max()


def stencil(toys, bug="none", count=300):
    x = np.random.default_rng(0).integers(-99, 99, count).astype(np.float32)
    # Room after the end, so that a report comes before a crash.
    out, sums = np.full(count + 128, np.nan, np.float32), np.full((count + 127) // 128, np.nan, np.float32)
    check(toys.stencil(BUGS.index(bug), address(x), address(out), address(sums), count))
    expected = np.convolve(x, [1, 1, 1])[1:-1]
    assert np.isnan(out[count:]).all()
    np.testing.assert_array_equal(out[:count], expected)
    np.testing.assert_array_equal(sums, [expected[i : i + 128].sum() for i in range(0, count, 128)])


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_give_right_numbers(toys, seed):
    toys.set_seed(seed)
    assert matmul(toys) == 0
    assert matmul(toys, m=1, n=8, k=8) == 0
    stencil(toys)
    stencil(toys, count=1)


@pytest.mark.parametrize(
    "bug, message",
    [
        ("no_barrier_after_copy", r"reads shared byte \d+(, which thread \d+ wrote| while an| before any)"),
        ("no_barrier_before_reuse", r"writes shared byte \d+, which thread \d+ read .*no barrier between"),
        ("no_wait", r"reads shared byte \d+ while an asynchronous copy of thread \d+ may be writing it"),
        ("waits_for_too_few", r"reads shared byte \d+ while an asynchronous copy of thread \d+"),
        ("never_waited_for", r"ends with an asynchronous copy to shared byte \d+ that it never waited for"),
        ("reads_too_early", r"accesses global memory before wait_for_previous\(\)"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_reports_of_matmul(toys, bug, message, seed):
    toys.set_seed(seed)
    with pytest.raises(RuntimeError, match=rf"^matmul: block \(\d, \d, 0\), thread \d+.* {message}"):
        matmul(toys, bug)
    assert matmul(toys) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_fragment_gives_wrong_numbers(toys, seed):
    toys.set_seed(seed)
    assert matmul(toys, "wrong_fragment") > 1


@pytest.mark.parametrize(
    "bug, message",
    [
        ("no_barrier", r"(reads|writes) shared byte \d+(, which thread| before anything)"),
        ("short_halo", r"reads shared byte 516 before anything was written there"),
        ("uninitialised", r"reads shared byte 20 before anything was written there"),
        ("reads_past_the_end", r"accesses global memory at element 3\d\d, it has 300"),
        ("writes_past_the_end", r"accesses global memory at element 3\d\d, it has 300"),
        ("overlapping_blocks", r"writes global memory that thread \d+ of block \(\d, 0, 0\) wrote"),
        ("reads_a_neighbours_output", r"(reads|writes) global memory that thread \d+ of .* (wrote|read)"),
        ("divergent_barrier", r"(waits at a barrier, but thread \d+ waits at another|reads shared byte)"),
        ("early_exit", r"waits at barrier with 127 of the 128 threads of the block, but thread 77 has ended"),
        ("barrier_in_both_branches", r"waits at a barrier, but thread \d+ waits at another"),
        ("divergent_shuffle", r"(is at|waits at) shuffle"),
        ("no_warp_barrier", r"(reads|writes) shared byte \d+(, which thread| before anything)"),
        ("reads_too_early", r"accesses global memory before wait_for_previous\(\)"),
        ("misaligned_pack", r"accesses 16 bytes of shared memory at element 1, whose address is no multiple"),
        ("window_too_large", r"takes bytes 0 to 800 of shared memory, it has 536"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_reports_of_stencil(toys, bug, message, seed):
    toys.set_seed(seed)
    with pytest.raises(RuntimeError, match=rf"^stencil: block \(\d, 0, 0\), thread \d+.* {message}"):
        stencil(toys, bug)
    stencil(toys)


def test_every_bug_is_tested():
    text = Path(__file__).read_text()
    assert all(f'"{bug}"' in text for bug in BUGS[:-1]) and BUGS[-1] == "count"


def matrix_registers(matrices, trans):
    """ldmatrix by the PTX documentation: thread i holds elements 2i and 2i + 1 of each matrix, by rows."""
    registers = np.zeros((32, len(matrices)), np.uint32)
    for column, matrix in enumerate(matrices):
        pairs = (matrix.T if trans else matrix).reshape(32, 2).astype(np.uint32)
        registers[:, column] = pairs[:, 0] | pairs[:, 1] << 16
    return registers


@pytest.mark.parametrize("pitch", [8, 16, 40, 64])
def test_ldmatrix_lanes(toys, pitch):
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    found = np.zeros((32, 12), np.uint32)
    check(toys.fragments(address(rows), address(found), pitch))
    matrices = rows.reshape(4, 8, 8)
    parts = [(matrices, False), (matrices, True), (matrices[:2], False), (matrices[:2], True)]
    np.testing.assert_array_equal(found, np.hstack([matrix_registers(*part) for part in parts]))


# Rows and columns by the PTX documentation of mma.m16n8k16: group = lane / 4, member = lane % 4.
LANE, GROUP, MEMBER = np.arange(32), np.arange(32) // 4, np.arange(32) % 4


def a_place(i):
    return GROUP + (0 if i < 2 or 4 <= i < 6 else 8), MEMBER * 2 + i % 2 + (8 if i >= 4 else 0)


def b_place(i):
    return MEMBER * 2 + i % 2 + (8 if i >= 2 else 0), GROUP


def c_place(i):
    return GROUP + (8 if i >= 2 else 0), MEMBER * 2 + i % 2


@pytest.mark.parametrize("f16", [False, True])
def test_mma_lanes(toys, f16):
    draw = np.random.default_rng(0)
    a, b = draw.integers(-8, 9, (16, 16)), draw.integers(-8, 9, (16, 8))
    c = draw.integers(-8, 9, (16, 8)).astype(np.float32)

    def bits(values):
        return values.astype(np.float16).view(np.uint16) if f16 else bfloat16(values)[0]

    a_lanes = np.stack([bits(a)[a_place(i)] for i in range(8)], 1).copy()
    b_lanes = np.stack([bits(b)[b_place(i)] for i in range(4)], 1).copy()
    d_lanes = np.stack([c[c_place(i)] for i in range(4)], 1).copy()
    check(toys.product(f16, address(a_lanes), address(b_lanes), address(d_lanes)))
    d = np.full((16, 8), np.nan, np.float32)
    for i in range(4):
        d[c_place(i)] = d_lanes[:, i]
    np.testing.assert_array_equal(d, a @ b + c)


def statistics(toys):
    counts = np.zeros(7, np.int64)
    toys.take_statistics(address(counts))
    names = ["launches", "barriers", "read", "written", "mma", "conflicts", "shared"]
    return dict(zip(names, counts.tolist(), strict=True))


def test_statistics(toys):
    statistics(toys)
    matmul(toys, m=64, n=32, k=64)
    # Two blocks of two warps, two tiles of two steps of four products, two barriers a tile.
    assert statistics(toys) == dict(
        launches=1, barriers=8, read=2 * 64 * 64, written=4 * 64 * 32, mma=64, conflicts=0, shared=10240
    )
    stencil(toys, count=256)
    assert statistics(toys) == dict(
        launches=1, barriers=4, read=4 * 2 * 129, written=4 * 258, mma=0, conflicts=0, shared=536
    )


@pytest.mark.parametrize("pitch, extra", [(8, 0), (40, 0), (16, 1), (32, 3), (64, 7)])
def test_bank_conflicts(toys, pitch, extra):
    rows, found = np.zeros((32, 8), np.uint16), np.zeros((32, 12), np.uint32)
    statistics(toys)
    check(toys.fragments(address(rows), address(found), pitch))
    assert statistics(toys)["conflicts"] == 12 * extra


@pytest.mark.parametrize(
    "shape, message",
    [
        ((48, 0, 1, 1, 1), "a block has 48 threads, it may have a multiple of 32 up to 1024"),
        ((1056, 0, 1, 1, 1), "a block has 1056 threads"),
        ((32, 232449, 1, 1, 1), "a block has 232449 bytes of shared memory, it may have 232448"),
        ((32, 0, 1, 65536, 1), "the grid is 1 x 65536 x 1 blocks"),
        ((1024, 232448, 3, 2, 2), None),
        ((32, 0, 0, 1, 1), None),
    ],
)
def test_limits_of_a_launch(toys, shape, message):
    threads, shared_bytes, *grid = shape
    found = toys.shape(threads, shared_bytes, *map(ctypes.c_int64, grid))
    assert (found or b"").decode().startswith("shape: " + message if message else "")
