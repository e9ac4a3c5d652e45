"""Path counts of the models' own graphs against a walk over hand-made edges (paper 3.2)."""

from __future__ import annotations

import pytest

from shelfkern.nn import ShelfNet, ShelfNetConfig, count_paths, shelfnet18_lw, shelfnet50

Node = tuple[int, int]  # (column, level); level 0 is the finest


def edges(levels: int, pairs: int) -> list[tuple[Node, Node]]:
    """The edges of the columns' equations, column 0 being the backbone."""
    deepest = levels - 1
    found = [((0, level), (0, level + 1)) for level in range(deepest)]
    found += [((0, level), (1, level)) for level in range(levels)]
    for column in range(2, 2 * pairs + 1):
        upwards = column % 2 == 0
        skips = range(levels) if upwards else range(deepest)  # a down column's deepest level has no skip
        found += [((column - 1, level), (column, level)) for level in skips]
        for level in range(deepest):
            fine, coarse = (column, level), (column, level + 1)
            found.append((coarse, fine) if upwards else (fine, coarse))
    return found


def walks(graph: list[tuple[Node, Node]], start: Node, goal: Node) -> int:
    """Paths from start to goal, each walked to its end."""
    if start == goal:
        return 1
    return sum(walks(graph, head, goal) for tail, head in graph if tail == start)


def walked(levels: int, pairs: int) -> int:
    return walks(edges(levels, pairs), (0, 0), (2 * pairs, 0))


@pytest.mark.parametrize("merge", ["deconv", "attention"])
@pytest.mark.parametrize("pairs", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [2, 3, 4, 5])
def test_paths_of_any_shelf(levels: int, pairs: int, merge: str) -> None:
    config = ShelfNetConfig(5, "resnet18", 2, (2,) * levels, pairs=pairs, merge=merge)
    assert count_paths(ShelfNet(config)) == walked(levels, pairs)


def test_published_counts() -> None:
    narrow = dict(backbone_width=2, widths=(2, 2, 2, 2))
    assert count_paths(shelfnet50(**narrow)) == 29
    assert count_paths(shelfnet50(**narrow, pairs=1)) == 4
    assert count_paths(shelfnet18_lw(backbone_width=2, widths=(2, 2, 2))) == 13


@pytest.mark.parametrize("levels, pairs", [(2, 1), (3, 2), (4, 2), (4, 3)])
def test_paths_grow_with_pairs_and_levels(levels: int, pairs: int) -> None:
    assert walked(levels, pairs) < walked(levels + 1, pairs)
    assert walked(levels, pairs) < walked(levels, pairs + 1)
