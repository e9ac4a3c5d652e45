from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import shelfkern
from shelfkern import native, ops

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
MIB = 2**20


@pytest.fixture
def pool():
    """The native module with an empty pool of buffers, and empty again afterwards."""
    gc.collect()
    native.give_back()
    yield native.module
    native.give_back()


def run_when_loaded(path):
    """The addresses of the functions that run when a shared library is loaded."""
    sections = subprocess.check_output(["readelf", "-SW", path], text=True)
    start, size = (int(x, 16) for x in re.search(r"\.init_array +\w+ +(\w+) +\w+ +(\w+)", sections).groups())
    relocations = subprocess.check_output(["readelf", "-rW", path], text=True)
    found = re.findall(r"^(\w+) +\w+ +R_X86_64_RELATIVE +(\w+)", relocations, re.M)
    return [int(to, 16) for at, to in found if start <= int(at, 16) < start + size]


def in_new_process(code, **environment):
    """Runs Python code in a process of its own, in which torch has one thread."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(shelfkern.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have a single set of kernels")
@pytest.mark.skipif(not (shutil.which("readelf") and shutil.which("objdump")), reason="needs GNU binutils")
def test_loading_runs_on_every_cpu():
    """Some of the module's code is for certain CPUs only: none of it may run before they are told apart."""
    functions = run_when_loaded(native.module.__file__)
    assert len(functions) > 1
    for start in functions:
        command = ["objdump", "-d", "--no-show-raw-insn", f"--start-address={start}"]
        command += [f"--stop-address={start + 4096}", native.module.__file__]
        code = re.split(r":\s+ret\b", subprocess.check_output(command, text=True))[0]
        assert not re.findall(r":\s+(v\w+ .*)", code)


@needs_native
def test_memory_is_reused_when_a_tensor_is_gone(pool):
    tensor = native.empty((100, 300), torch.float32)
    address = tensor.data_ptr()
    assert tensor.shape == (100, 300) and tensor.is_contiguous() and address % 4096 == 0
    assert pool.idle_buffer_bytes() == 0
    del tensor
    assert pool.idle_buffer_bytes() >= 100 * 300 * 4
    again = native.empty((300, 100), torch.int32)
    assert again.data_ptr() == address and pool.idle_buffer_bytes() == 0


@needs_native
@pytest.mark.parametrize(
    "view_of",
    [
        lambda t: t[50:],
        lambda t: t.T[1],
        lambda t: t.view(torch.int32),
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
    ],
)
def test_memory_is_not_reused_while_a_view_lives(view_of, pool):
    tensor = native.empty((100, 300), torch.float32)
    address = tensor.data_ptr()
    view = view_of(tensor)
    del tensor
    assert pool.idle_buffer_bytes() == 0
    assert native.empty((100, 300), torch.float32).data_ptr() != address
    native.give_back()
    del view
    assert native.empty((100, 300), torch.float32).data_ptr() == address


@needs_native
def test_a_buffer_serves_what_is_a_little_smaller(pool):
    address = native.empty((10 * 4096,), torch.uint8).data_ptr()
    small = native.empty((7 * 4096,), torch.uint8)
    assert small.data_ptr() != address and pool.idle_buffer_bytes() == 10 * 4096
    large = native.empty((11 * 4096,), torch.uint8)
    assert large.data_ptr() != address and pool.idle_buffer_bytes() == 10 * 4096
    assert native.empty((9 * 4096,), torch.uint8).data_ptr() == address
    # It came back whole.
    assert native.empty((10 * 4096,), torch.uint8).data_ptr() == address


@needs_native
def test_the_pool_is_bounded(pool):
    limit = pool.buffer_limit()
    assert 0 < limit <= 1024 * MIB
    # Untouched memory takes no room.
    third = limit // 3 // 4096 * 4096
    buffers = [pool.Buffer(third) for _ in range(5)] + [pool.Buffer(limit + 1)]
    assert pool.idle_buffer_bytes() == 0
    while buffers:
        buffers.pop()
        assert pool.idle_buffer_bytes() <= limit
    assert pool.idle_buffer_bytes() == 3 * third
    native.give_back()
    assert pool.idle_buffer_bytes() == 0


FREED = """
from pathlib import Path
import torch
from shelfkern import native

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

tensors = [torch.ones(1 << 14) for _ in range(2000)]
full = resident()
# The last one keeps what lies below it.
del tensors[:-1]
native.give_back()
print(full, resident())
"""


UNPOOLED = """
from pathlib import Path
import torch
from shelfkern import native

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

tensors = [native.empty((64 << 10,), torch.int32, pooled=False).fill_(1) for _ in range(400)]
full = resident()
# Those between others too.
del tensors[::2]
print(full, resident(), native.module.idle_buffer_bytes())
"""


@needs_native
@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere memory is the C library's")
def test_what_is_not_pooled_goes_back_at_once():
    found = in_new_process(UNPOOLED)
    assert found.returncode == 0, found.stderr
    full, left, idle = map(int, found.stdout.split())
    assert left < full - 40 and idle == 0


SCARCE = """
import re, resource
from pathlib import Path
import torch
from shelfkern import native

MIB = 1 << 20
for _ in range(2):
    native.empty((300 * MIB,), torch.uint8)
mapped = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (mapped + 50 * MIB,) * 2)
# Too small for the idle one to serve, and too large to lie beside it.
tensor = native.empty((200 * MIB,), torch.uint8)
print(native.module.idle_buffer_bytes(), tensor.numel() // MIB)
try:
    native.empty((8192, MIB), torch.float32)
except MemoryError as error:
    print(error)
"""


@needs_native
@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux limits what a process may map")
def test_idle_memory_makes_room():
    found = in_new_process(SCARCE)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        "0 200",
        f"there is no memory for (8192, {MIB}) torch.float32, {8192 * 4 * MIB} bytes",
    ]


@needs_native
@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 5 * MIB + 4097])
def test_all_of_a_buffer_can_be_written(nbytes, pool):
    tensor = native.empty((nbytes,), torch.uint8, pooled=False).fill_(7)
    assert tensor.data_ptr() % (2 * MIB if nbytes >= 2 * MIB else 4096) == 0 and (tensor == 7).all()
    neighbour = native.empty((nbytes,), torch.uint8, pooled=False).fill_(8)
    assert (tensor == 7).all() and (neighbour == 8).all()


@needs_native
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc keeps what is freed")
def test_freed_memory_goes_back():
    found = in_new_process(FREED)
    assert found.returncode == 0, found.stderr
    full, left = map(int, found.stdout.split())
    assert left < full - 100


@needs_native
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), max_size=40))
@settings(max_examples=25, deadline=None)
def test_living_tensors_keep_their_numbers(steps):
    living = []
    for number, (make, value) in enumerate(steps):
        if make:
            living.append((native.empty((value,), torch.int32).fill_(number), number))
        elif living:
            living.pop(value % len(living))
        assert all((tensor == expected).all() for tensor, expected in living)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_empty_of_every_dtype(dtype):
    tensor = native.empty((3, 0, 2), dtype)
    assert tensor.shape == (3, 0, 2) and tensor.dtype is dtype
    tensor = native.empty((3, 5), dtype)
    assert tensor.shape == (3, 5) and tensor.dtype is dtype
    tensor.copy_(torch.arange(15).view(3, 5))
    assert tensor.tolist() == torch.arange(15).view(3, 5).tolist()
    assert native.empty((), dtype).shape == ()


def test_disable(monkeypatch):
    monkeypatch.setattr(native, "disabled", {})
    before = native.reason("upsample_add")
    assert before == native.why_not
    native.disable("upsample_add", "off for a test")
    assert native.reason("upsample_add") == (native.why_not or "off for a test")
    assert native.reason("stem") == native.why_not
    args = torch.ones(1, 2, 2, 3), torch.ones(1, 2, 4, 6)
    assert torch.equal(ops.upsample_add(*args), ops.upsample_add_reference(*args))
    message = re.escape(native.why_not or "off for a test")
    with pytest.raises(RuntimeError, match=f"^upsample_add: .*{message}"):
        ops.upsample_add(*args, backend="native")


@needs_native
def test_a_disabled_kernel_is_not_called(monkeypatch):
    monkeypatch.setattr(native, "disabled", {})
    calls = []
    right = native.module.upsample_add
    monkeypatch.setattr(native.module, "upsample_add", lambda *args: (calls.append(1), right(*args)))
    args = torch.ones(1, 2, 2, 3), torch.ones(1, 2, 4, 6)
    ops.upsample_add(*args)
    assert calls == [1]
    native.disable("upsample_add", "off for a test")
    ops.upsample_add(*args)
    assert calls == [1]


def test_addresses():
    tensor = torch.zeros(4)
    assert native.address(tensor) == tensor.data_ptr() and native.address(None) == 0
    assert native.address(tensor[1:]) == tensor.data_ptr() + 4


def test_the_cpu_is_asked_for_all_that_is_compiled():
    sources = Path(__file__).parents[1]
    flags = re.findall(r"^set\(FLAGS_.*", (sources / "CMakeLists.txt").read_text(), re.M)
    compiled = set(re.findall(r"-m(\w+)(?![\w-])", "\n".join(flags)))
    dispatch = (sources / "csrc/cpu/dispatch.cpp").read_text()
    checked = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', dispatch))
    assert compiled - checked == {"prfchw"} and checked <= compiled  # every CPU with AVX-512 has prefetchw


@needs_native
def test_isas():
    isas = native.module.isas()
    assert isas[-1] == "baseline" and len(set(isas)) == len(isas)
    before = native.module.isa()
    assert before in isas
    assert not native.module.force_isa("z80") and native.module.isa() == before


@needs_native
def test_products_and_their_peaks():
    module = native.module
    before = module.isa()
    assert native.has_product(torch.float32)
    with pytest.raises(ValueError, match=r"^kind is 'float64', it may be float32, bfloat16, int8 or int16$"):
        module.peak("float64", 1, 1)
    with pytest.raises(ValueError, match=r"^threads is 0, it must be at least 1$"):
        module.peak("float32", 0, 1)
    try:
        for isa in module.isas():
            module.force_isa(isa)
            assert native.has_product(torch.int8) == (isa in ("avx512_vnni", "avx512_bf16"))
            assert native.has_product(torch.int16) == (platform.machine() == "x86_64")
            assert native.has_product(torch.bfloat16) == (isa == "avx512_bf16")
            for kind in ("float32", "bfloat16", "int8", "int16"):
                if module.has_product(kind):
                    assert module.peak(kind, 2, 1) > 0
                else:
                    message = rf"^kind is '{kind}', for which {isa} has no instructions$"
                    with pytest.raises(ValueError, match=message):
                        module.peak(kind, 1, 1)
    finally:
        module.force_isa(before)


@needs_native
def test_kernels_run_on_the_threads_of_torch_or_on_their_own():
    scores = torch.randn(2, 19, 33, 41, generator=torch.Generator().manual_seed(0))
    expected = ops.upsample_argmax_reference(scores, (264, 328), (264, 328), True)
    runtime, threads = native._openmp_runtime(), torch.get_num_threads()
    assert runtime is None or native.thread_runtime == runtime[0]
    try:
        torch.set_num_threads(3)
        shared = ops.upsample_argmax(scores, (264, 328), backend="native")
        native.module.set_parallel_runtime(0)
        own = ops.upsample_argmax(scores, (264, 328), backend="native")
    finally:
        native.module.set_parallel_runtime(runtime[1] if runtime else 0)
        torch.set_num_threads(threads)
    assert torch.equal(shared, own)
    assert (own == expected).float().mean() > 0.999


LITTLE_MEMORY = """
import resource, torch
from shelfkern import native, ops

def resized(channels, width):
    x = torch.randn(1, channels, 8, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last), (64, width)

def leave(mib):
    present = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + mib * 2**20, -1))

few, many = resized(4, 64), resized(256, 40000)
expected = ops.upsample_argmax(*few)
torch.set_num_threads(3)
{runtime}
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("runtime", ["", "native.module.set_parallel_runtime(0)"], ids=["torch's", "own"])
def test_too_little_memory_in_threads_raises_in_the_caller(runtime):
    # Threads work in 40 MB each.
    done = in_new_process(f"""{LITTLE_MEMORY.format(runtime=runtime)}
ops.upsample_argmax(*few)
leave(mib=20)
try:
    ops.upsample_argmax(*many)
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(all(torch.equal(ops.upsample_argmax(*few), expected) for _ in range(20)))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MemoryError", "True"]


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_threads_that_cannot_start_are_done_without():
    # Less than one's stack takes.
    done = in_new_process(f"""{LITTLE_MEMORY.format(runtime="native.module.set_parallel_runtime(0)")}
leave(mib=1)
print(torch.equal(ops.upsample_argmax(*few), expected))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


@needs_native
def test_the_environment_chooses_the_isa():
    isa = native.module.isas()[-1]
    done = in_new_process("from shelfkern import native; print(native.module.isa())", SHELFKERN_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@needs_native
def test_an_unknown_isa_is_an_error():
    done = in_new_process("import shelfkern", SHELFKERN_ISA="z80")
    assert done.returncode == 1
    isas = ", ".join(native.module.isas())
    assert f"ImportError: SHELFKERN_ISA is 'z80', this CPU can run {isas}" in done.stderr


WITHOUT_NATIVE = """
import sys
sys.modules["shelfkern._native"] = None
import torch
from shelfkern import native, ops
from shelfkern.ops import selftest

assert native.module is None and "shelfkern._native does not load" in native.why_not, native.why_not
for op, (public, reference, tensors, arguments) in selftest._cases().items():
    if "native" not in ops.KERNELS[op]:
        continue
    narrow = [t.float() if t.is_floating_point() else t for t in tensors]
    assert torch.equal(public(*narrow, **arguments), reference(*narrow, **arguments)), op
    try:
        public(*narrow, **arguments, backend="native")
    except RuntimeError as error:
        assert str(error).startswith(op + ": ") and native.why_not in str(error), error
    else:
        raise AssertionError(op)
    assert selftest.run(op) == selftest.Result(op, "native", None, native.why_not)
assert native.empty((2, 3), torch.bfloat16).shape == (2, 3)
print(*selftest._cases())
"""


def test_without_the_native_module_torch_computes_every_op():
    done = in_new_process(WITHOUT_NATIVE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(ops.NAMES)


def test_a_module_that_does_not_load_is_told_from_one_that_is_not_there(monkeypatch):
    monkeypatch.delattr(shelfkern, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "shelfkern._native", None)
    module, reason = native._load()
    assert module is None and reason.startswith("shelfkern._native does not load: ")
    monkeypatch.delitem(sys.modules, "shelfkern._native")
    monkeypatch.setattr(shelfkern, "__path__", [])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "ditable" not in repr(f)])
    module, reason = native._load()
    assert module is None and "without a C++ compiler" in reason
