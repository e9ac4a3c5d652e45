"""Generates the training tables of docs/training_speed.md and README.md, between their markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table import RESULTS, ROOT, SPEED_UP, line, read, replaced, titled

from shelfkern.files import replacing

PAGE, README = ROOT / "docs" / "training_speed.md", ROOT / "README.md"
# By the name in the page's markers; the README shows the CPU's.
FILES = {"cpu": "training_cpu.jsonl", "gpu": "training_gpu.jsonl"}
README_MARK = "training"
CASE_COLUMNS = ("model", "batch", "size", "dtype")
COLUMNS = (*CASE_COLUMNS, "variant", "time", SPEED_UP, "MiB")
BESIDE_COLUMNS = (*CASE_COLUMNS, "fastest peer", "shelfkern", SPEED_UP, "MiB", "lowest peer MiB")

Row = dict[str, Any]


def table(rows: list[Row]) -> list[str]:
    """One line per variant; ours has its speed-up over the fastest of torch's."""
    lines = titled(*COLUMNS)
    for row in rows:
        ratio = _ratio(_peers(row, rows)) if row["variant"] == "shelfkern" else ""
        lines.append(line(*_case(row), row["variant"], _time(row), ratio, _mebibytes([row])))
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    return [*lines, "", f"Medians; {commands}; {_machine(rows)}"]


def beside(rows: list[Row]) -> list[str]:
    """One line per case: ours beside the fastest of torch's, and our memory beside the lowest of theirs."""
    lines = titled(*BESIDE_COLUMNS)
    for row in rows:
        peers = _peers(row, rows)
        if row["variant"] != "shelfkern" or not peers:
            continue
        fastest = min(peers, key=lambda peer: peer["median_ms"])
        times = (f"{fastest['variant']} {_time(fastest)}", _time(row), _ratio(peers))
        lines.append(line(*_case(row), *times, _mebibytes([row]), _mebibytes(peers)))
    return [*lines, "", f"Medians; `python benchmarks/training.py`; {_machine(rows)}"]


def _peers(row: Row, rows: list[Row]) -> list[Row]:
    """Rows of the same case that are not this library's."""
    case = ("model", "size", "batch", "dtype")
    return [peer for peer in rows if not peer["ours"] and all(peer[key] == row[key] for key in case)]


def _ratio(peers: list[Row]) -> str:
    """The speed-up over the fastest peer: the smallest of the ratios by rounds."""
    return f"**{min(peer['ours_times_faster'] for peer in peers):.2f}x**" if peers else ""


def _case(row: Row) -> tuple[str, ...]:
    return row["model"], str(row["batch"]), "x".join(map(str, row["size"])), row["dtype"]


def _time(row: Row) -> str:
    return f"{row['median_ms']:.1f} ms"


def _mebibytes(rows: list[Row]) -> str:
    """The smallest memory of the rows that have it."""
    found = [row["memory_mib"] for row in rows if "memory_mib" in row]
    return f"{min(found):.0f}" if found else ""


def _machine(rows: list[Row]) -> str:
    last = rows[-1]
    machine = last.get("gpu") or f"{last['cpu']}, {last['isa']}, {last['threads']} threads"
    versions = f"torch {last['torch']}, shelfkern {last['shelfkern']} at {last['commit']}"
    return f"{machine}; {versions}; {last['time'][:10]}."


def page_of(page: str, results: Path) -> str:
    """docs/training_speed.md with the tables regenerated for which results exist."""
    for name, rows in _results(results).items():
        page = replaced(page, "\n".join(table(rows)), name)
    return page


def readme_of(readme: str, results: Path) -> str:
    """README.md with its CPU training table regenerated."""
    rows = _results(results).get("cpu")
    return replaced(readme, "\n".join(beside(rows)), README_MARK) if rows else readme


def _results(folder: Path) -> dict[str, list[Row]]:
    found = {name: read(folder / file) for name, file in FILES.items() if (folder / file).exists()}
    return {name: rows for name, rows in found.items() if rows}


def main(page: Path = PAGE, readme: Path = README, results: Path = RESULTS) -> None:
    """Rewrites the text between the markers."""
    for path, made_of in ((page, page_of), (readme, readme_of)):
        with replacing(path) as temporary:
            temporary.write_text(made_of(path.read_text(), results))


if __name__ == "__main__":
    main()
