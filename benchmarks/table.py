"""Makes the README's table of results from benchmarks/results, between its two markers."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def read(path: Path) -> list[dict]:
    """Rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def markdown(rows: list[dict]) -> str:
    """A table with one line a case and one column a variant, and what it was measured on."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = (row["model"], "x".join(map(str, row["size"])), row["output"])
        variant = "shelfkern" if row["variant"].startswith("shelfkern") else row["variant"]
        cases.setdefault(case, {})[variant] = row
    variants = list(dict.fromkeys(variant for case in cases.values() for variant in case))
    lines = ["| model | size | output | " + " | ".join(variants) + " | to the fastest other |"]
    lines.append("|" + " --- |" * (len(variants) + 4))
    for case, found in cases.items():
        times = [f"{found[v]['median_ms']:.0f} ms" if v in found else "wrong" for v in variants]
        others = [row["ours_times_faster"] for v, row in found.items() if v != "shelfkern"]
        lines.append("| " + " | ".join([*case, *times, f"**{min(others):.2f}x**"]) + " |")
    about = rows[0]
    machine = f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    versions = f"torch {about['torch']}, shelfkern {about['shelfkern']} at {about['commit']}"
    lines += ["", f"Medians, float32, batch 1; `{about['command']}`; {machine}; {versions}; {about['time'][:10]}."]
    return "\n".join(lines)


def main() -> None:
    """Rewrites the part of README.md between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = markdown(read(ROOT / "benchmarks" / "results" / "models_cpu.jsonl"))
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
