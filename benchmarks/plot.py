"""Draws results of whole networks as bars, an SVG beside each file: run by `make bench`.

Files of cases (models_*.jsonl) have one panel per case; those of layers (*_layers.jsonl) one bar per layer,
with the part of it that the machine's ceilings account for.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from table import FILES, RESULTS, Case, Row, case_of, cases, is_ours, read

OURS, OTHERS, FLOOR = "#1b6ca8", "#b8c4ce", "#123b5d"
COLUMNS = 4
# Number of a file's cases that are drawn: the first ones, which are the most important.
SHOWN = 8
# The same for files of layers.
SHOWN_LAYERS = 4
# On a CPU, all cases with the most threads.
SHOWN_CPU = 24


def draw_case(axis: Any, case: Case, rows: dict[str, Row]) -> None:
    """One bar per variant."""
    medians = [row["median_ms"] for row in rows.values()]
    spread = [[row["median_ms"] - row["p10_ms"], row["p90_ms"] - row["median_ms"]] for row in rows.values()]
    colours = [OURS if is_ours(name) else OTHERS for name in rows]
    labels = ["" if math.isnan(median) else f"{median:.3g}" for median in medians]
    bars = axis.barh(list(rows), medians, xerr=list(zip(*spread, strict=True)), color=colours, ecolor="#555")
    axis.bar_label(bars, labels, label_type="center", fontsize=8)
    axis.set_title(f"{case.model}\n{case.size}, {case.output}\n{case.dtype}, {_where(case)}", fontsize=9)
    axis.set_xlabel("ms (median, p10 to p90)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _where(case: Case) -> str:
    return f"batch {case.batch}" if case.threads is None else f"threads {case.threads}"


def draw_cases(rows: list[Row]) -> Any:
    """A figure with a panel for each of the first cases."""
    found = cases(rows)
    most = max((case.threads or 0 for case in found), default=0)
    every = [(case, by_variant) for case, by_variant in found.items() if (case.threads or most) == most]
    found = dict(every[: SHOWN_CPU if most else SHOWN])
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    size = (2.9 * columns, 3.2 * lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    shown = list(dict.fromkeys(variant for by_variant in found.values() for variant in by_variant))
    # Panels of a row place variants alike: a variant missing from a case leaves a gap.
    empty = {"median_ms": float("nan"), "p10_ms": float("nan"), "p90_ms": float("nan")}
    for axis, (case, by_variant) in zip(axes.flat, found.items(), strict=False):
        draw_case(axis, case, {variant: by_variant.get(variant, empty) for variant in shown})
        axis.set_ylim(len(shown) - 0.5, -0.5)
    return figure


def draw_layers(rows: list[Row]) -> Any:
    """A figure with a panel for each of the first cases: one bar per layer, in order, with its floor."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        case = case_of(row)
        by_case.setdefault(f"{case.model}, {case.size}, {case.dtype}, {_where(case)}", []).append(row)
    by_case = dict(list(by_case.items())[:SHOWN_LAYERS])
    longest = max(len(found) for found in by_case.values())
    size = (6.5 * len(by_case), 1.5 + 0.16 * longest)
    figure, axes = plt.subplots(1, len(by_case), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, found) in zip(axes[0], by_case.items(), strict=True):
        layers = [row for row in found if row["layer"] is not None]
        (whole,) = (row for row in found if row["layer"] is None)
        names = [f"{row['op']} {'x'.join(map(str, row['shape'][1:]))}  {row['algorithm']}" for row in layers]
        places = range(len(layers))
        axis.barh(places, [row["median_us"] for row in layers], color=OURS, label="measured")
        axis.barh(places, [row["floor_us"] for row in layers], color=FLOOR, height=0.4, label="floor")
        axis.set_yticks(places, names, fontsize=6)
        axis.set_ylim(len(layers) - 0.5, -0.5)
        total = f"layers {whole['layers_us']:.0f} us, whole {whole['median_us']:.0f} us"
        axis.set_title(f"{title}\n{total}", fontsize=9)
        axis.set_xlabel("us", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(fontsize=8)
    return figure


def draw(path: Path) -> None:
    """Writes a file's figure beside it; none if the file has no times."""
    if path.stem.endswith("_layers"):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
        make = draw_layers
    else:
        rows, make = read(path), draw_cases
    if not rows:
        print(f"{path} holds no times", file=sys.stderr)
        return
    # With fixed ids and no date, so that equal results give equal files.
    plt.rcParams["svg.hashsalt"] = "shelfkern"
    make(rows).savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Draws the named files, by default those that exist in benchmarks/results."""
    names = [*FILES, *(f"{Path(name).stem}_layers.jsonl" for name in FILES)]
    paths = [Path(name) for name in sys.argv[1:]] or [RESULTS / name for name in names]
    for path in paths:
        if path.exists() or sys.argv[1:]:
            draw(path)


if __name__ == "__main__":
    main()
