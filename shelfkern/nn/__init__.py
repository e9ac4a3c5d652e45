"""The reference model: plain torch.nn modules, written to be read beside the paper."""

from .fused import fuse_for_training
from .paths import count_paths
from .registry import create_model, list_models
from .shelfnet import (
    ShelfNet,
    ShelfNetConfig,
    ShelfNetOutput,
    shelfnet18_lw,
    shelfnet34_lw,
    shelfnet50,
    shelfnet101,
)
from .weights import from_weights, save_weights, shipped_weights, transfer_weights

__all__ = [
    "ShelfNet",
    "ShelfNetConfig",
    "ShelfNetOutput",
    "count_paths",
    "create_model",
    "from_weights",
    "fuse_for_training",
    "list_models",
    "save_weights",
    "shelfnet18_lw",
    "shelfnet34_lw",
    "shelfnet50",
    "shelfnet101",
    "shipped_weights",
    "transfer_weights",
]
