"""Counting the paths from the input's finest level to the output's (paper 3.2).

A ShelfNet is read as an ensemble of the fully convolutional networks along its paths; more columns
and more levels give more of them.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch.fx
from torch import Tensor, nn

from .backbone import ResNet
from .blocks import AttentionMerge, ConvBNAct, DeconvMerge, Downsample, SharedBlock
from .shelfnet import ShelfNet

_LEAVES = (SharedBlock, AttentionMerge, DeconvMerge, Downsample, ConvBNAct, nn.Sequential)


class _BlockTracer(torch.fx.Tracer):
    """Traces down to blocks but not into them, so that their own residuals are not counted as paths."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _Trunk(nn.Module):
    def __init__(self, model: ShelfNet) -> None:
        super().__init__()
        self.backbone, self.shelf, self.levels = model.backbone, model.shelf, model.config.levels

    def forward(self, x: Tensor) -> Tensor:
        return self.shelf(self.backbone(x)[-self.levels :])[0]


def count_paths(model: ShelfNet) -> int:
    """Paths from the backbone's finest used level to the last column's finest level.

    Counted on the model's own graph of blocks: 29 for the published shelf of four levels, 4 for a
    single encoder-decoder pair of four levels (paper 3.2).
    """
    graph = _BlockTracer().trace(_Trunk(copy.deepcopy(model).eval()))
    source = _finest_feature(graph, model.backbone, model.config.levels)
    paths: Counter[torch.fx.Node] = Counter({source: 1})
    for node in graph.nodes:
        if node is not source:
            paths[node] = sum(paths[argument] for argument in node.all_input_nodes)
    return paths[next(node for node in graph.nodes if node.op == "output")]


def _finest_feature(graph: torch.fx.Graph, backbone: ResNet, levels: int) -> torch.fx.Node:
    stage = len(backbone.channels) - levels
    target = "backbone.act" if stage == 0 else f"backbone.layer{stage}"
    return next(node for node in graph.nodes if node.target == target)
