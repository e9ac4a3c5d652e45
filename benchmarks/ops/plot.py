"""Draws a file of op results: the fraction of the machine's roofline that ours and the fastest peer reach."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from pairs import Pairs, pairs_by_dtype, speed_up

OURS, PEER = "#1b6ca8", "#b8643c"


def draw(axis: plt.Axes, dtype: str, found: Pairs) -> None:
    """One line per op: one dot per problem, ours above, the fastest peer below."""
    for line, of_one_op in enumerate(found.values()):
        for offset, colour, which, name in ((-0.17, OURS, 0, "shelfkern"), (0.17, PEER, 1, "fastest peer")):
            fractions = [100 * pair[which]["fraction"] for pair in of_one_op]
            label = name if line == 0 else None
            axis.scatter(
                fractions, [line + offset] * len(fractions), s=14, color=colour, alpha=0.7, label=label
            )
    labels = [f"{op}\n{speed_up(of_one_op):.2f}x" for op, of_one_op in found.items()]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.axvline(100, color="#999", linewidth=0.8)
    axis.set_title(dtype, fontsize=9)
    axis.set_xlabel("% of the roofline", fontsize=8)
    axis.grid(axis="x", color="#eee")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Writes an SVG beside each given file of results."""
    for path in map(Path, sys.argv[1:]):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
        by_dtype = pairs_by_dtype(rows)
        if not by_dtype:
            sys.exit(f"{path} holds no problem that ours and a peer were timed on")
        figure, axes = plt.subplots(
            1, len(by_dtype), figsize=(4.2 * len(by_dtype), 5), squeeze=False, layout="constrained"
        )
        for axis, (dtype, found) in zip(axes[0], by_dtype.items(), strict=True):
            draw(axis, dtype, found)
        axes[0][-1].legend(fontsize=8, loc="lower right")
        figure.suptitle(
            "One dot per problem; numbers: speed-up over the fastest peer (geometric mean)", fontsize=9
        )
        # Without a date and with fixed ids, so that equal results give equal files.
        plt.rcParams["svg.hashsalt"] = "shelfkern"
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
