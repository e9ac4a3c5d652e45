"""Draws benchmarks/results/models_cpu.jsonl as bars: `make bench` runs it."""

from __future__ import annotations

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from table import RESULTS, cases, read


def main() -> None:
    """Writes models_cpu.svg beside the results."""
    found = cases(read(RESULTS))
    figure, axes = plt.subplots(
        1, len(found), figsize=(2.6 * len(found), 3), sharey=True, layout="constrained"
    )
    for axis, (case, rows) in zip(axes, found.items(), strict=True):
        medians = [row["median_ms"] for row in rows.values()]
        spread = [
            [row["median_ms"] - row["p10_ms"], row["p90_ms"] - row["median_ms"]] for row in rows.values()
        ]
        colours = ["#1b6ca8" if name == "shelfkern" else "#b8c4ce" for name in rows]
        bars = axis.barh(
            list(rows), medians, xerr=list(zip(*spread, strict=True)), color=colours, ecolor="#555"
        )
        axis.bar_label(bars, fmt="%.0f", label_type="center")
        axis.set_title("\n".join(case), fontsize=9)
        axis.set_xlabel("ms (median, p10 to p90)", fontsize=8)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    # Without a date and with fixed ids, so that equal results give equal files.
    plt.rcParams["svg.hashsalt"] = "shelfkern"
    figure.savefig(RESULTS.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
