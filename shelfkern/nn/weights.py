"""Weights files: safetensors with the config of the model that they belong to.

The metadata holds `config` and `normalisation` (JSON of the fields of `ShelfNetConfig`, `Normalisation`)
and, where known, `classes` (JSON list of names) and `palette` (JSON list of [r, g, b]).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..normalisation import Normalisation
from .fused import fuse_for_training
from .shelfnet import ShelfNet, ShelfNetConfig

# Names of heads that are used in training only.
_TRAINING_HEADS = ("aux_heads.", "presence_head.")
_OWN_METADATA = ("config", "classes", "palette", "normalisation")


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package, for `from_weights`."""
    folder = resources.files("shelfkern").joinpath("weights")
    if not folder.is_dir():
        return []
    suffix = ".safetensors"
    return sorted(f.name.removesuffix(suffix) for f in folder.iterdir() if f.name.endswith(suffix))


def from_weights(
    name_or_path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    num_classes: int | None = None,
    *,
    fused: bool = False,
    **config_changes: Any,
) -> ShelfNet:
    """Builds the model that a weights file belongs to, in float32 and eval mode.

    For fine-tuning on other classes give their number: the layers that produce class scores (of the main, the
    auxiliary and the presence heads) are then randomly initialised, all others have the file's weights.

        model = from_weights("camvid", num_classes=4).train()

    Args:
        name_or_path: a shipped name (see `shipped_weights`) or a file that `save_weights` wrote.
        device: where the model is put; the CPU by default.
        num_classes: classes of the scores; those of the file by default.
        fused: whether it trains with fused ops, as after `fuse_for_training`.
        **config_changes: other fields of `ShelfNetConfig` in place of the file's, such as dropout,
            input_scale, or aux=False; the file's weights must fit them.

    Returns:
        The model with the file's `normalisation`, and its `classes` and `palette` where the file has them
        and `num_classes` is the file's; otherwise they are None.

    Raises:
        FileNotFoundError: neither a shipped name nor a file.
        RuntimeError: the file is cut short, not one of this library's, or does not fit its own config.
        ValueError: num_classes or a field has an invalid value, or the weights do not fit the changed fields.
        TypeError: config_changes has a name that is not a field of `ShelfNetConfig`.
    """
    if num_classes is not None:
        config_changes["num_classes"] = num_classes
    with _located(name_or_path) as path:
        model = _from_file(path)
    config = dataclasses.replace(model.config, **config_changes)
    if config != model.config:
        model = _changed(model, config, f"weights {str(name_or_path)!r}")
    if fused:
        fuse_for_training(model)
    return model.to(device) if device is not None else model


@contextlib.contextmanager
def _located(name_or_path: str | os.PathLike[str]) -> Iterator[Path]:
    """The file of a shipped name or a path."""
    shipped = shipped_weights()
    if name_or_path in shipped:
        resource = resources.files("shelfkern").joinpath("weights").joinpath(f"{name_or_path}.safetensors")
        with resources.as_file(resource) as path:
            yield path
        return
    path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(shipped) or "none"
        raise FileNotFoundError(f"weights {str(path)!r} is neither a file nor a shipped name ({names})")
    yield path


def _changed(stored: ShelfNet, config: ShelfNetConfig, origin: str) -> ShelfNet:
    """A model of another config with the weights of the stored one."""
    model = ShelfNet(config)
    transfer_weights(model, stored.state_dict(), origin)
    model.normalisation = stored.normalisation
    if config.num_classes == stored.config.num_classes:
        model.classes, model.palette = stored.classes, stored.palette
    return model.eval()


def transfer_weights(
    model: ShelfNet, state_dict: Mapping[str, Tensor], origin: str = "state_dict"
) -> list[str]:
    """Loads into a model the weights of another one with other classes.

    The layers that produce class scores keep their present values where theirs are missing or of another
    shape. Auxiliary and presence heads that the model does not have are ignored. All else must fit.

    Args:
        model: changed in place.
        state_dict: of a ShelfNet, under this library's names.
        origin: what error messages call it.

    Returns:
        The names of the tensors that kept their values.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the model is left as it was.
    """
    own = model.state_dict()
    unknown = [name for name in state_dict if name not in own and not name.startswith(_TRAINING_HEADS)]
    if unknown:
        raise ValueError(f"{origin} has {unknown[0]}, which the model does not have")
    kept = [name for name in own if name not in state_dict or state_dict[name].shape != own[name].shape]
    other = [name for name in kept if ".classify." not in name]
    if other:
        name = other[0]
        found = f"has {name} of {tuple(state_dict[name].shape)}" if name in state_dict else f"lacks {name}"
        raise ValueError(f"{origin} {found}, the model needs it of {tuple(own[name].shape)}")
    fitting = {name: value for name, value in state_dict.items() if name in own and name not in kept}
    model.load_state_dict(fitting, strict=False)
    return kept


def save_weights(
    model: ShelfNet,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes a model to a safetensors file that `from_weights` reads.

    Args:
        model: any ShelfNet; its tensors may be on any device and in any memory format.
        path: the file; an existing one is replaced atomically.
        dtype: dtype that the weights of convolutions and linear layers are stored in. Norms and biases are
            small and sensitive to rounding, so they are stored as float32.
        classes: a name per class; `model.classes` by default.
        palette: an (r, g, b) from 0 to 255 per class; `model.palette` by default.
        extra: further metadata, such as the training command or its result.

    Raises:
        OSError: the file cannot be written.
        ValueError: classes or palette has not one entry per class, extra has a key that is used by this
            library, or a weight is too large for dtype.
    """
    classes, palette = classes or model.classes, palette or model.palette
    metadata = _metadata(model, classes, palette, extra or {})
    state = {name: _stored(name, value, dtype) for name, value in model.state_dict().items()}
    with replacing(path, lasting=True) as temporary:
        save_file(state, temporary, metadata)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, all in memory.

    Raises:
        RuntimeError: the file is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            # Copied, because mapped tensors would change if the file were overwritten.
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise RuntimeError(f"{path} is cut short or no safetensors file ({error})") from error


def _metadata(
    model: ShelfNet,
    classes: Sequence[str] | None,
    palette: Sequence[Sequence[int]] | None,
    extra: Mapping[str, str],
) -> dict[str, str]:
    taken = [key for key in extra if key in _OWN_METADATA]
    if taken:
        raise ValueError(f"extra has the key {taken[0]!r}, it may be any but {', '.join(_OWN_METADATA)}")
    config, normalisation = model.config, model.normalisation
    known: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "normalisation": dataclasses.asdict(normalisation),
    }
    if classes is not None:
        known["classes"] = _checked_classes(classes, config.num_classes)
    if palette is not None:
        known["palette"] = _checked_palette(palette, config.num_classes)
    return {**extra, **{key: json.dumps(value) for key, value in known.items()}}


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    stored = value.to(dtype if value.dim() > 1 else torch.float32)
    if torch.isinf(stored).any() and not torch.isinf(value).any():
        limit = torch.finfo(dtype).max
        raise ValueError(f"{name} reaches {value.abs().max():.6g}, dtype {dtype} ends at {limit:.6g}")
    return stored


def _from_file(path: Path) -> ShelfNet:
    state, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise RuntimeError(
            f"{path} has no model config in its metadata, it must be a file that save_weights wrote"
        )
    try:
        config = ShelfNetConfig(**json.loads(metadata["config"]))
        known = {key: json.loads(metadata[key]) for key in _OWN_METADATA if key in metadata}
        model = _build(config, state)
        model.normalisation = Normalisation(**known.get("normalisation", {}))
        if "classes" in known:
            model.classes = _checked_classes(known["classes"], config.num_classes)
        if "palette" in known:
            model.palette = _checked_palette(known["palette"], config.num_classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"{path} does not fit its own metadata: {error}") from error
    return model.eval()


def _build(config: ShelfNetConfig, state: dict[str, Tensor]) -> ShelfNet:
    # On the meta device: initial values would be thrown away, and drawing them would change the random state.
    with torch.device("meta"):
        model = ShelfNet(config)
    full = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    model.load_state_dict(full, assign=True)
    return model


def _checked_classes(classes: Sequence[str], num_classes: int) -> tuple[str, ...]:
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {classes!r}, it must be a list of names")
    if len(classes) != num_classes:
        raise ValueError(f"classes has {len(classes)} names, the model has {num_classes} classes")
    return tuple(classes)


def _checked_palette(palette: Sequence[Sequence[int]], num_classes: int) -> tuple[tuple[int, int, int], ...]:
    if len(palette) != num_classes:
        raise ValueError(f"palette has {len(palette)} colours, the model has {num_classes} classes")
    for colour in palette:
        if len(colour) != 3 or not all(0 <= int(c) <= 255 for c in colour):
            raise ValueError(f"palette has the colour {colour!r}, it must be (r, g, b) from 0 to 255")
    return tuple((int(r), int(g), int(b)) for r, g, b in palette)
