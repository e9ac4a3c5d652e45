"""Generates the tables of README.md and docs/cpu.md from benchmarks/results, between their markers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("models_gpu.jsonl", "models_cpu.jsonl")
CPU_LAYERS = "models_cpu_layers.jsonl"
# Of a CPU without AVX-512.
CPU_AVX2 = "models_cpu_avx2.jsonl"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Images per second on a GTX 1080 Ti, 512x512, batch 1, float32 (arXiv 1811.11254).
PAPER = {"shelfnet50": 59, "shelfnet101": 42}
# Target speed-ups over the fastest peer on a CPU: scores by dtype, and labels.
TARGETS = {"float32": 1.5, "bfloat16": 1.3, "int8": 1.0}
LABELS_TARGET = 2.0
# Start of models.py's reason for a result that failed the accuracy check, and its wording in tables.
REFUSED, FAILED, UNTIMED = "wrong, not timed", "failed the accuracy check", "not timed"
SPEED_UP = "speed-up over the fastest peer"

Row = dict[str, Any]


class Case(NamedTuple):
    """Key of a measurement; `threads` on a CPU, None on a GPU."""

    model: str
    size: str
    batch: int
    dtype: str
    output: str
    threads: int | None

    @property
    def target(self) -> float:
        """The target speed-up over the fastest peer; in int8 the same for every output."""
        return LABELS_TARGET if self.output == "labels" and self.dtype != "int8" else TARGETS[self.dtype]

    def cells(self) -> tuple[str, ...]:
        """Cells that identify the case in a CPU's table."""
        return (self.model, self.size, self.dtype, self.output, str(self.threads))


CASE_COLUMNS = ("model", "size", "dtype", "output", "threads")


def read(path: Path, refused: bool = False) -> list[Row]:
    """Timed rows of a JSON lines file; if `refused`, also those that failed the accuracy check."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [row for row in rows if row.get("reason") is None or (refused and has_failed(row))]


def has_failed(row: Row) -> bool:
    """Whether a row was not timed because its result failed the accuracy check."""
    return (row.get("reason") or "").startswith(REFUSED)


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
    # Name in earlier results.
    return "shelfkern" if row["variant"] == "shelfkern predict" else row["variant"]


def is_ours(variant: str) -> bool:
    """Whether a variant is this library's."""
    return variant.startswith("shelfkern")


def on_cpu(rows: list[Row]) -> list[str]:
    """A table with one line per case on the most threads: ours beside the fastest peer."""
    most = max(row["threads"] for row in rows)
    lines = titled(*CASE_COLUMNS, "fastest peer", "shelfkern", SPEED_UP)
    for case, by_variant in cases(rows).items():
        peer = _fastest_peer(by_variant)
        if case.threads == most:
            beside = f"{peer['variant']} {_milliseconds(peer)}" if peer else ""
            mine = _milliseconds(by_variant.get("shelfkern"))
            lines.append(line(*case.cells(), beside, mine, _ratio(by_variant)))
    each = f"each row's command, machine and versions are in `benchmarks/results/{FILES[1]}`"
    return [*lines, "", f"Medians, batch 1; `make bench-cpu`; {_cpu(rows)}; {_versions(rows)}; {each}."]


def _cpu(rows: list[Row]) -> str:
    return f"{rows[0]['cpu']}, {rows[0]['isa']}"


def times_of_all(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line per case and one column per variant."""
    found = cases(rows)
    variants = list(dict.fromkeys(variant for case in found.values() for variant in case))
    variants.sort(key=is_ours)
    lines = titled(*CASE_COLUMNS, *variants, SPEED_UP)
    for case, by_variant in found.items():
        times = [_milliseconds(by_variant.get(variant)) for variant in variants]
        lines.append(line(*case.cells(), *times, _ratio(by_variant)))
    return [*lines, "", f"Medians, batch 1; {measured_by(rows, _cpu(rows))}"]


def targets(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line per case: the speed-up reached, the target, and the speed-up at the floor."""
    floors = {case_of(row): row["floor_us"] / 1e3 for row in layers if row["layer"] is None}
    lines = titled(*CASE_COLUMNS, SPEED_UP, "target", "outcome", "floor", "speed-up at the floor")
    for case, by_variant in cases(rows).items():
        peer, mine = _fastest_peer(by_variant), by_variant.get("shelfkern")
        if peer is None or mine is None:
            continue
        ratio = _least_ratio(by_variant)
        # Labels need all layers of scores, and little beyond them.
        floor = floors.get(case._replace(output="scores"))
        possible = peer["median_ms"] / floor if floor else None
        verdict = "met" if ratio is not None and ratio >= case.target else "missed"
        if possible is not None and possible < case.target:
            verdict = "out of reach of these algorithms"
        cells = ("", "") if floor is None else (f"{floor:.1f} ms", f"{possible:.2f}x")
        reached = FAILED if has_failed(mine) else _ratio(by_variant)
        lines.append(line(*case.cells(), reached, f"{case.target:.1f}x", verdict, *cells))
    return lines


def arithmetic(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line per case: GFLOP/s of ours, effective and actual, and of the fastest peer."""
    ours = ("effective", "actual", "% of peak")
    lines = titled(*CASE_COLUMNS, "peak GFLOP/s", *(f"shelfkern, {name}" for name in ours), "fastest peer")
    for case, by_variant in cases(rows).items():
        mine, peer = by_variant.get("shelfkern"), _fastest_peer(by_variant)
        if mine is None or not (has_failed(mine) or "of_peak" in mine):
            continue
        figures = ["", FAILED, "", ""]
        if not has_failed(mine):
            rates = ("peak_gflop_per_s", "gflop_per_s", "actual_gflop_per_s")
            figures = [*(f"{mine[key]:.0f}" for key in rates), f"{mine['of_peak']:.0%}"]
        beside = f"{peer['variant']}: {peer['gflop_per_s']:.0f}, {peer['of_peak']:.0%}" if peer else ""
        lines.append(line(*case.cells(), *figures, beside))
    return lines


def memory(rows: list[Row], layers: list[Row]) -> list[str]:
    """One line per case with measured memory, one column per variant: beyond the libraries, and in total."""
    found = {case: by_variant for case, by_variant in cases(rows).items() if _measured(by_variant)}
    variants = list(
        dict.fromkeys(variant for by_variant in found.values() for variant in _measured(by_variant))
    )
    variants.sort(key=is_ours)
    lines = titled(*CASE_COLUMNS, *variants, "shelfkern, model kept")
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
    if row and has_failed(row):
        return FAILED
    measured = row is not None and "memory_mib" in row
    return f"{row['memory_net_mib']:.0f} ({row['memory_mib']:.0f})" if row and measured else ""


def slowest_layers(rows: list[Row], layers: list[Row]) -> list[str]:
    """For the most threads, one line per case and kind of layer (op and algorithm): time, share, floor."""
    found: dict[Case, dict[tuple[str, str], list[Row]]] = {}
    most = max((row["threads"] for row in layers), default=0)
    for row in layers:
        if row["layer"] is not None and row["threads"] == most:
            kinds = found.setdefault(case_of(row), {})
            kinds.setdefault((row["op"], row["algorithm"]), []).append(row)
    lines = titled(*CASE_COLUMNS, "op", "algorithm", "layers", "time", "share", "floor", "floor / time")
    for case, kinds in found.items():
        total = sum(row["median_us"] for of_kind in kinds.values() for row in of_kind)
        sums = [(sum(row["median_us"] for row in of_kind), kind) for kind, of_kind in kinds.items()]
        for time, kind in sorted(sums, reverse=True):
            floor = sum(row["floor_us"] for row in kinds[kind])
            cells = (*kind, str(len(kinds[kind])), f"{time / 1e3:.2f} ms", f"{time / total:.0%}")
            lines.append(line(*case.cells(), *cells, f"{floor / 1e3:.2f} ms", f"{floor / time:.0%}"))
    return lines


def on_gpu(rows: list[Row]) -> list[str]:
    """A table with one line per case: ours, also bound, beside the fastest peer."""
    header = ("model", "size", "batch", "dtype", "output", "shelfkern", "shelfkern bound to its input")
    lines = titled(*header, "fastest peer", SPEED_UP, "% of the limit", "MiB, peer's MiB")
    for case, by_variant in cases(rows).items():
        ours, bound = by_variant.get("shelfkern"), by_variant.get("shelfkern bound")
        peer = _fastest_peer(by_variant)
        cells = [_time(ours), _time(bound), f"{peer['variant']} {_time(peer)}" if peer else ""]
        fraction = f"{ours['fraction']:.0%}" if ours and not has_failed(ours) else ""
        lines.append(line(*map(str, case[:5]), *cells, _ratio(by_variant), fraction, _memory(ours, peer)))
    about = rows[0]
    machine = f"{about['gpu']}; CUDA {about['cuda']}, cuDNN {about['cudnn']}, Triton {about['triton']}"
    how = "Medians between events around a call"
    return [*lines, "", f"{how}; {measured_by(rows, machine)}", *_paper(rows)]


def _paper(rows: list[Row]) -> list[str]:
    """The paper's own measurement: a synchronised call on a float image, with full-size scores."""
    found = []
    timed = [row for row in rows if not has_failed(row)]
    for (model, size, batch, dtype, output, _), by_variant in cases(timed).items():
        ours = by_variant.get("shelfkern")
        if (
            ours
            and not has_failed(ours)
            and model in PAPER
            and (size, batch, output) == ("512x512", 1, "scores")
        ):
            speed = f"{ours['wall_images_per_s']:.0f}"
            found.append(line(model, dtype, speed, f"{PAPER[model]} (float32, GTX 1080 Ti)"))
    if not found:
        return []
    header = titled("as the paper measures: 512x512, batch 1", "dtype", "images/s here", "in the paper")
    return ["", *header, *found]


def _fastest_peer(by_variant: dict[str, Row]) -> Row | None:
    """The fastest of the timed peers."""
    peers = [row for variant, row in by_variant.items() if not is_ours(variant) and not has_failed(row)]
    return min(peers, key=lambda row: row["median_ms"], default=None)


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return FAILED if has_failed(row) else f"{row['median_ms']:.1f} ms"


def _ratio(by_variant: dict[str, Row]) -> str:
    """The speed-up over the fastest peer."""
    ratio, ours = _least_ratio(by_variant), by_variant.get("shelfkern")
    if ratio is None:
        return UNTIMED if ours and has_failed(ours) else ""
    return f"**{ratio:.2f}x**"


def _least_ratio(by_variant: dict[str, Row]) -> float | None:
    """The speed-up over the fastest peer: the smallest of the medians over rounds."""
    ratios = [row.get("ours_times_faster") for variant, row in by_variant.items() if not is_ours(variant)]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _time(row: Row | None) -> str:
    if row is None or has_failed(row):
        return _milliseconds(row)
    milliseconds = row["median_ms"]
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{1e3 * milliseconds:.0f} us"


def _memory(ours: Row | None, other: Row | None) -> str:
    mine, theirs = (row.get("reserved_mib") if row else None for row in (ours, other))
    return "" if mine is None or theirs is None else f"{mine:.0f}, {theirs:.0f}"


def measured_by(rows: list[Row], machine: str) -> str:
    """The commands that produced the rows, and the machine and versions."""
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
    return f"{commands}; {machine}; {_versions(rows)}."


def _versions(rows: list[Row]) -> str:
    """Versions, with the commits and the date."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    versions = f"torch {rows[0]['torch']}, shelfkern {rows[0]['shelfkern']} at {commits}"
    return f"{versions}; {rows[-1]['time'][:10]}"


def titled(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [line(*titles), "|" + " --- |" * len(titles)]


def line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def markdown(folder: Path) -> str:
    """Tables of all result files in a folder."""
    parts = []
    for name in FILES:
        rows = read(folder / name, refused=True) if (folder / name).exists() else []
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
    """docs/cpu.md with its tables regenerated."""
    for name, make in PARTS.items():
        page = replaced(page, "\n".join(make(rows, layers)), name)
    return page


def avx2_page(page: str, rows: list[Row]) -> str:
    """docs/cpu.md with the table of a CPU without AVX-512 regenerated."""
    return replaced(page, "\n".join(times_of_all(rows, [])), "avx2")


def replaced(page: str, text: str, name: str = "results") -> str:
    """A page with the text between a name's markers replaced."""
    begin, end = (mark.replace("results", name) for mark in (BEGIN, END))
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrites the text between the markers in README.md and docs/cpu.md."""
    readme, page = ROOT / "README.md", ROOT / "docs" / "cpu.md"
    readme.write_text(replaced(readme.read_text(), markdown(RESULTS)))
    results, layers = RESULTS / FILES[1], RESULTS / CPU_LAYERS
    if results.exists():
        rows = read(layers) if layers.exists() else []
        page.write_text(cpu_page(page.read_text(), read(results, refused=True), rows))
    if (RESULTS / CPU_AVX2).exists():
        page.write_text(avx2_page(page.read_text(), read(RESULTS / CPU_AVX2, refused=True)))


if __name__ == "__main__":
    main()
