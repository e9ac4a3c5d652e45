"""Rows of results: their fields, their file, and the printed table."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import torch
from clocks import Ceilings, Times
from harness import Op, Outcome
from shapes import Entry

from shelfkern.files import replacing
from shelfkern.timing import Timing, command, environment, median_ratio

RESULTS = Path(__file__).parent.parent / "results"
Row = dict[str, Any]


def device_name(device: str) -> str:
    """Device name used in file names: "cpu", "h200"."""
    if device == "cpu":
        return device
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    return re.sub(r"\W+", "_", name).strip("_").lower()


def about(device: str) -> Row:
    """Fields about the run, added to every row."""
    facts = environment() | {"command": command(), "device": device_name(device)}
    if device == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": importlib.metadata.version("triton"),
        }
    return facts


def rows(
    op: Op, entry: Entry, dtype: torch.dtype, device: str, outcomes: dict[str, Outcome], ceilings: Ceilings
) -> list[Row]:
    """A row for every timed variant, and on a GPU for each cache state."""
    found = []
    for cache in ("warm", "cold"):
        timings = {name: getattr(o.times, cache) for name, o in outcomes.items() if o.times}
        if None in timings.values():
            continue
        for name, timing in timings.items():
            outcome = outcomes[name]
            row = _case(op, entry, dtype) | {"variant": name, "ours": name in op.ours(device), "cache": cache}
            row |= _figures(entry, dtype, timing, ceilings) | {"error": outcome.error}
            row["graph_us"] = _microseconds(outcome.times, cache)
            row["to_fastest_peer"] = _to_fastest_peer(name, timings, op.ours(device))
            found.append(row)
    return found


def _case(op: Op, entry: Entry, dtype: torch.dtype) -> Row:
    problem = entry.problem
    return {
        "op": op.name,
        "shape": str(problem),
        "reads": problem.reads,
        "writes": problem.writes,
        "dtype": str(dtype).removeprefix("torch."),
        "flop": problem.flop,
        "bytes": problem.bytes(dtype),
        "uses": entry.uses,
    }


def _figures(entry: Entry, dtype: torch.dtype, timing: Timing, ceilings: Ceilings) -> Row:
    flop, nbytes, seconds = entry.problem.flop, entry.problem.bytes(dtype), timing.median
    return {
        "median_us": _round(seconds * 1e6),
        "p10_us": _round(timing.quantile(0.1) * 1e6),
        "p90_us": _round(timing.quantile(0.9) * 1e6),
        "rounds": len(timing.seconds),
        "gb_per_s": _round(nbytes / seconds / 1e9),
        "tflop_per_s": _round(flop / seconds / 1e12),
        "fraction": _round(ceilings.seconds(flop, nbytes, dtype) / seconds),
        "copy_gb_per_s": _round(ceilings.bytes_per_s / 1e9),
        "product_tflop_per_s": _round(ceilings.flop_per_s[ceilings.arithmetic(dtype)] / 1e12),
        "product": ceilings.arithmetic(dtype),
    }


def _microseconds(times: Times, cache: str) -> float | None:
    return _round(times.graph.median * 1e6) if times.graph and cache == "warm" else None


def _to_fastest_peer(name: str, timings: dict[str, Timing], ours: list[str]) -> float | None:
    """How many times faster one of ours is than the fastest of the others."""
    peers = [timing for peer, timing in timings.items() if peer not in ours]
    if name not in ours or not peers:
        return None
    return _round(median_ratio(min(peers, key=lambda timing: timing.median), timings[name]))


def _round(value: float) -> float:
    return float(f"{value:.4g}")


class ResultsFile:
    """JSON lines; a run replaces the rows of the ops that it measures and keeps the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        text = path.read_text() if path.exists() else ""
        self._before = [json.loads(line) for line in text.splitlines() if line]

    def add(self, rows: list[Row]) -> None:
        """Adds rows and writes the file, so that an interrupted run keeps its results."""
        self.rows += rows
        measured = {row["op"] for row in self.rows}
        kept = [row for row in self._before if row["op"] not in measured]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *self.rows]))


COLUMNS = ("op", "shape", "dtype", "variant", "cache", "us (p10-p90)", "graph us", "GB/s", "TFLOP/s")
COLUMNS += ("ceiling", "to peers", "error")


def table(rows: list[Row]) -> list[str]:
    """Lines of a table of rows."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cells(row: Row) -> tuple[str, ...]:
    ratio = row["to_fastest_peer"]
    return (
        row["op"], row["shape"], row["dtype"], row["variant"], row["cache"],
        f"{row['median_us']:g} ({row['p10_us']:g}-{row['p90_us']:g})",
        "" if row["graph_us"] is None else f"{row['graph_us']:g}",
        f"{row['gb_per_s']:g}", f"{row['tflop_per_s']:g}", f"{row['fraction']:.0%}",
        "" if ratio is None else f"{ratio:.2f}x", f"{row['error']:.1e}",
    )  # fmt: skip
