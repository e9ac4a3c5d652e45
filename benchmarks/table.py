"""Makes the tables of README.md and docs/cpu.md from benchmarks/results, between their markers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("models_gpu.jsonl", "models_cpu.jsonl")
CPU_LAYERS = "models_cpu_layers.jsonl"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Images a second on a GTX 1080 Ti, 512x512, batch 1, float32 (arXiv 1811.11254).
PAPER = {"shelfnet50": 59, "shelfnet101": 42}
# How many times faster than the fastest other a CPU's results are to be: scores by dtype, and labels.
TARGETS = {"float32": 1.5, "bfloat16": 1.3, "int8": 1.0}
LABELS_TARGET = 2.0

Row = dict[str, Any]


class Case(NamedTuple):
    """What was measured; `threads` of a CPU, None on a GPU."""

    model: str
    size: str
    batch: int
    dtype: str
    output: str
    threads: int | None

    @property
    def target(self) -> float:
        """How many times faster than the fastest other it is to be; in 8 bits ahead, whatever the output."""
        return LABELS_TARGET if self.output == "labels" and self.dtype != "int8" else TARGETS[self.dtype]

    def cells(self) -> tuple[str, ...]:
        """Of a CPU's table."""
        return (self.model, self.size, self.dtype, self.output, str(self.threads))


CASE_COLUMNS = ("model", "size", "dtype", "output", "threads")


def read(path: Path) -> list[Row]:
    """Rows of a JSON lines file, those that were timed."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [row for row in rows if row.get("reason") is None]


def cases(rows: list[Row]) -> dict[Case, dict[str, Row]]:
    """Rows by case, and by variant within it."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), {})[_name(row)] = row
    return found


def case_of(row: Row) -> Case:
    """The case of a row."""
    size = "x".join(map(str, row["size"]))
    threads = None if "gpu" in row else row["threads"]
    return Case(row["model"], size, row.get("batch", 1), row["dtype"], row.get("output", "scores"), threads)


def _name(row: Row) -> str:
    # As earlier results call it.
    return "shelfkern" if row["variant"] == "shelfkern predict" else row["variant"]


def is_ours(variant: str) -> bool:
    """Whether a variant is this library's."""
    return variant.startswith("shelfkern")


def on_cpu(rows: list[Row]) -> list[str]:
    """A table with one line a case on the most threads: ours beside the fastest other."""
    most = max(row["threads"] for row in rows)
    lines = titled(*CASE_COLUMNS, "fastest other", "shelfkern", "to it")
    for case, by_variant in cases(rows).items():
        other = _fastest_other(by_variant)
        if case.threads == most:
            beside = f"{other['variant']} {_milliseconds(other)}" if other else ""
            mine = _milliseconds(by_variant.get("shelfkern"))
            lines.append(line(*case.cells(), beside, mine, _ratio(by_variant)))
    return [*lines, "", f"Medians, batch 1; {measured_by(rows, _cpu(rows))}"]


def _cpu(rows: list[Row]) -> str:
    return f"{rows[0]['cpu']}, {rows[0]['isa']}"


def times_of_all(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line a case and one column a variant."""
    found = cases(rows)
    variants = list(dict.fromkeys(variant for case in found.values() for variant in case))
    variants.sort(key=is_ours)
    lines = titled(*CASE_COLUMNS, *variants, "to the fastest other")
    for case, by_variant in found.items():
        times = [_milliseconds(by_variant.get(variant)) for variant in variants]
        lines.append(line(*case.cells(), *times, _ratio(by_variant)))
    return [*lines, "", f"Medians, batch 1; {measured_by(rows, _cpu(rows))}"]


def targets(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line a case: how far ahead it is, is to be, and by its floor could be."""
    floors = {case_of(row): row["floor_us"] / 1e3 for row in layers if row["layer"] is None}
    lines = titled(*CASE_COLUMNS, "to the fastest other", "target", "", "floor", "at the floor")
    for case, by_variant in cases(rows).items():
        other, ratio = _fastest_other(by_variant), _least_ratio(by_variant)
        if other is None or ratio is None:
            continue
        # Labels take the layers of scores, and less beyond them.
        floor = floors.get(case._replace(output="scores"))
        possible = other["median_ms"] / floor if floor else None
        verdict = "met" if ratio >= case.target else "missed"
        if possible is not None and possible < case.target:
            verdict = "out of reach of these algorithms"
        cells = ("", "") if floor is None else (f"{floor:.1f} ms", f"{possible:.2f}x")
        lines.append(line(*case.cells(), f"**{ratio:.2f}x**", f"{case.target:.1f}x", verdict, *cells))
    return lines


def arithmetic(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line a case: GFLOP/s of ours and of the fastest other, counted both ways, and of the peak."""
    ours = ("effective", "actual", "of the peak")
    lines = titled(*CASE_COLUMNS, "peak GFLOP/s", *(f"shelfkern, {name}" for name in ours), "fastest other")
    for case, by_variant in cases(rows).items():
        mine, other = by_variant.get("shelfkern"), _fastest_other(by_variant)
        if mine and "of_peak" in mine:
            figures = [
                f"{mine[key]:.0f}" for key in ("peak_gflop_per_s", "gflop_per_s", "actual_gflop_per_s")
            ]
            beside = (
                f"{other['variant']}: {other['gflop_per_s']:.0f}, {other['of_peak']:.0%}" if other else ""
            )
            lines.append(line(*case.cells(), *figures, f"{mine['of_peak']:.0%}", beside))
    return lines


def memory(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line a case whose memory was measured, one column a variant: beyond the libraries, and in all."""
    found = {case: by_variant for case, by_variant in cases(rows).items() if _measured(by_variant)}
    variants = list(
        dict.fromkeys(variant for by_variant in found.values() for variant in _measured(by_variant))
    )
    variants.sort(key=is_ours)
    lines = titled(*CASE_COLUMNS, *variants, "shelfkern, with its model")
    for case, by_variant in found.items():
        cells = [_mebibytes(by_variant.get(variant)) for variant in variants]
        beside = [
            row["memory_with_model_mib"] for row in by_variant.values() if "memory_with_model_mib" in row
        ]
        lines.append(line(*case.cells(), *cells, f"{beside[0]:.0f}" if beside else ""))
    return lines


def _measured(by_variant: dict[str, Row]) -> list[str]:
    return [variant for variant, row in by_variant.items() if "memory_mib" in row]


def _mebibytes(row: Row | None) -> str:
    measured = row is not None and "memory_mib" in row
    return f"{row['memory_net_mib']:.0f} ({row['memory_mib']:.0f})" if row and measured else ""


def slowest_layers(rows: list[Row], layers: list[Row]) -> list[str]:
    """On the most threads one line a case and kind of layer, by op and algorithm: time, share, and floor."""
    found: dict[Case, dict[tuple[str, str], list[Row]]] = {}
    most = max((row["threads"] for row in layers), default=0)
    for row in layers:
        if row["layer"] is not None and row["threads"] == most:
            kinds = found.setdefault(case_of(row), {})
            kinds.setdefault((row["op"], row["algorithm"]), []).append(row)
    lines = titled(*CASE_COLUMNS, "op", "algorithm", "layers", "time", "share", "floor", "of it")
    for case, kinds in found.items():
        total = sum(row["median_us"] for of_kind in kinds.values() for row in of_kind)
        sums = [(sum(row["median_us"] for row in of_kind), kind) for kind, of_kind in kinds.items()]
        for time, kind in sorted(sums, reverse=True):
            floor = sum(row["floor_us"] for row in kinds[kind])
            cells = (*kind, str(len(kinds[kind])), f"{time / 1e3:.2f} ms", f"{time / total:.0%}")
            lines.append(line(*case.cells(), *cells, f"{floor / 1e3:.2f} ms", f"{floor / time:.0%}"))
    return lines


def on_gpu(rows: list[Row]) -> list[str]:
    """A table with one line a case: ours, bound too, beside the fastest other."""
    header = ("model", "size", "batch", "dtype", "output", "shelfkern", "bound to its input")
    lines = titled(*header, "fastest other", "to it", "of the limit", "MiB, other's")
    for case, by_variant in cases(rows).items():
        ours, bound = by_variant.get("shelfkern"), by_variant.get("shelfkern bound")
        other = _fastest_other(by_variant)
        cells = [_time(ours), _time(bound), f"{other['variant']} {_time(other)}" if other else ""]
        fraction = f"{ours['fraction']:.0%}" if ours else ""
        lines.append(line(*map(str, case[:5]), *cells, _ratio(by_variant), fraction, _memory(ours, other)))
    about = rows[0]
    machine = f"{about['gpu']}; CUDA {about['cuda']}, cuDNN {about['cudnn']}, Triton {about['triton']}"
    how = "Medians between events around a call"
    return [*lines, "", f"{how}; {measured_by(rows, machine)}", *_paper(rows)]


def _paper(rows: list[Row]) -> list[str]:
    """The paper's own measurement: a synchronised call on a float image, with full-size scores."""
    found = []
    for (model, size, batch, dtype, output, _), by_variant in cases(rows).items():
        ours = by_variant.get("shelfkern")
        if ours and model in PAPER and (size, batch, output) == ("512x512", 1, "scores"):
            speed = f"{ours['wall_images_per_s']:.0f}"
            found.append(line(model, dtype, speed, f"{PAPER[model]} (float32, GTX 1080 Ti)"))
    if not found:
        return []
    header = titled("as the paper measures: 512x512, batch 1", "dtype", "images/s here", "in the paper")
    return ["", *header, *found]


def _fastest_other(by_variant: dict[str, Row]) -> Row | None:
    others = [row for variant, row in by_variant.items() if not is_ours(variant)]
    return min(others, key=lambda row: row["median_ms"], default=None)


def _milliseconds(row: Row | None) -> str:
    return f"{row['median_ms']:.1f} ms" if row else ""


def _ratio(by_variant: dict[str, Row]) -> str:
    ratio = _least_ratio(by_variant)
    return "" if ratio is None else f"**{ratio:.2f}x**"


def _least_ratio(by_variant: dict[str, Row]) -> float | None:
    """How many times faster ours is than the fastest other: the least of the medians over rounds."""
    ratios = [row["ours_times_faster"] for variant, row in by_variant.items() if not is_ours(variant)]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    milliseconds = row["median_ms"]
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{1e3 * milliseconds:.0f} us"


def _memory(ours: Row | None, other: Row | None) -> str:
    mine, theirs = (row.get("reserved_mib") if row else None for row in (ours, other))
    return "" if mine is None or theirs is None else f"{mine:.0f}, {theirs:.0f}"


def measured_by(rows: list[Row], machine: str) -> str:
    """The commands that gave the rows, and what they ran on."""
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = f"torch {rows[0]['torch']}, shelfkern {rows[0]['shelfkern']} at {commits}"
    return f"{commands}; {machine}; {versions}; {rows[-1]['time'][:10]}."


def titled(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [line(*titles), "|" + " --- |" * len(titles)]


def line(*cells: str) -> str:
    """Of a table."""
    return f"| {' | '.join(cells)} |"


def markdown(folder: Path) -> str:
    """Tables of all result files in a folder."""
    parts = []
    for name in FILES:
        rows = read(folder / name) if (folder / name).exists() else []
        if rows:
            parts.append("\n".join(on_gpu(rows) if "gpu" in rows[0] else on_cpu(rows)))
    return "\n\n".join(parts)


# Parts of docs/cpu.md by the name in their markers.
PARTS: dict[str, Callable[[list[Row], list[Row]], list[str]]] = {
    "targets": targets,
    "times": times_of_all,
    "arithmetic": arithmetic,
    "memory": memory,
    "layers": slowest_layers,
}


def cpu_page(page: str, rows: list[Row], layers: list[Row]) -> str:
    """docs/cpu.md with its tables made anew."""
    for name, make in PARTS.items():
        page = replaced(page, "\n".join(make(rows, layers)), name)
    return page


def replaced(page: str, text: str, name: str = "results") -> str:
    """A page with other text between the markers of a name."""
    begin, end = (mark.replace("results", name) for mark in (BEGIN, END))
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrites what is between markers in README.md and docs/cpu.md."""
    readme, page = ROOT / "README.md", ROOT / "docs" / "cpu.md"
    readme.write_text(replaced(readme.read_text(), markdown(RESULTS)))
    results, layers = RESULTS / FILES[1], RESULTS / CPU_LAYERS
    if results.exists():
        rows = read(layers) if layers.exists() else []
        page.write_text(cpu_page(page.read_text(), read(results), rows))


if __name__ == "__main__":
    main()
