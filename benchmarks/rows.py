"""Rows of whole networks' results: their fields, their file, and the printed table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from cases import Case
from clocks import Ceilings
from measure import Times
from peers import Peer
from rich.table import Table
from shapes import plan_of

from shelfkern.files import replacing
from shelfkern.timing import Timing, median_ratio

Row = dict[str, Any]
# Bytes per full-size label.
LABEL_BYTES = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of one variant of a case.

    Attributes:
        reason: why it has no times, None if it has.
        error: error of its result; None if there is no result.
        limit: limit of the error.
        prepared: seconds until its first result.
        memory: as from `measure.Footprint`.
        launches: kernels launched by a call, if counted.
        times: times of its calls.
        flop: FLOP of its algorithms; None for direct convolutions.
    """

    reason: str | None = None
    error: float | None = None
    limit: float | None = None
    prepared: float | None = None
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    launches: int | None = None
    times: Times | None = None
    flop: int | None = None


def about_case(case: Case) -> Row:
    """The fields that identify a case."""
    return {
        "model": case.model,
        "size": list(case.size),
        "batch": case.batch,
        "dtype": case.dtype,
        "output": case.output,
        "input": "uint8" if case.raw else "float",
        "on": case.device,
    } | ({} if case.threads is None else {"threads": case.threads})


def case_of(row: Row) -> Case:
    """The case of a row."""
    labels = row["output"] == "labels"
    threads = row.get("threads") if row["on"] == "cpu" else None
    return Case(row["model"], tuple(row["size"]), row["batch"], row["dtype"], labels, row["on"], threads)


def skipped(case: Case, reason: str) -> Row:
    """The row of a case that was not measured."""
    return about_case(case) | {"variant": None, "ours": False, "reason": reason}


def row(case: Case, peer: Peer, outcome: Outcome, ours: Times | None, ceilings: Ceilings) -> Row:
    """The row of one variant.

    ours: times of this library, to compare with.
    """
    found = about_case(case) | {"variant": peer.name, "ours": peer.ours, "reason": outcome.reason}
    found |= {"error": outcome.error, "limit": outcome.limit, "prepared_s": _round(outcome.prepared)}
    if outcome.times is None:
        return found
    times = outcome.times
    found |= _figures(case, times.call, ceilings) | outcome.memory
    found |= _actual(case, times.call, outcome.flop or found["flop"], ceilings)
    found |= {"launches": outcome.launches, "wall_ms": _round(times.wall.median * 1e3)}
    found["wall_p99_ms"] = _round(times.wall.quantile(0.99) * 1e3)
    found["wall_images_per_s"] = _round(case.batch / times.wall.median)
    found["ours_times_faster"] = _round(median_ratio(times.call, ours.call)) if ours else None
    found["ours_times_faster_wall"] = _round(median_ratio(times.wall, ours.wall)) if ours else None
    return found


def _figures(case: Case, timing: Timing, ceilings: Ceilings) -> Row:
    flop, nbytes = floor_of(case)
    kind = ceilings.arithmetic(case.torch_dtype)
    floor = ceilings.seconds(flop, nbytes, case.torch_dtype)
    return {
        "median_ms": _round(timing.median * 1e3),
        "p10_ms": _round(timing.quantile(0.1) * 1e3),
        "p90_ms": _round(timing.quantile(0.9) * 1e3),
        "p99_ms": _round(timing.quantile(0.99) * 1e3),
        "rounds": len(timing.seconds),
        "images_per_s": _round(case.batch / timing.median),
        "gflop_per_s": _round(flop / timing.median / 1e9),
        "flop": flop,
        "bytes": nbytes,
        "floor_ms": _round(floor * 1e3),
        "fraction": _round(floor / timing.median),
        "copy_gb_per_s": _round(ceilings.bytes_per_s / 1e9),
        "product_tflop_per_s": _round(ceilings.flop_per_s[kind] / 1e12),
        "product": kind,
    }


def _actual(case: Case, timing: Timing, flop: int, ceilings: Ceilings) -> Row:
    """FLOP that the algorithms actually perform on a CPU, and the fraction of the machine's peak."""
    if case.device != "cpu":
        return {}
    rate = flop / timing.median
    peak = ceilings.flop_per_s[ceilings.arithmetic(case.torch_dtype)]
    return {
        "actual_flop": flop,
        "actual_gflop_per_s": _round(rate / 1e9),
        "peak_gflop_per_s": _round(peak / 1e9),
        "of_peak": _round(rate / peak),
    }


def with_fastest_peer(rows: list[Row]) -> list[Row]:
    """A case's rows; ours also name the fastest peer, and its time over ours by rounds."""
    others = [row for row in rows if not row["ours"] and row.get("ours_times_faster") is not None]
    if not others:
        return rows
    fastest = min(others, key=lambda row: row["ours_times_faster"])
    facts = {"fastest_peer": fastest["variant"], "to_fastest_peer": fastest["ours_times_faster"]}
    first = next(row for row in rows if row["ours"])
    return [row | facts if row is first else row for row in rows]


def floor_of(case: Case) -> tuple[int, int]:
    """A case's arithmetic (FLOP of its convolutions) and minimum traffic (bytes).

    The minimum traffic reads images and weights once and writes the result: intermediates may stay on the
    chip. Sizes are those that the backbone sees.
    """
    plan = plan_of(case.model)
    height, width = case.size
    itemsize = case.float_dtype.itemsize
    pixels = case.batch * height * width
    weights = sum(tensor.numel() for step in plan.steps for tensor in step.weights())
    read = 3 * pixels * (1 if case.raw else itemsize) + weights * case.torch_dtype.itemsize
    written = pixels * (LABEL_BYTES if case.labels else plan.num_classes * itemsize)
    return 2 * plan.macs(case.batch, *plan.extents.seen(*case.size)), read + written


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


class ResultsFile:
    """JSON lines, rewritten with every addition, so that an interrupted run keeps its results.

    Args:
        path: path of the file, replaced at the first addition.
        about: fields about the run, added to every row.
        keep: whether existing rows are kept instead.
    """

    def __init__(self, path: Path, about: Row, keep: bool = False) -> None:
        self.path, self._about = path, about
        self.rows = read(path) if keep and path.exists() else []

    def add(self, rows: list[Row]) -> None:
        """Adds rows and writes the file."""
        # A row has its own number of threads, which takes precedence.
        self.rows += [self._about | row for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def table(rows: list[Row]) -> Table:
    """A table of the rows, for printing."""
    found = Table(
        "case", "variant", "ms (p10-p90)", "wall ms", "images/s", "limit", "launches", "MiB", "ours"
    )
    found.add_column("error")
    for row in rows:
        found.add_row(*_cells(row))
    return found


def _cells(row: Row) -> list[str]:
    case = str(case_of(row))
    if row["reason"] is not None:
        return [case, row["variant"] or "", row["reason"]]
    ratio, launches = (row.get(key) for key in ("ours_times_faster", "launches"))
    memory = row.get("reserved_mib", row.get("memory_net_mib"))
    return [
        case, row["variant"], f"{row['median_ms']:g} ({row['p10_ms']:g}-{row['p90_ms']:g})",
        f"{row['wall_ms']:g}", f"{row['images_per_s']:g}", f"{row.get('of_peak', row['fraction']):.0%}",
        "" if launches is None else str(launches), "" if memory is None else f"{memory:g}",
        "" if ratio is None else f"{ratio:.2f}x", f"{row['error']:.1e}",
    ]  # fmt: skip
