"""The published models by name, for command lines, recipes and benchmarks."""

from __future__ import annotations

from typing import Any

from .shelfnet import PUBLISHED, ShelfNet, build_published


def list_models() -> tuple[str, ...]:
    """Names that `create_model` takes: "shelfnet18_lw", "shelfnet34_lw", "shelfnet50", "shelfnet101"."""
    return tuple(PUBLISHED)


def create_model(
    name: str, num_classes: int | None = None, *, fused: bool = False, **config_changes: Any
) -> ShelfNet:
    """Builds a published model by name: what the function of that name builds.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the scores; by default as published.
        fused: whether it trains with fused ops, as after `fuse_for_training`.
        **config_changes: other fields of `ShelfNetConfig`, in place of the published values.

    Raises:
        ValueError: name is not a published model, or a field has an invalid value.
        TypeError: config_changes has a name that is not a field of `ShelfNetConfig`.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name is {name!r}, it may be one of {', '.join(PUBLISHED)}")
    if num_classes is not None:
        config_changes["num_classes"] = num_classes
    return build_published(name, fused, config_changes)
