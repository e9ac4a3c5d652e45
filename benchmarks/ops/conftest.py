"""`pytest benchmarks/ops`: every op on every problem of the published models, compared with its peers.

`-m quick` takes a few problems per op. A variant whose result is wrong fails and is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clocks import Ceilings, Stopwatch, measure_ceilings
from harness import DTYPES, ContextLost, Op, Outcome, compare
from results import RESULTS, ResultsFile, about, device_name, rows, table
from shapes import Entry
from shapes import table as problems

# Exit status, handled by gpu.sh.
CONTEXT_LOST = 70


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ops")
    group.addoption("--device", choices=("cpu", "cuda"), help="Default: cuda where torch can use it.")
    group.addoption("--batch", type=int, default=1, help="Images. Default: %(default)s.")
    group.addoption("--seconds", type=float, default=1.0, help="Timing of a problem. Default: %(default)s.")
    group.addoption(
        "--budget", type=float, default=float("inf"), help="Seconds after which the rest is skipped."
    )
    group.addoption("--without", action="append", default=[], help="A variant to leave out; may be repeated.")
    group.addoption("--avoid", type=Path, help="File of kernels that broke the CUDA context; is added to.")
    group.addoption("--max-autotune", action="store_true", help="torch.compile at its best, and its slowest.")
    group.addoption("--results", type=Path, default=RESULTS, help="Folder of ops_<device>.jsonl.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: a few problems of each op")
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    op: Op = metafunc.module.OP
    cases = [
        pytest.param(
            (op, entry, dtype, variant),
            id=f"{entry.problem}-{str(dtype).removeprefix('torch.')}-{variant}",
            marks=[pytest.mark.quick] if entry.quick else [],
        )
        for entry in problems(metafunc.config.getoption("batch"))
        if entry.problem.op == op.name
        for dtype in DTYPES[session.device]
        for variant in session.variants(op)
    ]
    metafunc.parametrize("outcome", cases, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick problems and the device's first dtype come first, because the budget may end before the rest."""
    dtypes = DTYPES[config.stash[SESSION].device]

    def order(item: pytest.Item) -> tuple[bool, int]:
        _, entry, dtype, _ = item.callspec.params["outcome"]
        return not entry.quick, dtypes.index(dtype)

    items.sort(key=order)


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Iterator[Outcome]:
    """Outcome of one variant of one problem; the first request measures all variants, interleaved."""
    op, entry, dtype, variant = request.param
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{op.name} {entry.problem} {dtype}"
    return request.config.stash[SESSION].outcomes(op, entry, dtype)[variant]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.results.rows:
        terminalreporter.section(f"ops on {device_name(session.device)}")
        for line in [*table(session.results.rows), f"written to {session.results.path}"]:
            terminalreporter.write_line(line)


class Session:
    """One run: its device, peak rates and results."""

    def __init__(self, config: pytest.Config) -> None:
        options = config.option
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("device is cuda, but there is no GPU that torch can use")
        self.results = ResultsFile(options.results / f"ops_{device_name(self.device)}.jsonl")
        self._options = options
        self._deadline = time.monotonic() + options.budget
        self._stopwatch: Stopwatch | None = None
        self._ceilings: Ceilings | None = None
        self._last: tuple[object, dict[str, Outcome]] = (None, {})

    def variants(self, op: Op) -> list[str]:
        """Names of the variants to compare."""
        left_out = {*self._options.without, *self._avoided(op)}
        return [name for name in op.variants(self.device) if name not in left_out]

    def _avoided(self, op: Op) -> list[str]:
        path = self._options.avoid
        lines = path.read_text().splitlines() if path and path.exists() else []
        return [line.split(maxsplit=1)[1] for line in lines if line.split()[0] == op.name]

    def _exit_without_context(self, op: Op, variant: str) -> None:
        if self._options.avoid:
            with self._options.avoid.open("a") as file:
                file.write(f"{op.name} {variant}\n")
        pytest.exit(f"{op.name}: {variant} broke the CUDA context, nothing more can run", CONTEXT_LOST)

    def outcomes(self, op: Op, entry: Entry, dtype: torch.dtype) -> dict[str, Outcome]:
        """Outcomes of all variants of a problem, measured on first use."""
        key = (op.name, entry.problem, dtype)
        if self._last[0] != key:
            if time.monotonic() > self._deadline:
                pytest.skip(f"the budget of {self._options.budget:g} s is spent")
            self._last = (key, self._measure(op, entry, dtype))
        return self._last[1]

    def _measure(self, op: Op, entry: Entry, dtype: torch.dtype) -> dict[str, Outcome]:
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(self.device, self._options.seconds, self._options.max_autotune)
            self._ceilings = measure_ceilings(self._stopwatch, DTYPES[self.device])
            self._about = about(self.device)
        try:
            outcomes = compare(op, entry, dtype, self._stopwatch, self.variants(op))
        except ContextLost as lost:
            self._exit_without_context(op, str(lost))
        found = rows(op, entry, dtype, self.device, outcomes, self._ceilings)
        self.results.add([row | self._about for row in found])
        return outcomes


SESSION = pytest.StashKey[Session]()
