"""Threads of the CPU engine: as many as torch has, however many models and callers there are."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from models import CONFIGS, build, images

import shelfkern
from shelfkern import native, ops

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")

Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
Parallel = ctypes.CFUNCTYPE(None, Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)

PROGRAM = """
import os, sys, threading, time
import torch
import shelfkern
from models import CONFIGS, build, images

def os_threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):
    # Threads that have ended are gone a little later.
    for _ in range(1000):
        if os_threads() <= count:
            break
        time.sleep(0.01)
    return os_threads()

x = images(1, 96, 160)
fast = shelfkern.accelerate(build(CONFIGS["attention"]))
"""


def in_new_process(program, *arguments):
    """What a program prints, word by word."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_native
@needs_proc
def test_calls_models_and_callers_leave_no_threads_behind():
    counts = in_new_process(f"""{PROGRAM}
torch.set_num_threads(2)
fast(x), fast.predict(x)
first = os_threads()
others = [shelfkern.accelerate(build(CONFIGS[name])) for name in ("deconv", "no_lateral")]
for model in (fast, *others) * 3:
    model(x)
after_models = os_threads()

def work():
    for model in (fast, *others):
        model(x)

threads = [threading.Thread(target=work) for _ in range(6)]
[t.start() for t in threads], [t.join() for t in threads]
print(first, after_models, settled(first))
""")
    first, after_models, after_callers = map(int, counts)
    assert after_models == first and after_callers == first


@needs_native
def test_one_thread_starts_no_other():
    (count,) = in_new_process(f"""{PROGRAM}
torch.set_num_threads(1)
before = os_threads()
fast(x), fast.predict(x)
print(os_threads() - before)
""")
    assert int(count) == 0


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinities here")
@pytest.mark.parametrize("when", ["before torch", "after torch"])
def test_on_one_cpu(when, tmp_path):
    restrict = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    program = """
print(torch.get_num_threads())
torch.save(fast(x), sys.argv[-1])
"""
    path = tmp_path / "scores.pt"
    before, after = (restrict, "") if when == "before torch" else ("", restrict)
    (count,) = in_new_process(f"import os\n{before}{PROGRAM}{after}{program}", str(path))
    assert when == "after torch" or count == "1"
    with torch.no_grad():
        expected = shelfkern.accelerate(build(CONFIGS["attention"]))(images(1, 96, 160))
    assert torch.equal(torch.load(path, weights_only=True), expected)


class Runtime:
    """Stands in for an OpenMP runtime: does all work in the caller, and notes how many threads it wants.

    inside: called once, while the first call is at work.
    """

    def __init__(self, inside):
        self.asked, self._inside = [], inside
        self.entry = Parallel(self._run)

    def _run(self, body, data, threads, flags):
        self.asked.append(threads)
        inside, self._inside = self._inside, lambda: None
        inside()
        body(data)


@needs_native
@pytest.mark.parametrize("second, wanted", [(4, []), (5, []), (6, [2]), (8, [4])])
def test_callers_side_by_side_share_the_threads(second, wanted):
    x, skip = torch.randn(1, 16, 16, 24), torch.randn(1, 16, 32, 48)
    x, skip = (t.contiguous(memory_format=torch.channels_last) for t in (x, skip))
    expected, results = ops.upsample_add(x, skip, backend="reference"), []

    def run():
        results.append(ops.upsample_add(x, skip, backend="native"))

    def beside():
        torch.set_num_threads(second)
        other = threading.Thread(target=run)
        other.start(), other.join()

    runtime, own = Runtime(beside), native._openmp_runtime()
    torch.set_num_threads(4)  # the fixture of all tests sets it back
    native.module.set_parallel_runtime(ctypes.cast(runtime.entry, ctypes.c_void_p).value)
    try:
        run()
        assert runtime.asked == [4, *wanted]
        # Alone again, all are one's own.
        torch.set_num_threads(4)
        run()
        assert runtime.asked == [4, *wanted, 4]
    finally:
        native.module.set_parallel_runtime(own[1] if own else 0)
    assert len(results) == 3 and all(torch.equal(result, expected) for result in results)


@needs_native
@torch.no_grad()
def test_the_number_of_threads_may_change_between_calls():
    models = [shelfkern.accelerate(build(CONFIGS[name])) for name in ("attention", "deconv")]
    x = images(2, 75, 128)
    expected = [(fast(x), fast.predict(x)) for fast in models]
    for count in (2, 1, 3, 2):
        torch.set_num_threads(count)
        for fast, (scores, labels) in zip(models, expected, strict=True):
            assert torch.equal(fast(x), scores) and torch.equal(fast.predict(x), labels)
