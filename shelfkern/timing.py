"""Timing variants of one computation side by side, and describing the environment."""

from __future__ import annotations

import dataclasses
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from . import native
from .version import __version__


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, seconds."""
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile (0 to 1), seconds, interpolated between the nearest rounds."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    ahead: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times every variant once per round, in a rotating order, so that disturbances affect all alike.

    Args:
        variants: callables by name; each must have finished its work when it returns.
        rounds: timed rounds, at least 1.
        warmup: untimed rounds before them.
        clock: returns the time in seconds.
        ahead: called before every call, not timed.

    Raises:
        ValueError: rounds is less than 1, or there are no variants.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, it must be at least 1")
    if not variants:
        raise ValueError("variants is empty, it must hold at least one")
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if ahead is not None:
                ahead()
            begin = clock()
            variants[name]()
            elapsed = clock() - begin
            if index >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def median_ratio(slow: Timing, fast: Timing) -> float:
    """Speedup of `fast` over `slow`: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def environment() -> dict[str, object]:
    """Machine and versions, to be stated with results."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": native.module.isa() if native.module else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shelfkern": __version__,
        "commit": git_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command() -> str:
    """The command line of this process, as typed."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def cpu_name() -> str:
    """The CPU's model name, where the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the source tree this package runs from, with a + if modified; None outside one."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=10,
        )
        if tracked.returncode:
            return None
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
