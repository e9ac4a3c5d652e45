"""The shelf: columns 1, 2, 3, ... of a ShelfNet (arXiv 1811.11254, section 3.1).

Levels are counted from fine (A, index 0) to coarse. Column 1 maps the backbone's features to the
shelf's widths; then columns go up (coarse to fine) and down (fine to coarse) in turn, each level of
a column also receiving the same level of the column before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from .blocks import (
    AttentionMerge,
    ConvBNAct,
    DeconvMerge,
    Downsample,
    EntryBlock,
    SharedBlock,
)

MERGES = {"deconv": DeconvMerge, "attention": AttentionMerge}


class UpColumn(nn.Module):
    """Coarse to fine: D = bottom(D), then C = merge(D, C), B = merge(C, B), A = merge(B, A).

    The first up column has a shared block at the bottom; later ones start from the down column's
    deepest level as it is.
    """

    def __init__(
        self, widths: Sequence[int], merge: str, bottom: bool, dropout: float, negative_slope: float
    ) -> None:
        super().__init__()
        self.bottom = SharedBlock(widths[-1], dropout, negative_slope) if bottom else None
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.merges = nn.ModuleList(MERGES[merge](i, o, dropout, negative_slope) for i, o in pairs)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        x = levels[-1] if self.bottom is None else self.bottom(levels[-1])
        out = [x]
        for merge, skip in zip(self.merges, levels[-2::-1], strict=True):
            x = merge(x, skip)
            out.append(x)
        return out[::-1]


class DownColumn(nn.Module):
    """Fine to coarse: A = S(S(A) + A), B = S(down(A) + B), ..., D = S(down(C)).

    The deepest level takes no skip from the column before.
    """

    def __init__(self, widths: Sequence[int], dropout: float, negative_slope: float) -> None:
        super().__init__()
        self.entry = EntryBlock(widths[0], dropout, negative_slope)
        self.blocks = nn.ModuleList(SharedBlock(w, dropout, negative_slope) for w in widths[:-1])
        self.downs = nn.ModuleList(Downsample(i, o) for i, o in pairwise(widths))
        self.bottom = SharedBlock(widths[-1], dropout, negative_slope)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        x = self.blocks[0](self.entry(levels[0]))
        out = [x]
        for block, down, skip in zip(self.blocks[1:], self.downs[:-1], levels[1:-1], strict=True):
            x = block(down(x) + skip)
            out.append(x)
        out.append(self.bottom(self.downs[-1](x)))
        return out


class Shelf(nn.Module):
    """Columns 1 to 2 * pairs over the backbone's features.

    Args:
        in_channels: channels of the backbone's features, fine to coarse.
        widths: channels of the shelf's levels, fine to coarse.
        merge: "deconv" (ShelfNet50 and 101) or "attention" (the real-time models).
        pairs: number of encoder-decoder pairs, the backbone with column 2 being the first.
        lateral: whether column 1 has its 1x1 convolutions; without, `widths` must be `in_channels`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        widths: Sequence[int],
        merge: str,
        pairs: int,
        lateral: bool,
        dropout: float,
        negative_slope: float,
    ) -> None:
        super().__init__()
        self.laterals = (
            nn.ModuleList(
                ConvBNAct(i, o, 1, negative_slope) for i, o in zip(in_channels, widths, strict=True)
            )
            if lateral
            else None
        )
        columns: list[nn.Module] = [UpColumn(widths, merge, True, dropout, negative_slope)]
        for _ in range(pairs - 1):
            columns.append(DownColumn(widths, dropout, negative_slope))
            columns.append(UpColumn(widths, merge, False, dropout, negative_slope))
        self.columns = nn.ModuleList(columns)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Features of the used levels, fine to coarse -> the last column's levels, fine to coarse."""
        levels = features
        if self.laterals is not None:
            levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for column in self.columns:
            levels = column(levels)
        return levels
