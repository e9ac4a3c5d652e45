"""Generates the README's table of ops from benchmarks/results, between its markers."""

from __future__ import annotations

import sys
from pathlib import Path

from pairs import Pair, Row, pairs_by_dtype, speed_up

sys.path.append(str(Path(__file__).parents[1]))
from table import RESULTS, ROOT, line, measured_by, read, replaced, titled

from shelfkern.files import replacing

FILE, README, MARK = "ops_cpu.jsonl", ROOT / "README.md", "ops"


def table(rows: list[Row]) -> list[str]:
    """One line per op: the speed-up over the fastest peer in each dtype."""
    by_dtype = pairs_by_dtype(rows)
    ops = sorted({op for found in by_dtype.values() for op in found})
    lines = titled("op", *by_dtype)
    for op in ops:
        lines.append(line(f"`{op}`", *(_cell(found.get(op, [])) for found in by_dtype.values())))
    machine = f"{rows[-1]['cpu']}, {rows[-1]['isa']}, {rows[-1]['threads']} threads"
    return [*lines, "", measured_by(rows, machine)]


def _cell(of_one_op: list[Pair]) -> str:
    """The mean, and for several problems the smallest and the largest."""
    if not of_one_op:
        return ""
    ratios = sorted(ours["to_fastest_peer"] for ours, _ in of_one_op)
    mean = f"**{speed_up(of_one_op):.2f}x**"
    return mean if len(ratios) == 1 else f"{mean} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    """Rewrites the text between the markers."""
    page = replaced(README.read_text(), "\n".join(table(read(RESULTS / FILE))), MARK)
    with replacing(README) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
