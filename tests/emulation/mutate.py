"""Proves the tests of the CUDA kernels: takes out one barrier, wait or mask after another and runs them.

    python tests/emulation/mutate.py                  every kernel
    python tests/emulation/mutate.py shared_block     one
    python tests/emulation/mutate.py --list stem      what would be taken out

Builds the emulator with each fault, in a directory of its own, and runs the op's emulated tests on it.
Exit status 1 if a fault goes unseen that is not in EQUIVALENT.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pybind11
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
TEST_SECONDS = 300

# Faults that change no result, by op and line: why the code is there.
EQUIVALENT = {
    "stem: if ([-half > 0-]{ true }) barrier();": "it saves a barrier",
    "stem: in[i] = [-me.row + down < kPatchRows -]{ true }&& y + down >= 0"
    " && y + down < args.height && at >= 0 &&": "it saves loads",
    "upsample_argmax: if ([-args.whole_quads-]{ false }) return args.labels.store_pack(to, labels);": (
        "it stores four labels at once"
    ),
    "upsample_argmax: if (label == kMixed &&[- x[kQuad - 1].next - x[0].first < kColumns-]{ true }) {": (
        "coordinates might be rounded across a column; no size up to 6000 was found where they are"
    ),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change of a file: text[start:end] becomes `replacement`."""

    op: str
    line: int
    source: str
    start: int
    end: int
    replacement: str

    @property
    def removed(self) -> str:
        """The line that changes, with what leaves it in brackets."""
        first = self.source.rfind("\n", 0, self.start) + 1
        last = self.source.find("\n", self.end)
        marked = f"{self.source[first : self.start]}[-{self.source[self.start : self.end]}-]"
        marked += f"{{{self.replacement}}}" if self.replacement else ""
        return " ".join((marked + self.source[self.end : last]).split())

    def mutated(self) -> str:
        """The file with the fault."""
        return self.source[: self.start] + self.replacement + self.source[self.end :]


def closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    pairs = {"(": ")", "{": "}"}
    depth = 0
    for i in range(start, len(text)):
        if text[i] == text[start]:
            depth += 1
        elif text[i] == pairs[text[start]]:
            depth -= 1
            if depth == 0:
                return i + 1
    raise ValueError(f"no bracket closes the one at {start}")


def device_code(text: str) -> Iterator[tuple[int, int]]:
    """Where the bodies of functions that run on the GPU begin and end."""
    for match in re.finditer(r"^\s*(DEVICE|KERNEL)\b", text, re.MULTILINE):
        parameters = text.index("(", match.end())
        if match.group(1) == "KERNEL":
            parameters = text.index("(", closing(text, parameters))
        body = text.find("{", closing(text, parameters))
        yield body, closing(text, body)


ORDERING = re.compile(
    r"(?:if constexpr \([^()]*\) )?"
    r"\b(?:barrier|warp_barrier|wait_for_previous|cp_async_commit|cp_async_wait<[^;]*>)\(\);"
)
GUARD = re.compile(r"\b(?:if|while) \(")
# What a function gives, or a variable holds: checks joined by and; or one check by name.
CONJUNCTION = re.compile(r"\b(?:return|[\w\[\]]+ =) ([^;?{}]*&&[^;?{}]*);")
FLAG = re.compile(r"\bconst bool \w+ = ([^;?&]*);")


def split_terms(text: str, start: int, end: int, *separators: str) -> list[tuple[int, int]]:
    """Where the parts of text[start:end] between separators lie, those in brackets not counted."""
    terms, depth, first = [], 0, start
    for i in range(start, end):
        depth += (text[i] in "({") - (text[i] in ")}")
        separator = next((s for s in separators if text.startswith(s, i)), None)
        if depth == 0 and separator:
            terms.append((first, i))
            first = i + len(separator)
    return [*terms, (first, end)]


def neutral(text: str, start: int, end: int, first: int, last: int) -> str:
    """What a term of a condition becomes when its check is taken out: true in &&, false in ||."""
    around = text[max(start, first - 3) : first] + text[last : min(end, last + 3)]
    return "false" if "||" in around else "true"


def condition_faults(text: str, start: int, end: int, leaves: bool) -> Iterator[tuple[int, int, str]]:
    """Takes out each term of a condition; `leaves`: where it holds, the work is skipped."""
    terms = split_terms(text, start, end, "&&", "||")
    for first, last in terms:
        if len(terms) == 1:
            replacement = "false" if leaves else "true"
        else:
            replacement = neutral(text, start, end, first, last)
        yield first, last, f" {replacement} "


def faults_of(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """Every barrier, wait and mask in text[start:end]: where it is and what comes in its place."""
    for match in ORDERING.finditer(text, start, end):
        yield *match.span(), ";"
    for match in GUARD.finditer(text, start, end):
        opening = match.end() - 1
        after = closing(text, opening)
        rest = text[after : after + 12].split("(")[0].strip()
        leaves = rest.startswith(("return", "continue", "break"))
        yield from condition_faults(text, opening + 1, after - 1, leaves)
    for match in re.finditer(r"(?<![\w.])min\(", text[start:end]):
        # A clamp: its first operand alone.
        opening = start + match.end() - 1
        after = closing(text, opening)
        comma = split_terms(text, opening + 1, after - 1, ",")[0][1]
        yield start + match.start(), after, f"({text[opening + 1 : comma]})"
    for pattern in (CONJUNCTION, FLAG):
        for match in pattern.finditer(text, start, end):
            yield from condition_faults(text, *match.span(1), False)
    for match in re.finditer(r"(?<=[=(,])( ?[^=,(){};?]+|!?[\w.]+\([^()]*\)) \?(?= )", text[start:end]):
        yield start + match.start(1), start + match.end(1), "true"
    for match in re.finditer(r"cp_async_16\(", text[start:end]):
        opening = start + match.end() - 1
        after = closing(text, opening)
        comma = text.rindex(",", opening, after)
        if text[comma + 1 : after - 1].strip() != "true":
            yield from condition_faults(text, comma + 1, after - 1, False)


def faults(op: str, source: str) -> list[Fault]:
    """Every fault of an op's source."""
    found = []
    for start, end in device_code(source):
        for first, last, replacement in faults_of(source, start, end):
            if "constexpr" in source[source.rfind("\n", 0, first) : first] and replacement != ";":
                continue  # chosen when compiled: no check of the data
            line = source.count("\n", 0, first) + 1
            found.append(Fault(op, line, source, first, last, replacement))
    unique = {(f.start, f.end): f for f in found}
    return sorted(unique.values(), key=lambda f: f.start)


class Bench:
    """A copy of the C++ sources and of the package, where faults are built and tested."""

    def __init__(self, home: Path) -> None:
        self.source, self.build, self.package = home / "source", home / "build", home / "shelfkern"
        shutil.copytree(ROOT / "csrc", self.source / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", self.source)
        shutil.copytree(ROOT / "shelfkern", self.package, ignore=shutil.ignore_patterns("__pycache__"))
        configure = [
            "cmake", "-S", str(self.source), "-B", str(self.build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DSHELFKERN_EMULATION=ON",
        ]  # fmt: skip
        subprocess.run(configure, check=True, capture_output=True)

    def path(self, op: str) -> Path:
        """The op's file here."""
        return self.source / "csrc" / "cuda" / f"{op}.cu"

    def compiles(self) -> bool:
        """Builds the emulator into the package; False if the compiler refuses."""
        done = subprocess.run(["ninja", "-C", str(self.build), "_emulation"], capture_output=True)
        if done.returncode == 0:
            module = next(self.build.rglob("_emulation*.so"))
            shutil.copy(module, self.package / module.name)
        return done.returncode == 0

    def passes(self, op: str) -> bool:
        """Whether the op's tests on the emulator see nothing."""
        tests = ROOT / "tests" / "ops" / f"test_{op}.py"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
        environment = {**os.environ, "PYTHONPATH": str(self.package.parent)}
        try:
            done = subprocess.run(
                [*command, "-k", "emulated or cuda"],
                cwd=self.package.parent, env=environment, capture_output=True, timeout=TEST_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        if done.returncode == 5:
            raise click.ClickException(f"{op} has no tests on the emulator")
        return done.returncode == 0

    def judge(self, fault: Fault) -> str:
        """ "seen", "unseen", or "does not compile"."""
        path = self.path(fault.op)
        path.write_text(fault.mutated())
        try:
            if not self.compiles():
                return "does not compile"
            return "unseen" if self.passes(fault.op) else "seen"
        finally:
            path.write_text(fault.source)


def run(ops: list[str], console: Console) -> list[Fault]:
    """Tries every fault of the ops; gives those that no test saw."""
    unseen = []
    with tempfile.TemporaryDirectory() as home, Progress(console=console) as progress:
        bench = Bench(Path(home))
        for op in ops:
            if not bench.compiles() or not bench.passes(op):
                raise click.ClickException(f"{op}'s tests do not pass as it is")
            for fault in progress.track(faults(op, bench.path(op).read_text()), description=op):
                verdict = bench.judge(fault)
                excuse = EQUIVALENT.get(f"{op}: {fault.removed}")
                # A fault that does not compile tests nothing.
                if verdict != "seen" and excuse is None:
                    unseen.append(fault)
                note = f" ({excuse})" if verdict == "unseen" and excuse else ""
                console.print(f"{verdict}{note}: {op}.cu:{fault.line}: {fault.removed}", markup=False)
    return unseen


@click.command()
@click.argument("ops", nargs=-1)
@click.option("--list", "only_list", is_flag=True, help="Say what would be taken out.")
def main(ops: tuple[str, ...], only_list: bool) -> None:
    """Takes out one barrier, wait or mask after another and runs the emulated tests."""
    chosen = list(ops) or sorted(path.stem for path in KERNELS.glob("*.cu"))
    console = Console(soft_wrap=True)
    if only_list:
        for op in chosen:
            for fault in faults(op, (KERNELS / f"{op}.cu").read_text()):
                console.print(f"{op}.cu:{fault.line}: {fault.removed}", markup=False)
        return
    unseen = run(chosen, console)
    if unseen:
        raise click.ClickException(f"{len(unseen)} faults went unseen")


if __name__ == "__main__":
    main()
