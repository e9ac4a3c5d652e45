"""What make does before and beside the work itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "shelfkern").mkdir()
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, timeout=60)


def test_an_old_python_is_named(checkout) -> None:
    """Nothing is made with it."""
    old = checkout / "python3.9"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); $2"\n')
    old.chmod(0o755)
    done = make(checkout, ".venv/.torch", f"PYTHON={old}")
    assert done.returncode != 0 and not (checkout / ".venv").exists()
    assert done.stderr.splitlines()[0] == f"PYTHON is {old}, Python 3.9, it must be 3.10 or newer"


def test_clean_removes_what_was_compiled(checkout) -> None:
    for name in ("_native.cpython-311.so", "_emulation.cpython-311.so", "native.py"):
        (checkout / "shelfkern" / name).touch()
    assert make(checkout, "clean").returncode == 0
    assert [path.name for path in (checkout / "shelfkern").iterdir()] == ["native.py"]


@pytest.mark.parametrize("linted, tested, status", [(0, 0, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2)])
def test_the_tests_run_last_whatever_the_linters_find(linted, tested, status, tmp_path) -> None:
    (tmp_path / ".ci").mkdir()
    run = Path(shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run"))
    lines = f"lint:\n\t@echo linted; exit {linted}\ntest:\n\t@echo tested; exit {tested}\n"
    (tmp_path / "Makefile").write_text(lines)
    # Where make runs the tests, it hands on what makes another make talk.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run([run], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stdout.split() == ["linted", "tested"]
