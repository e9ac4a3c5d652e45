"""Makes the README's table of results from benchmarks/results, between its two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models_cpu.jsonl"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

Row = dict[str, Any]
Case = tuple[str, str, str]


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def cases(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by case (model, size, output), and by variant within it."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        variant = "shelfkern" if row["variant"].startswith("shelfkern") else row["variant"]
        case = (row["model"], "x".join(map(str, row["size"])), row["output"])
        found.setdefault(case, {})[variant] = row
    return found


def markdown(rows: list[Row]) -> str:
    """A table with one line a case and one column a variant, and what it was measured on."""
    found = cases(rows)
    variants = list(dict.fromkeys(variant for case in found.values() for variant in case))
    lines = ["| model | size | output | " + " | ".join(variants) + " | to the fastest other |"]
    lines.append("|" + " --- |" * (len(variants) + 4))
    for case, by_variant in found.items():
        times = [f"{by_variant[v]['median_ms']:.0f} ms" if v in by_variant else "wrong" for v in variants]
        others = [row["ours_times_faster"] for v, row in by_variant.items() if v != "shelfkern"]
        lines.append("| " + " | ".join([*case, *times, f"**{min(others):.2f}x**"]) + " |")
    about = rows[0]
    machine = f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    versions = f"torch {about['torch']}, shelfkern {about['shelfkern']} at {about['commit']}"
    lines += [
        "",
        f"Medians, float32, batch 1; `{about['command']}`; {machine}; {versions}; {about['time'][:10]}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrites the part of README.md between the markers."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{markdown(read(RESULTS))}\n{END}{after}")


if __name__ == "__main__":
    main()
