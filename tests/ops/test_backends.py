from __future__ import annotations

import logging

import pytest
import torch

from shelfkern import native, ops
from shelfkern.ops import _backends as backends
from shelfkern.ops import _triton

X = torch.zeros(1, 2, 3, 4)
CAN, CANNOT = None, "x is purple"


def test_every_op_has_kernels_on_the_cpu_and_names_that_exist():
    assert list(ops.NAMES) == list(ops.KERNELS)
    for op, kernels in ops.KERNELS.items():
        assert callable(getattr(ops, op)) and callable(getattr(ops, f"{op}_reference"))
        assert "native" in kernels
        assert set(kernels) <= set(ops.BACKENDS) - {"auto", "reference"}
        # What runs on a GPU as CUDA C++ is proven in the emulator.
        assert ("cuda" in kernels) == ("emulated" in kernels)


def test_auto_takes_the_first_that_can():
    assert backends.choose("op", "auto", {"native": CAN, "triton": CAN}, (X,)) == "native"
    assert backends.choose("op", "auto", {"native": CANNOT, "cuda": CAN}, (X,)) == "cuda"
    assert backends.choose("op", "auto", {"native": CANNOT, "cuda": CANNOT}, (X,)) == "reference"


def test_slow_kernels_run_by_name_only(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    why = {"native": CANNOT, "triton": CAN, "emulated": CAN}
    assert backends.choose("op", "auto", why, (X,)) == "reference"
    assert backends.choose("op", "triton", why, (X,)) == "triton"
    assert backends.choose("op", "emulated", why, (X,)) == "emulated"
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert backends.choose("op", "auto", why, (X,)) == "triton"


def test_one_asked_for_by_name_runs_or_says_why():
    why = {"native": CANNOT, "cuda": CAN}
    assert backends.choose("op", "cuda", why, (X,)) == "cuda"
    assert backends.choose("op", "reference", why, (X,)) == "reference"
    with pytest.raises(RuntimeError, match=r"^op: backend is 'native', which cannot run: x is purple$"):
        backends.choose("op", "native", why, (X,))
    with pytest.raises(
        RuntimeError, match=r"^op: backend is 'triton', which cannot run: op has no such kernel$"
    ):
        backends.choose("op", "triton", why, (X,))
    with pytest.raises(ValueError, match=r"^op: backend is 'gpu', it may be one of auto, native, cuda, "):
        backends.choose("op", "gpu", why, (X,))


def test_kernels_lose_no_gradient():
    x = X.clone().requires_grad_()
    assert backends.choose("op", "auto", {"native": CAN}, (x, None)) == "reference"
    with pytest.raises(RuntimeError, match="an input requires grad, and the native kernel has no gradient"):
        backends.choose("op", "native", {"native": CAN}, (x,))
    # The reason that came first is the one that is told.
    with pytest.raises(RuntimeError, match=CANNOT):
        backends.choose("op", "native", {"native": CANNOT}, (x,))
    with torch.no_grad():
        assert backends.choose("op", "auto", {"native": CAN}, (x,)) == "native"
    # An op whose kernels have a gradient names the inputs that are left without.
    assert backends.choose("op", "auto", {"native": CAN}) == "native"


def test_a_rejection_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.INFO, "shelfkern"):
        for _ in range(3):
            backends.choose("op", "auto", {"native": CANNOT, "triton": "no Triton"}, (X,))
    assert [record.getMessage() for record in caplog.records] == [
        "op: the native kernel cannot run: x is purple",
        "op: the triton kernel cannot run: no Triton",
    ]


@pytest.mark.parametrize("op", [op for op, kernels in ops.KERNELS.items() if "cuda" in kernels])
def test_cuda_kernels_refuse_tensors_of_the_cpu(op, monkeypatch):
    monkeypatch.setattr(native, "cuda", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.reasons(op, X)["cuda"] == "x is on cpu, the cuda kernel runs on a GPU"


def test_why_cuda_kernels_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "cuda", object())
    assert native.cuda_reason() == "there is no GPU that torch can use"
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "why_not", None)
    assert "without nvcc" in native.cuda_reason()
    monkeypatch.setattr(native, "why_not", "no compiler")
    assert native.cuda_reason() == "no compiler"


@pytest.mark.parametrize("backend", ["native", "cuda", "triton", "emulated"])
def test_a_kernel_found_wrong_is_off(backend, monkeypatch):
    monkeypatch.setattr(native, "disabled", {})
    monkeypatch.setattr(native, "cuda_reason", lambda: None)
    for name in ("why_not", "why_not_emulated"):
        monkeypatch.setattr(native, name, None)
    monkeypatch.setattr(_triton, "why_not", None)
    assert backends.unavailable("upsample_add", backend) is None
    native.disable("upsample_add", "it is wrong here", backend)
    assert backends.unavailable("upsample_add", backend) == "it is wrong here"
    assert backends.unavailable("stem", backend) is None


@pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
def test_no_kernel_goes_untested():
    # Their tests are skipped where these are missing, which must not go unseen.
    assert native.emulation is not None, native.why_not_emulated
    assert _triton.why_not is None and (_triton.INTERPRETED or torch.cuda.is_available()), _triton.why_not
