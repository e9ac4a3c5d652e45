"""Builds shelfkern._native (and _emulation) with CMake, or leaves it out where there is no compiler.

Environment:
    SHELFKERN_NATIVE  auto (default), 0: pure Python, 1: an error without a C++ compiler.
    SHELFKERN_CUDA    auto (default), 0: CPU only, 1: an error without nvcc.
    SHELFKERN_EMULATION  0 (default), 1: also shelfkern._emulation, which runs the CUDA kernels on the CPU,
                         for people who write them.
A compiler that is there and fails is always an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def switch(name: str, default: str = "auto") -> str:
    value = os.environ.get(name, default)
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} is {value!r}, it may be auto, 0 or 1")
    return value


def find_cxx() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next(filter(None, map(shutil.which, ["nvcc", *candidates])), None)


def wanted(name: str, found: str | None, missing: str) -> bool:
    """Whether a part is built: as its switch says, and with auto if its compiler was found."""
    value = switch(name)
    if value == "1" and not found:
        raise SystemExit(f"{name}=1, but {missing} was not found")
    return value != "0" and found is not None


def emulated() -> bool:
    """Whether the CUDA kernels are compiled for the CPU as well."""
    return switch("SHELFKERN_EMULATION", "0") == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        nvcc = find_nvcc()
        cuda = wanted("SHELFKERN_CUDA", nvcc, "nvcc")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSHELFKERN_CUDA={'ON' if cuda else 'OFF'}",
            f"-DSHELFKERN_EMULATION={'ON' if emulated() else 'OFF'}",
            f"-DSHELFKERN_SANITIZE={'ON' if os.environ.get('SHELFKERN_SANITIZE') == '1' else 'OFF'}",
        ]  # fmt: skip
        if cuda:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        jobs = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        name = ext.name.rpartition(".")[2]
        subprocess.run(["cmake", "--build", str(build), "-j", jobs, "--target", name], check=True)
        subprocess.run(["cmake", "--install", str(build), "--strip", "--component", name], check=True)


def extensions() -> list[Extension]:
    native = wanted("SHELFKERN_NATIVE", find_cxx(), "a C++ compiler")
    if switch("SHELFKERN_CUDA") == "1" and not native:
        raise SystemExit("SHELFKERN_CUDA=1, but it needs a C++ compiler and SHELFKERN_NATIVE auto or 1")
    if native:
        names = ["_native", "_emulation"] if emulated() else ["_native"]
        return [Extension(f"shelfkern.{name}", sources=[]) for name in names]
    print(
        "shelfkern: no C++ compiler, or SHELFKERN_NATIVE=0: installing without native kernels",
        file=sys.stderr,
    )
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
