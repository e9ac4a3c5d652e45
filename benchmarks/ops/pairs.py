"""Pairs from a file of op results: ours beside the fastest peer, problem by problem."""

from __future__ import annotations

import collections
import statistics
from typing import Any

Row = dict[str, Any]
# The best of ours and the fastest of the others.
Pair = tuple[Row, Row]
# By op, a pair for each problem.
Pairs = dict[str, list[Pair]]


def pairs(rows: list[Row]) -> Pairs:
    """Rows by op, for problems that both have. Cold times where there are any."""
    cache = "cold" if any(row["cache"] == "cold" for row in rows) else "warm"
    problems: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        if row["cache"] == cache:
            problems[row["op"], row["shape"]].append(row)
    found: Pairs = collections.defaultdict(list)
    for (op, _), variants in sorted(problems.items()):
        ours, peers = ([row for row in variants if row["ours"] is mine] for mine in (True, False))
        if ours and peers:
            best, fastest = (min(group, key=lambda row: row["median_us"]) for group in (ours, peers))
            found[op].append((best, fastest))
    return found


def pairs_by_dtype(rows: list[Row]) -> dict[str, Pairs]:
    """`pairs` of each dtype that has any."""
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    found = {dtype: pairs([row for row in rows if row["dtype"] == dtype]) for dtype in dtypes}
    return {dtype: some for dtype, some in found.items() if some}


def speed_up(of_one_op: list[Pair]) -> float:
    """How many times faster ours is than the fastest peer: the geometric mean over problems."""
    return statistics.geometric_mean(ours["to_fastest_peer"] for ours, _ in of_one_op)
