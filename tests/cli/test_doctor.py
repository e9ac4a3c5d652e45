"""`shelfkern doctor`: what it says of this machine, and of machines that lack something."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner, Result

import shelfkern
from shelfkern import native, ops
from shelfkern.cli import commands
from shelfkern.cli import doctor as command
from shelfkern.ops import selftest

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")

# The module itself: the package's name for it is the command.
doctor_module = sys.modules[command.callback.__module__]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def run() -> Result:
    result = CliRunner().invoke(commands, ["doctor"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(text: str) -> dict[str, list[str]]:
    """The cells of rich's tables by the first of each row."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {name: cells for name, *cells in lines}


def test_versions_and_hardware() -> None:
    found = rows(run().stdout)
    assert found["shelfkern"] == [shelfkern.__version__]
    assert found["torch"] == [torch.__version__]
    assert found["python"] == [platform.python_version()]
    assert found["triton"] == [doctor_module.version_of("triton")]
    assert f"{torch.get_num_threads()} threads for torch" in found["cpu"][0]


def test_packages_that_are_not_installed() -> None:
    assert doctor_module.version_of("no-such-package-anywhere") == "not installed"
    assert doctor_module.version_of("torch") == torch.__version__


@needs_native
def test_instruction_sets_and_compiler() -> None:
    found = rows(run().stdout)
    assert found["instruction sets"] == [f"{', '.join(native.module.isas())} ({native.module.isa()} in use)"]
    assert found["native kernels"] == [f"compiled by {native.module.compiler}"]
    assert found["threads"] == [native.thread_runtime]


@needs_native
def test_every_op_is_tested() -> None:
    result = run()
    found = rows(result.stdout)
    assert result.exit_code == 0 and "Switched off" not in result.stdout
    kernels = {f"{op} ({name})" for op, names in ops.KERNELS.items() for name in names if name != "emulated"}
    kernels |= {
        f"{op}, {kind} ({name})"
        for kind in ("gradient", "codes")
        for op, names in selftest.KINDS[kind].items()
        for name in names
    }
    tested = {*ops.NAMES, *selftest.TRAINING}
    assert {name for name in found if name.endswith(")") and name.split()[0].strip(",") in tested} == kernels
    for name in (op for op, kernels in ops.KERNELS.items() if "native" in kernels):
        state, error = found[f"{name} (native)"]
        assert state == "right" and float(error) <= selftest.LIMIT
    for name in (f"{op}, {kind} (native)" for kind in ("gradient", "codes") for op in selftest.KINDS[kind]):
        state, error = found[name]
        assert state == "right" and float(error) <= selftest.LIMIT


def test_a_wrong_kernel_is_named(monkeypatch) -> None:
    wrong, gradient, nan = (
        selftest.Result("stem", "cuda", 0.5, None),
        selftest.Result("conv_train", "native", 0.5, None, kind="gradient"),
        selftest.Result("deconv_add", "triton", float("nan"), None),
    )
    right = selftest.Result("shared_block", "native", 1e-7, None)
    monkeypatch.setattr(selftest, "run_all", lambda: [wrong, right, gradient, nan])
    result = run()
    found = rows(result.stdout)
    assert result.exit_code == 1
    assert found["stem (cuda)"] == ["wrong, switched off", "5.0e-01"]
    assert found["deconv_add (triton)"][1] == "nan" and found["shared_block (native)"][0] == "right"
    names = "stem (cuda), conv_train, gradient (native), deconv_add (triton)"
    assert f"Switched off for being wrong here: {names}." in result.stdout


@needs_native
def test_a_kernel_found_wrong_is_switched_off(monkeypatch) -> None:
    monkeypatch.setattr(native, "disabled", {})
    monkeypatch.setattr(selftest, "LIMIT", -1.0)
    assert selftest.run.__wrapped__("upsample_add").failed
    assert "its self-test failed on this machine" in native.reason("upsample_add")


def test_reasons_are_printed_as_they_are(monkeypatch) -> None:
    reason = "cannot load [/lib/a.so]: pip install 'x[video]'"
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", reason)
    monkeypatch.setattr(selftest, "run_all", lambda: [selftest.Result("stem", "native", None, reason)])
    result = run()
    found = rows(result.stdout)
    assert result.exit_code == 0
    assert found["native kernels"] == [reason] and found["stem (native)"] == [reason, ""]


@pytest.mark.parametrize(
    "place, message",
    [
        (None, "shelfkern._native does not load: "),
        (pytest, "shelfkern was installed without a C++ compiler; install one and reinstall"),
    ],
)
def test_why_the_module_is_missing(place, message: str, monkeypatch) -> None:
    monkeypatch.delattr(shelfkern, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "shelfkern._native", None)
    if place is not None:
        monkeypatch.delitem(sys.modules, "shelfkern._native")
        find = sys.meta_path[:]
        monkeypatch.setattr(sys, "meta_path", [_Without(find)])
    module, why_not = native._load()
    assert module is None and why_not.startswith(message)


class _Without:
    """Finds what the finders find, but for the native module."""

    def __init__(self, finders: list) -> None:
        self.finders = finders

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name == "shelfkern._native":
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)


def test_without_the_native_module() -> None:
    code = "import sys; sys.modules['shelfkern._native'] = None; from shelfkern.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""
    found = rows(done.stdout)
    assert found["instruction sets"] == ["-"] and found["threads"] == ["-"]
    assert found["native kernels"][0].startswith("shelfkern._native does not load: ")
    with_native = [op for op, kernels in ops.KERNELS.items() if "native" in kernels]
    assert all(
        found[f"{op} (native)"][0].startswith("shelfkern._native does not load: ") for op in with_native
    )
    assert "install a C++ compiler (g++ or clang++), then reinstall shelfkern." in done.stdout


def test_where_the_tuner_keeps_what_it_measured(monkeypatch, tmp_path) -> None:
    environment = {"device": "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor_module, "environment_of", lambda device: environment)
    monkeypatch.setenv("SHELFKERN_CACHE", str(tmp_path))
    path, until = doctor_module.default_path(environment), "chooses until tune=True has measured"
    assert doctor_module.tuning_file("cuda") == f"{path} (none yet); a cost model {until}"
    assert doctor_module.tuning_file("cpu") == f"{path} (none yet); a cost model {until}"
    path.write_text("{}")
    table = tmp_path / "nvidia-h200.json"
    monkeypatch.setattr(doctor_module, "shipped_path", lambda environment: table)
    table.write_text("{}")
    assert doctor_module.tuning_file("cuda") == f"{path}; the bundled nvidia-h200.json {until}"
    monkeypatch.setattr(doctor_module, "default_path", lambda environment: None)
    assert (
        doctor_module.tuning_file("cuda")
        == f"nowhere: there is no home folder; the bundled nvidia-h200.json {until}"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_module.tuning_file("cuda") == "-"
