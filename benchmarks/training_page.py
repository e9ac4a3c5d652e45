"""Makes the tables of docs/training_speed.md from benchmarks/results, between their markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table import RESULTS, ROOT, read, replaced

from shelfkern.files import replacing

PAGE = ROOT / "docs" / "training_speed.md"
# By the name in their markers.
FILES = {"cpu": "training_cpu.jsonl", "gpu": "training_gpu.jsonl"}
COLUMNS = ("", "batch", "size", "dtype", "variant", "time", "to the fastest other", "MiB")

Row = dict[str, Any]


def table(rows: list[Row]) -> list[str]:
    """One line a variant; ours say how they are to the fastest of torch's."""
    lines = [_line(*COLUMNS), "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        size = "x".join(map(str, row["size"]))
        memory = f"{row['memory_mib']:.0f}" if "memory_mib" in row else ""
        time = f"{row['median_ms']:.1f} ms"
        case = (row["model"], str(row["batch"]), size, row["dtype"])
        lines.append(_line(*case, row["variant"], time, _ratio(row, rows), memory))
    last = rows[-1]
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    machine = last.get("gpu") or f"{last['cpu']}, {last['isa']}, {last['threads']} threads"
    versions = f"torch {last['torch']}, shelfkern {last['shelfkern']} at {last['commit']}"
    return [*lines, "", f"Medians; {commands}; {machine}; {versions}; {last['time'][:10]}."]


def _ratio(row: Row, rows: list[Row]) -> str:
    """Of this library's eager variant: the least of its ratios by rounds to the others of its case."""
    if row["variant"] != "shelfkern":
        return ""
    case = ("model", "size", "batch", "dtype")
    others = [r for r in rows if not r["ours"] and all(r[key] == row[key] for key in case)]
    return f"**{min(r['ours_times_faster'] for r in others):.2f}x**" if others else ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Rewrites what is between markers, for the result files that are there."""
    text = page.read_text()
    for name, file in FILES.items():
        rows = read(results / file) if (results / file).exists() else []
        if rows:
            text = replaced(text, "\n".join(table(rows)), name)
    with replacing(page) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    main()
