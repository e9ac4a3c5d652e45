"""The published models by name, for command lines, recipes and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .shelfnet import PUBLISHED, ShelfNet, ShelfNetConfig, build_published
from .weights import from_weights


def list_models() -> tuple[str, ...]:
    """Names that `create_model` takes: "shelfnet18_lw", "shelfnet34_lw", "shelfnet50", "shelfnet101"."""
    return tuple(PUBLISHED)


def create_model(
    name: str,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    *,
    fused: bool = False,
    **config_changes: Any,
) -> ShelfNet:
    """Builds a published model by name.

    Without weights it is what the function of that name builds: randomly initialised and in train mode. With
    weights it is what `from_weights` builds: of the widths and other settings stored in the file, and in eval
    mode; with another number of classes the layers that produce class scores are randomly initialised.

    Args:
        name: one of `list_models()`.
        num_classes: classes of the scores; by default those of the weights, or of the published model.
        weights: a shipped name (see `shipped_weights`) or a file that `save_weights` wrote, of a variant of
            the named model. `shelfkern.checkpoints.from_published` reads the authors' checkpoints.
        fused: whether it trains with fused ops, as after `fuse_for_training`.
        **config_changes: other fields of `ShelfNetConfig`, in place of the published or stored values.

    Raises:
        ValueError: name is not a published model, weights belong to another model or do not fit the changed
            fields, or a field has an invalid value.
        TypeError: config_changes has a name that is not a field of `ShelfNetConfig`.
        FileNotFoundError, RuntimeError: the weights cannot be read, as by `from_weights`.
    """
    if name not in PUBLISHED:
        raise ValueError(f"name is {name!r}, it may be one of {', '.join(PUBLISHED)}")
    if weights is not None:
        model = from_weights(weights, num_classes=num_classes, fused=fused, **config_changes)
        _check_kind(model.config, {**vars(PUBLISHED[name]), **config_changes}, name, str(weights))
        return model
    if num_classes is not None:
        config_changes["num_classes"] = num_classes
    return build_published(name, fused, config_changes)


def _check_kind(config: ShelfNetConfig, wanted: Mapping[str, Any], name: str, weights: str) -> None:
    """Raises ValueError unless a config differs from the wanted one in no more than widths and settings."""
    for field in ("backbone", "merge", "head", "lateral"):
        found = getattr(config, field)
        if found != wanted[field]:
            raise ValueError(f"weights {weights!r} has {field} {found!r}, {name} has {wanted[field]!r}")
