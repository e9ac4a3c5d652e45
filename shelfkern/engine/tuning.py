"""Choosing among implementations of one computation by timing them, and caching the measurements.

A problem has a key and candidates. A cached result is used if there is one; otherwise the candidates with the
lowest predicted times are timed side by side, including the best of each library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import native
from ..files import replacing
from ..timing import cpu_name, time_interleaved
from ..version import __version__
from .gpu.device import empty_bytes, gpu_of, runtime_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # of the cache files
TABLES = Path(__file__).parent / "tables"
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Times within this factor are equal.
TIE = 1.01
# Seconds that a save waits for another process to finish its own.
LOCK_SECONDS = 10.0
# Timed rounds, and total seconds per candidate.
MIN_ROUNDS, MAX_ROUNDS = 5, 50
GPU_SECONDS, CPU_SECONDS = 0.02, 0.1
# Calls per graph, and the most seconds that they may take together.
GRAPH_CALLS, GRAPH_SECONDS = 10, 2e-3
# Multiple of the L2 size written before a cold call: evicts everything, and gives the host time to launch.
FLUSH = 4
# Size of the CPU's caches: assumed where the system does not report it, and the most written before each
# call.
LIKELY_CACHE, MOST_CACHE = 32 << 20, 64 << 20
# Length to which error messages are cut.
REASON_LENGTH = 300

log = logging.getLogger(__name__)

# Concurrent timing in two threads would give wrong results.
_TIMING = threading.RLock()

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to solve a problem.

    Attributes:
        name: unique among the problem's candidates; the part before the first space is its family, such as
            "triton" or "cudnn".
        microseconds: predicted time.
        prepare: packs, compiles and allocates; returns the call to time. Raises where it cannot run.
    """

    name: str
    microseconds: float
    prepare: Callable[[], Call]

    @property
    def family(self) -> str:
        """The library or language of the kernel."""
        return self.name.partition(" ")[0]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Result of timing a problem's candidates: the name of the winner, and microseconds of each by name."""

    winner: str
    microseconds: Mapping[str, float]


class Clock(Protocol):
    """Measures the time of calls."""

    def measure(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        """Median seconds of each call, timed in turn; if cold, with none of its data in the caches."""


def environment_of(device: torch.device) -> dict[str, str]:
    """The device and the software for which a measurement is valid.

    Raises:
        ValueError: the device is neither a CUDA GPU nor the CPU.
    """
    versions = {"torch": torch.__version__, "shelfkern": __version__}
    if device.type == "cpu":
        isa = native.module.isa() if native.module else "none"
        return {"device": cpu_name(), "isa": isa, "threads": str(torch.get_num_threads()), **versions}
    if device.type != "cuda":
        raise ValueError(f"device is {device}, it may be cuda or cpu")
    gpu = gpu_of(device)
    return {
        "device": gpu.name,
        "capability": "{}.{}".format(*gpu.capability),
        "multiprocessors": str(gpu.multiprocessors),
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _triton(),
        **versions,
    }


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\d+(\.\d+)+", text)
    return found[0] if found else "unknown"


def _triton() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "none"


def default_path(environment: Mapping[str, str]) -> Path | None:
    """Path of an environment's measurements; None where there is no home folder.

    The folder is $SHELFKERN_CACHE, $XDG_CACHE_HOME/shelfkern or ~/.cache/shelfkern: the first that is set.
    """
    name = f"tuning-{_digest(environment)[:8]}.json"
    own = os.environ.get("SHELFKERN_CACHE")
    if own:
        return Path(os.path.expanduser(own)).absolute() / name  # noqa: PTH111, Path's raises without a home
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if Path(caches).is_absolute():
        return Path(caches) / "shelfkern" / name
    home = os.path.expanduser("~")  # noqa: PTH111
    return Path(home) / ".cache" / "shelfkern" / name if Path(home).is_absolute() else None


def shipped_path(environment: Mapping[str, str]) -> Path:
    """Path of the table bundled for a device; it may not exist.

    To make one, tune on such a device, as benchmarks/gpu.sh does, and copy the cache file here unchanged. It
    is used with every software version in which its winners still exist.
    """
    return TABLES / f"{re.sub('[^a-z0-9]+', '-', environment['device'].lower()).strip('-')}.json"


def _digest(value: object) -> str:
    """SHA-256 of a value's JSON, in hexadecimal."""
    if isinstance(value, Mapping):
        value = dict(value)
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class TuneCache:
    """Measurements on one device with one set of software, stored in a file.

    A file that is damaged, or of another format or environment, is ignored with a log line, and replaced by
    the next save. File errors are never raised. Safe for threads and processes.

    Args:
        path: path of the file, created with its folders at the first save; None keeps everything in memory.
        environment: environment in which the measurements are valid, as from `environment_of`.
        shipped: table to use for problems missing from the file. Only the device in its environment must
            match.
    """

    def __init__(
        self, path: Path | None, environment: Mapping[str, str], shipped: Path | None = None
    ) -> None:
        self.path = path
        self.environment = dict(environment)
        self._lock = threading.RLock()
        self._told: set[str] = set()
        self._unsaved: dict[str, Measured] = {}
        self._shipped = {} if shipped is None else self._read(shipped, ["device"])
        self._entries = {} if path is None else self._read(path)

    def get(self, key: str, names: Collection[str] | None = None) -> Measured | None:
        """The result for a problem; None if there is none, or if its winner is not in `names`, if given."""
        with self._lock:
            for entries in (self._entries, self._shipped):
                measured = entries.get(key)
                if measured is not None and (names is None or measured.winner in names):
                    return measured
        return None

    def put(self, key: str, measured: Measured) -> None:
        """Stores a result, in memory only until `save`."""
        with self._lock:
            self._entries[key] = self._unsaved[key] = measured

    def save(self) -> None:
        """Writes new results to the file, merged with what other processes have saved meanwhile."""
        with self._lock:
            if self.path is None or not self._unsaved:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path.with_name(f"{self.path.name}.lock")):
                    self._entries = {**self._entries, **self._read(self.path), **self._unsaved}
                    self._write(self.path)
            except OSError as error:
                self._tell(f"{self.path} cannot be written, so measurements will be repeated: {error}")
            else:
                self._unsaved = {}

    def _write(self, path: Path) -> None:
        entries = {key: dataclasses.asdict(measured) for key, measured in self._entries.items()}
        document = {
            "format": FORMAT,
            "environment": self.environment,
            "entries": entries,
            "checksum": _digest(entries),
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _read(self, path: Path, matching: Collection[str] | None = None) -> dict[str, Measured]:
        """A file's entries, none if invalid; matching: environment keys that must match, None for all."""
        try:
            document = json.loads(path.read_bytes())
            return _entries(document, self.environment, matching)
        except FileNotFoundError:
            return {}
        except json.JSONDecodeError as error:
            self._tell(f"{path} is ignored: it is not JSON: {error}")
        except (OSError, ValueError, RecursionError, OverflowError) as error:
            self._tell(f"{path} is ignored: {error}")
        return {}

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("tuning: %s", message)


def _entries(
    document: Any, environment: Mapping[str, str], matching: Collection[str] | None
) -> dict[str, Measured]:
    """The entries of a file's document.

    Raises:
        ValueError: the document is not valid.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    theirs = document.get("environment")
    if not isinstance(theirs, dict):
        raise ValueError("it has no environment")
    keys = environment.keys() | theirs.keys() if matching is None else matching
    for key in sorted(keys):
        if theirs.get(key) != environment.get(key):
            raise ValueError(f"its {key} is {theirs.get(key)!r}, here it is {environment.get(key)!r}")
    entries = document.get("entries")
    if not isinstance(entries, dict) or document.get("checksum") != _digest(entries):
        raise ValueError("its checksum is wrong")
    return {key: _measured(key, entry) for key, entry in entries.items()}


def _measured(key: str, entry: Any) -> Measured:
    if not isinstance(entry, dict):
        raise ValueError(f"its entry {key!r} makes no sense")
    winner, times = entry.get("winner"), entry.get("microseconds")
    if not isinstance(times, dict) or not isinstance(winner, str) or winner not in times:
        raise ValueError(f"its entry {key!r} makes no sense")
    # In Python, bool is a subclass of int.
    if not all(type(t) in (int, float) and math.isfinite(t) and t >= 0 for t in times.values()):
        raise ValueError(f"its entry {key!r} has times that make no sense")
    return Measured(winner, times)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks out other processes where the system can; waits a limited time, as the owner may be stopped."""
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
            except OSError:  # a file system without locks
                break
        yield


def _stored(key: str, cold: bool) -> str:
    """Key under which a problem's results are stored."""
    return f"{key} cold" if cold else key


class Tuner:
    """Chooses among candidates.

    Attributes:
        spent: seconds of preparing and timing so far.

    Args:
        cache: cached results.
        clock: times candidates; None disables timing.
        candidates: how many are timed: those with the best predictions, and in addition the best of each
            family not among them, so that a wrong cost model cannot exclude a library.
        seconds: limit for preparing and timing in total. After that predictions decide; a problem that has
            been started is finished.
        tie: times that differ by less than this factor are equal, and the prediction decides.

    Raises:
        ValueError: `candidates` is less than 1.
    """

    def __init__(
        self,
        cache: TuneCache,
        clock: Clock | None,
        candidates: int = 4,
        seconds: float = 60.0,
        tie: float = TIE,
    ) -> None:
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}, it must be at least 1")
        self.cache = cache
        self.clock = clock
        self.candidates = candidates
        self.seconds = seconds
        self.tie = tie
        self.spent = 0.0
        self._told: set[str] = set()

    def choose(self, key: str, candidates: Sequence[Candidate], cold: bool = False) -> str:
        """The name of the candidate to use.

        A cached result decides; otherwise timing, if there is a clock and time left; otherwise the lowest
        prediction.

        Args:
            key: name of the problem, the same in every process.
            candidates: at least one.
            cold: whether they are timed with cold caches. Such results are stored separately.

        Raises:
            ValueError: there are no candidates, or two have the same name.
            RuntimeError: candidates were to be timed and none can run.
        """
        names = {candidate.name for candidate in candidates}
        if not names or len(names) < len(candidates):
            given = [candidate.name for candidate in candidates]
            raise ValueError(
                f"candidates of {key} are {given}, it must be at least one, each of another name"
            )
        key = _stored(key, cold)
        ordered = sorted(candidates, key=lambda candidate: candidate.microseconds)
        return self._known(key, names) or self._timed(key, ordered, cold) or ordered[0].name

    def measured(self, key: str, cold: bool = False) -> Mapping[str, float]:
        """Microseconds by name of a problem's timed candidates; empty if none were timed."""
        found = self.cache.get(_stored(key, cold))
        return {} if found is None else found.microseconds

    def expected(self, key: str, candidates: Sequence[Candidate], cold: bool = False) -> list[Candidate]:
        """The candidates that `choose` with the same arguments would run or return, for compiling ahead."""
        ordered = sorted(candidates, key=lambda candidate: candidate.microseconds)
        known = self._known(_stored(key, cold), {candidate.name for candidate in candidates})
        if known is not None:
            return [candidate for candidate in candidates if candidate.name == known]
        timed = self.clock is not None and self.spent < self.seconds
        return self._picked(ordered) if timed else ordered[:1]

    def _known(self, key: str, names: Collection[str]) -> str | None:
        measured = self.cache.get(key, names)
        return None if measured is None else measured.winner

    def _timed(self, key: str, ordered: Sequence[Candidate], cold: bool) -> str | None:
        """The name of the fastest; None if nothing is to be timed."""
        if self.clock is None:
            return None
        with _TIMING:
            # Another thread may have timed it while this one waited.
            known = self._known(key, {candidate.name for candidate in ordered})
            if known is not None:
                return known
            if self.spent >= self.seconds:
                self._tell(f"its {self.seconds:g} s are spent, predictions choose from here")
                return None
            begin = time.perf_counter()
            try:
                measured = self._measure(key, ordered, self.clock, cold)
            finally:
                self.spent += time.perf_counter() - begin
            self.cache.put(key, measured)
            self.cache.save()
            return measured.winner

    def _measure(self, key: str, ordered: Sequence[Candidate], clock: Clock, cold: bool) -> Measured:
        failures: dict[str, str] = {}
        calls = self._prepared(key, ordered, failures)
        seconds = self._seconds(key, calls, clock, cold, failures)
        if not seconds:
            name, reason = next(iter(failures.items()))
            raise RuntimeError(f"none of {len(ordered)} candidates of {key} can run; {name}: {reason}")
        limit = self.tie * min(seconds.values())
        winner = next(c.name for c in ordered if seconds.get(c.name, math.inf) <= limit)
        log.debug("tuning: %s: %s, %.2f us", key, winner, 1e6 * seconds[winner])
        return Measured(winner, {name: round(1e6 * value, 3) for name, value in seconds.items()})

    def _prepared(self, key: str, ordered: Sequence[Candidate], failures: dict[str, str]) -> dict[str, Call]:
        """Calls of the candidates to time, each of which has run once."""
        picked = self._picked(ordered)
        others = [candidate for candidate in ordered if candidate not in picked]
        calls: dict[str, Call] = {}
        for candidate in [*picked, *others]:
            # The remaining candidates are used only if all that were picked fail.
            if calls and candidate in others:
                break
            try:
                call = candidate.prepare()
                call()
            except Exception as error:
                self._drop(key, candidate.name, error, failures)
            else:
                calls[candidate.name] = call
        return calls

    def _picked(self, ordered: Sequence[Candidate]) -> list[Candidate]:
        picked = list(ordered[: self.candidates])
        families = {candidate.family for candidate in picked}
        for candidate in ordered[self.candidates :]:
            if candidate.family not in families:
                families.add(candidate.family)
                picked.append(candidate)
        return picked

    def _seconds(
        self, key: str, calls: Mapping[str, Call], clock: Clock, cold: bool, failures: dict[str, str]
    ) -> dict[str, float]:
        """Seconds of each call, without those that fail after their first run."""
        if not calls:
            return {}
        try:
            return clock.measure(calls, cold)
        except Exception as error:
            if len(calls) == 1:
                self._drop(key, next(iter(calls)), error, failures)
                return {}
        # It is not known which one failed: time each alone.
        alone = [self._seconds(key, {name: call}, clock, cold, failures) for name, call in calls.items()]
        return {name: value for seconds in alone for name, value in seconds.items()}

    def _drop(self, key: str, name: str, error: Exception, failures: dict[str, str]) -> None:
        # Only the text: the exception would keep alive the tensors of its stack frames.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_LENGTH]
        failures[name] = reason
        self._tell(f"{name} is left out where it fails, as in {key}: {reason}", once=f"{name}: {reason}")

    def _tell(self, message: str, once: str | None = None) -> None:
        """Logs a message, unless it, or its `once` key, was logged before."""
        if (once or message) not in self._told:
            self._told.add(once or message)
            log.warning("tuning: %s", message)


def _rounds(seconds: float, one: float) -> int:
    """How many rounds of `one` seconds each fit."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(one, 1e-9))))


class CpuClock:
    """Times calls on the CPU. If cold, memory as large as the caches is written before each call."""

    def measure(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        """Median seconds of each call, timed in turn."""
        if not calls:
            return {}
        ahead = None
        if cold:
            # Writing zeros might bypass the caches; reading and writing goes through them.
            memory = torch.zeros(_cache_bytes() // 4)
            ahead = lambda: memory.add_(1)  # noqa: E731
        begin = time.perf_counter()
        time_interleaved(calls, rounds=1, warmup=1, ahead=ahead)
        one = (time.perf_counter() - begin) / 2
        timings = time_interleaved(calls, _rounds(len(calls) * CPU_SECONDS, one), warmup=0, ahead=ahead)
        return {name: timing.median for name, timing in timings.items()}


@functools.cache
def _cache_bytes() -> int:
    """Size of all cache levels that a core of this CPU sees, where the system reports it."""
    found = 0
    for folder in CACHES.glob("index*"):
        try:
            size = re.fullmatch(r"(\d+)K", (folder / "size").read_text().strip())
            kind = (folder / "type").read_text().strip()
        except OSError:
            continue
        found += int(size[1]) << 10 if size and kind != "Instruction" else 0
    return min(found, MOST_CACHE) or LIKELY_CACHE


@dataclasses.dataclass(frozen=True)
class _Repeated:
    """A call repeated `times` times, in a CUDA graph where it can be captured."""

    run: Call
    times: int


class GpuClock:
    """Times calls on a GPU between events, in CUDA graphs where they can be captured.

    Warm, a graph holds several calls, and runs once more before the timed run. Cold, it holds one, and memory
    of several times the L2 size is written before each run. Calls that cannot be captured run directly.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime = runtime_of(device)

    def measure(self, calls: Mapping[str, Call], cold: bool) -> dict[str, float]:
        """Median seconds of each call, timed in turn."""
        if not calls:
            return {}
        with torch.cuda.device(self.device):
            runs = {name: self._repeated(call, cold) for name, call in calls.items()}
            # Not kept: it would occupy memory for as long as the model lives.
            memory = empty_bytes(FLUSH * gpu_of(self.device).l2_bytes, self.device) if cold else None
            ahead = {name: memory.zero_ if memory is not None else runs[name].run for name in runs}
            names = list(runs)
            begin = time.perf_counter()
            self._round(runs, ahead, names)
            rounds = _rounds(len(names) * GPU_SECONDS, time.perf_counter() - begin)
            turns = [names[i % len(names) :] + names[: i % len(names)] for i in range(rounds)]
            seconds = [self._round(runs, ahead, turn) for turn in turns]
        return {name: statistics.median(each[name] for each in seconds) for name in names}

    def _round(
        self, runs: Mapping[str, _Repeated], ahead: Mapping[str, Call], names: Sequence[str]
    ) -> dict[str, float]:
        """Seconds of one call of each, in the order of `names`."""
        events = {}
        for name in names:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Keeps the device busy while the host launches what is timed.
            ahead[name]()
            begin.record()
            runs[name].run()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize(self.device)
        return {
            name: begin.elapsed_time(end) / 1e3 / runs[name].times for name, (begin, end) in events.items()
        }

    def _repeated(self, call: Call, cold: bool) -> _Repeated:
        times = 1 if cold else self._times(call)

        def run() -> None:
            for _ in range(times):
                call()

        try:
            # A capture that fails leaves its own stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)):
                return _Repeated(self._runtime.capture(run).replay, times)
        except Exception:  # whatever it calls may have its own
            torch.cuda.synchronize(self.device)
            return _Repeated(run, times)

    def _times(self, call: Call) -> int:
        """How many calls a graph holds: fewer of long ones."""
        call()
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        one = time.perf_counter() - begin
        return max(1, min(GRAPH_CALLS, int(GRAPH_SECONDS / max(one, 1e-9))))
