"""The CPU kernels and the emulator under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

from shelfkern import native

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++, whose sanitizers are used")

# Every native kernel at every instruction set, and every CUDA kernel in the emulator.
SELECTION = "every_isa or (test_drawn and emulated)"
FILES = sorted(path for path in (ROOT / "tests" / "ops").glob("test_*.py"))

# One element more is read than there is.
BEYOND = """
import torch
from shelfkern import native
x = torch.zeros(64)
module = getattr(native, {module!r})
{call}
"""
CALLS = {
    "module": "module.upsample_add(x.data_ptr(), x.data_ptr(), 0, x.data_ptr(), 0, 1, 4, 4, 4, 1, "
    "0, 1, 1, 0)",
    "emulation": "module.upsample_add(x.data_ptr(), x.data_ptr(), 0, x.data_ptr(), 0, 1, 4, 4, 4, "
    "*[(64, 16, 4)] * 3, (0, True))",
}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A folder with a copy of the package whose compiled modules are checked."""
    home = tmp_path_factory.mktemp("sanitized")
    package, build = home / "shelfkern", home / "build"
    isas = native.module.isas() if native.module else []  # no others run here
    shutil.copytree(ROOT / "shelfkern", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={package}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DSHELFKERN_EMULATION=ON", "-DSHELFKERN_SANITIZE=ON",
        f"-DSHELFKERN_ISAS={';'.join(isas)}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    subprocess.run(["cmake", "--install", str(build)], check=True, capture_output=True)
    return home


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the checked modules."""
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([COMPILER or "", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in names
    ]
    environment = {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        # Python and torch keep memory until they end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(home),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize("module", CALLS)
def test_the_sanitizers_see_what_is_beyond_the_end(sanitized, module):
    done = run(sanitized, "-c", BEYOND.format(module=module, call=CALLS[module]))
    # Beyond the end is a border, or what another tensor has freed.
    found = [
        f"ERROR: AddressSanitizer: heap-{kind}" in done.stderr
        for kind in ("buffer-overflow", "use-after-free")
    ]
    assert done.returncode != 0 and any(found)


def test_what_runs_on_each_instruction_set_is_selected():
    for path in FILES:
        text = path.read_text()
        tests = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        for test in tests:
            selected = "every_isa" in test.name or not test.name.startswith("test")
            assert selected or "each_isa(" not in ast.get_source_segment(text, test), test.name


def test_kernels_are_clean(sanitized):
    done = run(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTION, *map(str, FILES))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "runtime error" not in done.stdout + done.stderr
