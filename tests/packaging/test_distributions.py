"""Wheels and the sdist: what they hold, and how the build goes without compilers.

Each is built from a copy of the checkout with some litter in it, as a used checkout has.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")
NAME = "shelfkern-0.1.0"
LITTER = (
    "shelfkern/_native.cpython-311-x86_64-linux-gnu.so",
    "shelfkern/__pycache__/version.cpython-311.pyc",
    "shelfkern/data/frame.jpg",
    "shelfkern/weights/checkpoint.pt",
    "csrc/cpu/stem.o",
    "csrc/libkernels.a",
    "runs/checkpoint.pt",
    "data/camvid/train/images/a.jpg",
    "benchmarks/results/table.csv",
    "docs/notes.txt",
    "tests/test_litter.py",
    "shelfkern_out/labels.png",
)

needs_cxx = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
needs_pybind11 = pytest.mark.skipif(
    importlib.util.find_spec("pybind11") is None, reason="needs pybind11 beside the tests"
)


@functools.cache
def tracked() -> list[str]:
    """Files of the checkout, those not yet added too."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no git checkout: {found.stderr.strip()}")
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_to(folder: Path) -> Path:
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture
def checkout(tmp_path) -> Path:
    return copy_to(tmp_path / "checkout")


@pytest.fixture(scope="session")
def littered(tmp_path_factory) -> Path:
    folder = copy_to(tmp_path_factory.mktemp("littered"))
    for name in LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"litter")
    return folder


@pytest.fixture(scope="session")
def empty(tmp_path_factory) -> Path:
    """A folder for PATH that holds no compiler."""
    return tmp_path_factory.mktemp("empty")


def run(command: list[str], folder: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """Runs a command with none of the caller's choice of compilers and switches, but those given."""
    taken = ("SHELFKERN_", "PYTHON", "PIP_", "CUDA", "CXX", "CC", "CMAKE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(taken)}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    pip = dict(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1")
    environment |= {"PATH": tools, **pip} | {name: str(value) for name, value in variables.items()}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def pip_wheel(source: Path, out: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    options = ["--no-build-isolation", "--no-deps", "--wheel-dir", str(out)]
    return run([sys.executable, "-m", "pip", "wheel", *options, str(source)], source, **variables)


def built(source: Path, out: Path, **variables: object) -> Path:
    done = pip_wheel(source, out, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def refused(source: Path, out: Path, **variables: object) -> str:
    """What a build that must fail says."""
    done = pip_wheel(source, out, **variables)
    assert done.returncode != 0 and not list(out.glob("*.whl")), done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def pure_wheel(littered, tmp_path_factory) -> Path:
    return built(littered, tmp_path_factory.mktemp("pure"), SHELFKERN_NATIVE=0)


@pytest.fixture(scope="session")
def sdist(littered, tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    pytest.importorskip("build.env")
    out = tmp_path_factory.mktemp("sdist")
    options = ["--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", str(out)]
    done = run([sys.executable, "-m", "build", *options, str(littered)], out, SHELFKERN_NATIVE=0)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(out / f"{NAME}.tar.gz") as archive:
        archive.extractall(out, filter="data")
    return out / NAME


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def package_files() -> set[str]:
    data = r"weights/[^/]+\.(safetensors|md)|train/recipes/[^/]+\.toml"
    kinds = re.compile(rf"shelfkern/(.+\.py|py\.typed|{data})")
    return set(filter(kinds.fullmatch, tracked()))


CARD = "shelfkern/weights/camvid.md"
METADATA = {
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "top_level.txt",
    "licenses/LICENSE",
    f"licenses/{CARD}",
}


def test_the_pure_wheel_holds_the_package_and_nothing_else(pure_wheel, littered, tmp_path) -> None:
    assert pure_wheel.name == f"{NAME}-py3-none-any.whl"
    folder = unpacked(pure_wheel, tmp_path)
    assert len(package_files()) > 40 and "shelfkern/py.typed" in package_files()
    assert files_in(folder) == package_files() | {f"{NAME}.dist-info/{name}" for name in METADATA}
    for name in package_files():
        assert (folder / name).read_bytes() == (littered / name).read_bytes(), name
    info = folder / f"{NAME}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (littered / "LICENSE").read_bytes()
    assert "Root-Is-Purelib: true" in (info / "WHEEL").read_text()
    assert "shelfkern = shelfkern.cli:main" in (info / "entry_points.txt").read_text()
    assert "\nRequires-Dist: torch>=" in (info / "METADATA").read_text()
    assert f"\nLicense-File: {CARD}\n" in (info / "METADATA").read_text()
    assert (info / "licenses" / CARD).read_bytes() == (littered / CARD).read_bytes()


def test_the_sdist_holds_the_sources_and_nothing_else(sdist) -> None:
    names = files_in(sdist)
    tops = {
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "CHANGELOG.md",
        "README.md",
    }
    sources = {name for name in tracked() if re.fullmatch(r"csrc/.*(\.(cpp|h|cu|cuh)|CMakeLists\.txt)", name)}
    assert len(sources) > 15 and "csrc/bindings.cpp" in sources
    made = {name for name in names if name.startswith("shelfkern.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    pages = {name for name in tracked() if re.fullmatch(r"(docs/.*|benchmarks/results/.*\.svg)", name)}
    assert names - made == (tops & set(tracked())) | sources | pages | package_files()
    # All of csrc is meant to come along, of whatever kind.
    assert sources == {name for name in tracked() if name.startswith("csrc/")}


def test_the_sdists_pages_link_to_what_it_holds(sdist) -> None:
    """But for links to the web; tests and benchmarks are code spans, not links."""
    pages = [page for page in sdist.rglob("*.md") if "egg-info" not in str(page)]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


def test_the_sdist_builds_the_same_wheel(sdist, pure_wheel, tmp_path) -> None:
    again = unpacked(built(sdist, tmp_path / "out", SHELFKERN_NATIVE=0), tmp_path / "a")
    assert files_in(again) == files_in(unpacked(pure_wheel, tmp_path / "b"))


def run_python(folder: Path, script: str) -> str:
    """Runs a script with an unpacked wheel's package, and with no .pth file to lead to another."""
    paths = dict.fromkeys([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = run(
        [sys.executable, "-S", "-c", script], folder, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS=1
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ACCELERATE = """
import torch
import shelfkern
from shelfkern import native
print(shelfkern.__file__)
print(native.why_not)
torch.manual_seed(0)
model = shelfkern.nn.shelfnet18_lw(5, backbone_width=8, widths=(8, 16, 24), head_width=8).eval()
fast = shelfkern.accelerate(model, backend={backend!r})
x = torch.randn(1, 3, 45, 70)
with torch.no_grad():
    expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-4 * expected.std().item())
    assert (fast.predict(x) == expected.argmax(1)).float().mean() > 0.999
"""


def test_a_pure_wheel_works(pure_wheel, tmp_path) -> None:
    folder = unpacked(pure_wheel, tmp_path)
    origin, why_not = run_python(folder, ACCELERATE.format(backend="auto")).splitlines()
    assert Path(origin) == folder / "shelfkern" / "__init__.py"
    assert why_not == "shelfkern was installed without a C++ compiler; install one and reinstall"


SEGMENT = """
from PIL import Image
from shelfkern.cli import commands
Image.effect_noise((64, 48), 90).convert("RGB").save("photo.png")
commands(["segment", "photo.png"], standalone_mode=False)
print(Image.open("shelfkern_out/photo_labels.png").size)
"""


def test_a_pure_wheel_segments_with_the_weights_that_ship(pure_wheel, tmp_path) -> None:
    assert run_python(unpacked(pure_wheel, tmp_path), SEGMENT).splitlines()[-1] == "(64, 48)"


def test_without_a_compiler_the_wheel_is_pure(checkout, empty, tmp_path) -> None:
    wheel = built(checkout, tmp_path / "out", PATH=empty, SHELFKERN_NATIVE="auto")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in files_in(unpacked(wheel, tmp_path / "in")) if name.endswith(".so")]


@pytest.mark.parametrize("native", ["auto", "0"])
def test_a_pure_build_says_so(native: str, checkout, empty) -> None:
    """The compiler that CXX names is the one that counts."""
    paths = {"auto": dict(CXX="/nosuch/c++"), "0": {}}[native]
    done = run([sys.executable, "setup.py", "--version"], checkout, SHELFKERN_NATIVE=native, **paths)
    assert done.returncode == 0 and "installing without native kernels" in done.stderr


def test_native_1_without_a_compiler_is_an_error(checkout, empty, tmp_path) -> None:
    output = refused(checkout, tmp_path, PATH=empty, SHELFKERN_NATIVE=1)
    assert "SHELFKERN_NATIVE=1, but a C++ compiler was not found" in output


@pytest.mark.parametrize("native", ["auto", "0"])
def test_cuda_1_without_a_cxx_compiler_is_an_error(native: str, checkout, empty, tmp_path) -> None:
    output = refused(checkout, tmp_path, PATH=empty, SHELFKERN_CUDA=1, SHELFKERN_NATIVE=native)
    assert "SHELFKERN_CUDA=1, but it needs a C++ compiler" in output


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@needs_cxx
@needs_pybind11
def test_cuda_1_without_nvcc_is_an_error(checkout, empty, tmp_path) -> None:
    change(checkout / "setup.py", "/usr/local/cuda", "/nosuch")
    output = refused(checkout, tmp_path / "out", PATH=empty, CXX=CXX, SHELFKERN_CUDA=1)
    assert "SHELFKERN_CUDA=1, but nvcc was not found" in output


@pytest.mark.parametrize("name", ["SHELFKERN_NATIVE", "SHELFKERN_CUDA"])
@pytest.mark.parametrize("value", ["ON", ""])
def test_switches_say_what_they_may_be(name: str, value: str, checkout) -> None:
    done = run([sys.executable, "setup.py", "--version"], checkout, **{"SHELFKERN_NATIVE": 0, name: value})
    assert done.returncode != 0 and done.stderr.endswith(f"{name} is {value!r}, it may be auto, 0 or 1\n")


def hollow(checkout: Path) -> None:
    """Leaves nothing in the C++ files to compile, so that only what a test plants takes time."""
    for path in (checkout / "csrc").rglob("*.cpp"):
        path.write_text("")


@needs_cxx
@needs_pybind11
def test_an_error_in_a_cxx_file_fails_the_build(checkout, tmp_path) -> None:
    hollow(checkout)
    (checkout / "csrc" / "bindings.cpp").write_text("#error planted\n")
    output = refused(checkout, tmp_path / "out", SHELFKERN_CUDA=0)
    assert re.search(r"bindings\.cpp.*planted", output)


@needs_cxx
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have a single set of kernels")
@pytest.mark.parametrize(
    "isas, sentence",
    [
        ("baseline;z80", r"has z80, it may have\s+baseline;avx2;avx512"),
        ("avx2", "is avx2, it must have baseline"),
        ("baseline;avx512_vnni", "is baseline;avx512_vnni, it must have avx512"),
    ],
)
def test_instruction_sets_that_do_not_build_are_refused(isas: str, sentence: str, tmp_path) -> None:
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DSHELFKERN_ISAS={isas}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode and re.search(f"SHELFKERN_ISAS {sentence}", done.stderr)


@needs_cxx
@needs_pybind11
def test_an_nvcc_that_fails_fails_the_build(checkout, tmp_path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvcc").write_text("#!/bin/sh\necho planted failure >&2\nexit 1\n")
    (tools / "nvcc").chmod(0o755)
    hollow(checkout)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    output = refused(checkout, tmp_path / "out", PATH=path)
    assert f"-DCMAKE_CUDA_COMPILER={tools / 'nvcc'}" in output
    assert re.search("CMake Error.*CUDA", output)


@needs_cxx
@needs_pybind11
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_an_error_in_a_cuda_file_fails_the_build(checkout, tmp_path) -> None:
    hollow(checkout)
    for path in (checkout / "csrc").rglob("*.cu"):
        path.write_text("__global__ void kernel( { planted }\n")
    # One architecture is enough to fail.
    change(
        checkout / "CMakeLists.txt", "set(CUDA_ARCHS 80-real 90-real 90-virtual)", "set(CUDA_ARCHS 90-real)"
    )
    output = refused(checkout, tmp_path / "out", SHELFKERN_CUDA=1)
    assert re.search(r"\.cu\(1\): error", output)


def dynamic_section(library: Path) -> dict[str, list[str]]:
    """Values in square brackets by tag, as readelf prints them."""
    shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for tag, value in re.findall(r"\((\w+)\).*\[(.*)\]", shown):
        found.setdefault(tag, []).append(value)
    return found


@needs_cxx
@needs_pybind11
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_a_compiled_wheel(sdist, tmp_path) -> None:
    """The only test that compiles all of the CPU part, from what the sdist holds."""
    source = shutil.copytree(sdist, tmp_path / "source")
    # Optimising takes five sixths of the time.
    change(source / "CMakeLists.txt", "set(KERNEL_OPTIMISATION -O3)", "set(KERNEL_OPTIMISATION -O0)")
    wheel = built(source, tmp_path / "out", CXXFLAGS="-g1", SHELFKERN_NATIVE=1, SHELFKERN_CUDA=0)
    folder = unpacked(wheel, tmp_path / "in")
    library = folder / "shelfkern" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    info = {f"{NAME}.dist-info/{name}" for name in METADATA}
    assert files_in(folder) == package_files() | info | {library.relative_to(folder).as_posix()}
    assert "Root-Is-Purelib: false" in (folder / f"{NAME}.dist-info" / "WHEEL").read_text()
    assert library.stat().st_size < 20e6 and b".debug_info" not in library.read_bytes()
    dynamic = dynamic_section(library)
    assert not {"RPATH", "RUNPATH"} & dynamic.keys()
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert {name.split(".so")[0] for name in dynamic["NEEDED"]} <= system
    origin, why_not = run_python(folder, ACCELERATE.format(backend="native")).splitlines()
    assert Path(origin).parent == library.parent and why_not == "None"
