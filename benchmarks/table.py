"""Makes the README's tables of results from benchmarks/results, between its two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("models_gpu.jsonl", "models_cpu.jsonl")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Images a second on a GTX 1080 Ti, 512x512, batch 1, float32 (arXiv 1811.11254).
PAPER = {"shelfnet50": 59, "shelfnet101": 42}

Row = dict[str, Any]
Case = tuple[Any, ...]


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file, those that were timed."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [row for row in rows if row.get("reason") is None]


def cases(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by case (model, size, batch, dtype, output), and by variant within it."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        size = "x".join(map(str, row["size"]))
        case = (row["model"], size, row.get("batch", 1), row["dtype"], row["output"])
        found.setdefault(case, {})[_name(row)] = row
    return found


def _name(row: Row) -> str:
    # As earlier results call it.
    return "shelfkern" if row["variant"] == "shelfkern predict" else row["variant"]


def is_ours(variant: str) -> bool:
    """Whether a variant is this library's."""
    return variant.startswith("shelfkern")


def on_cpu(rows: list[Row]) -> list[str]:
    """A table with one line a case and one column a variant, and what it was measured on."""
    found = cases(rows)
    variants = list(dict.fromkeys(variant for case in found.values() for variant in case))
    variants.sort(key=is_ours)
    lines = [_line("model", "size", "dtype", "output", *variants, "to the fastest other")]
    lines.append("|" + " --- |" * (len(variants) + 5))
    for (model, size, _, dtype, output), by_variant in found.items():
        times = [f"{by_variant[v]['median_ms']:.0f} ms" if v in by_variant else "" for v in variants]
        lines.append(_line(model, size, dtype, output, *times, _ratio(by_variant)))
    about = rows[0]
    machine = f"{about['cpu']}, {about['threads']} threads, {about['isa']}"
    return [*lines, "", f"Medians, batch 1; {_run(rows, machine)}"]


def on_gpu(rows: list[Row]) -> list[str]:
    """A table with one line a case: ours, bound too, beside the fastest other."""
    header = ("model", "size", "batch", "dtype", "output", "shelfkern", "bound to its input")
    lines = [_line(*header, "fastest other", "to it", "of the limit", "MiB, other's")]
    lines.append("|" + " --- |" * (len(header) + 4))
    for case, by_variant in cases(rows).items():
        ours, bound = by_variant.get("shelfkern"), by_variant.get("shelfkern bound")
        other = _fastest_other(by_variant)
        cells = [_time(ours), _time(bound), f"{other['variant']} {_time(other)}" if other else ""]
        fraction = f"{ours['fraction']:.0%}" if ours else ""
        lines.append(_line(*map(str, case), *cells, _ratio(by_variant), fraction, _memory(ours, other)))
    about = rows[0]
    machine = f"{about['gpu']}; CUDA {about['cuda']}, cuDNN {about['cudnn']}, Triton {about['triton']}"
    how = "Medians between events around a call"
    return [*lines, "", f"{how}; {_run(rows, machine)}", *_paper(rows)]


def _paper(rows: list[Row]) -> list[str]:
    """The paper's own measurement: a synchronised call on a float image, with full-size scores."""
    found = []
    for (model, size, batch, dtype, output), by_variant in cases(rows).items():
        ours = by_variant.get("shelfkern")
        if ours and model in PAPER and (size, batch, output) == ("512x512", 1, "scores"):
            speed = f"{ours['wall_images_per_s']:.0f}"
            found.append(_line(model, dtype, speed, f"{PAPER[model]} (float32, GTX 1080 Ti)"))
    if not found:
        return []
    header = _line("as the paper measures: 512x512, batch 1", "dtype", "images/s here", "in the paper")
    return ["", header, "| --- | --- | --- | --- |", *found]


def _fastest_other(by_variant: dict[str, Row]) -> Row | None:
    others = [row for variant, row in by_variant.items() if not is_ours(variant)]
    return min(others, key=lambda row: row["median_ms"], default=None)


def _ratio(by_variant: dict[str, Row]) -> str:
    """How many times faster ours is than the fastest other: the least of the medians over rounds."""
    ratios = [row["ours_times_faster"] for variant, row in by_variant.items() if not is_ours(variant)]
    ratios = [ratio for ratio in ratios if ratio is not None]
    return f"**{min(ratios):.2f}x**" if ratios else ""


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    milliseconds = row["median_ms"]
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{1e3 * milliseconds:.0f} us"


def _memory(ours: Row | None, other: Row | None) -> str:
    mine, theirs = (row.get("reserved_mib") if row else None for row in (ours, other))
    return "" if mine is None or theirs is None else f"{mine:.0f}, {theirs:.0f}"


def _run(rows: list[Row], machine: str) -> str:
    """The commands that gave the rows, and what they ran on."""
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = f"torch {rows[0]['torch']}, shelfkern {rows[0]['shelfkern']} at {commits}"
    return f"{commands}; {machine}; {versions}; {rows[-1]['time'][:10]}."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(folder: Path) -> str:
    """Tables of all result files in a folder."""
    parts = []
    for name in FILES:
        rows = read(folder / name) if (folder / name).exists() else []
        if rows:
            parts.append("\n".join(on_gpu(rows) if "gpu" in rows[0] else on_cpu(rows)))
    return "\n\n".join(parts)


def main() -> None:
    """Rewrites the part of README.md between the markers."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{markdown(RESULTS)}\n{END}{after}")


if __name__ == "__main__":
    main()
