"""`shelfkern resources`: its table, its JSON, and what it says of faults and of missing tools."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner, Result

from shelfkern import native, resources
from shelfkern.cli import commands

needs_triton = pytest.mark.skipif(resources.reason() is not None, reason=str(resources.reason()))
FITS = resources.Row("stem", "stem_kernel", "float16 [x]", 90, 128, 0, 1024, 4, "mma")
SPILLS = resources.Row("deconv_add", "deconv_kernel", "tf32", 80, 255, 16, 1024, 1, "mma")


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(commands, ["resources", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def give(monkeypatch, triton: list[resources.Row], cuda: list[resources.Row]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(resources, "triton_rows", lambda archs, op: triton)
    monkeypatch.setattr(resources, "cuda_rows", lambda archs, op: cuda)
    monkeypatch.setattr(resources, "cuda_reason", lambda: None)


def test_a_table(monkeypatch) -> None:
    give(monkeypatch, [FITS], [dataclasses.replace(FITS, shared=None, blocks=None)])
    result = run()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    rows = [row for row in cells if row]
    assert result.exit_code == 0
    assert rows == [
        ["stem", "stem_kernel", "float16 [x]", "sm_90", "128", "0", "1024", "4", "mma"],
        ["stem", "stem_kernel", "float16 [x]", "sm_90", "128", "0", "at launch", "", "mma"],
    ]


def test_json(monkeypatch) -> None:
    give(monkeypatch, [FITS], [dataclasses.replace(FITS, shared=None, blocks=None)])
    lines = run("--json").stdout.splitlines()
    assert [resources.Row(**json.loads(line)) for line in lines] == [
        FITS,
        dataclasses.replace(FITS, shared=None, blocks=None),
    ]


def test_a_fault_is_a_sentence_and_an_exit_status(monkeypatch) -> None:
    give(monkeypatch, [FITS, SPILLS], [])
    result = run("--json")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    assert result.stderr == (
        "Error: deconv_kernel (tf32, sm_80): 16 bytes of a thread's registers are in memory\n"
    )


def test_a_build_without_nvcc_is_said(monkeypatch) -> None:
    monkeypatch.setattr(resources, "triton_rows", lambda archs, op: [FITS])
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "why_not", None)
    result = run("--json")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 1
    assert "Nothing of the CUDA C++ kernels: shelfkern was installed without nvcc" in result.stderr


def test_without_triton(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    result = run()
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Triton's kernels cannot be compiled here: Triton is not installed: pip install triton\n"
    )


@needs_triton
def test_without_cuobjdump(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(resources.Path, "exists", lambda path: False)
    result = run()
    assert result.exit_code == 1 and "there is no cuobjdump" in result.stderr


# Also where kernels are interpreted: they are compiled in other processes.
@needs_triton
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_one_op_of_one_arch(interpret: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "shelfkern",
            "resources",
            "--op",
            "upsample_bilinear",
            "--arch",
            "90",
            "--json",
        ],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["op"], row["arch"]) for row in rows} == {("upsample_bilinear", 90)}


def test_a_cache_that_cannot_be_written_is_told(monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "/root/.triton")

    monkeypatch.setattr(resources, "triton_rows", refuse)
    result = run()
    assert result.exit_code == 1
    assert "Triton's cache cannot be written: " in result.output and "set TRITON_CACHE_DIR" in result.output
