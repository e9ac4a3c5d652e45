"""Checkpoint files: the authors' ShelfNets, torchvision's backbones, state dicts in general."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing
from .nn import ShelfNet, create_model, from_weights, published, shipped_weights
from .nn.backbone import RESNET_STAGES, ResNet
from .nn.shelfnet import PUBLISHED
from .nn.weights import read_safetensors

# The keys under which training scripts nest a state dict, beside an optimizer's and other state.
_KEYS = ("state_dict", "model_state_dict", "model")

PathOrState = str | os.PathLike[str] | Mapping[str, Any]


class UnknownModelError(RuntimeError):
    """A state dict does not tell which model it belongs to."""


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a state dict from a .safetensors file or a torch.save file, onto the CPU.

    torch.save files are read with weights_only=True, so they cannot run code. A state dict nested under
    `state_dict`, `model_state_dict` or `model` is unwrapped, and `module.` prefixes are removed.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is truncated or of another kind, has no state dict, or has objects other than
            weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path)[0])
    try:
        return _unwrapped(load_torch(path))
    except TypeError as error:
        raise RuntimeError(f"{path} holds no state dict: {error}") from error


def _unwrapped(found: Any) -> dict[str, Any]:
    """The state dict in what was saved.

    Raises:
        TypeError: it is not a mapping of names.
    """
    if isinstance(found, Mapping):
        found = next((found[key] for key in _KEYS if isinstance(found.get(key), Mapping)), found)
    return published.unwrap(found)


def load_torch(path: Path) -> Any:
    """Reads a torch.save file of tensors and plain values, onto the CPU.

    Raises:
        RuntimeError: the file is truncated or of another kind, or has other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise RuntimeError(
                f"{path} holds {refused[1]} beside weights and is not unpickled, "
                "save its state dict alone where you trust it"
            ) from error
        raise RuntimeError(f"{path} is cut short, damaged or no PyTorch file") from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        # For damaged files torch raises whatever its zip and pickle readers run into.
        raise RuntimeError(f"{path} is cut short, damaged or no PyTorch file") from error


def save(model_or_state: nn.Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a state dict atomically: as safetensors if the name ends in .safetensors, else by torch.save.

    `shelfkern.nn.save_weights` writes files that contain the model's config too.

    Raises:
        ValueError: the name ends in .safetensors and a value is not a tensor.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    with replacing(path) as temporary:
        if Path(path).suffix == ".safetensors":
            save_file(_flat_tensors(state), temporary)
        else:
            torch.save(dict(state), temporary)


def _flat_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state has {name} of type {type(value).__name__}, it must be a tensor")
    # Cloned, because safetensors refuses tensors that share memory.
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def load_resnet(backbone: ResNet, path_or_state: PathOrState) -> None:
    """Loads torchvision's ResNet weights into a backbone; a classifier among them is ignored.

    Raises:
        RuntimeError: the weights are of another depth or width, or tensors are missing; the backbone is not
            changed.
    """
    state = _unwrapped(_state(path_or_state))
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    published.count_no_batches(state, backbone)
    expected = backbone.state_dict()
    theirs, ours = _resnet_name(state), _resnet_name(expected)
    if theirs is not None and theirs != ours:
        raise RuntimeError(f"state_dict is a {theirs}'s, the backbone is a {ours}")
    published.check_names(state, expected)
    published.check_values(state, expected)
    published.check_shapes(state, expected)
    backbone.load_state_dict(state)


def _state(path_or_state: PathOrState) -> Mapping[str, Any]:
    return load(path_or_state) if isinstance(path_or_state, (str, os.PathLike)) else path_or_state


def _resnet_name(state: Mapping[str, Any]) -> str | None:
    kind = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    blocks = {tuple(name.split(".")[:2]) for name in state}
    depths = tuple(sum(stage == f"layer{i}" for stage, *_ in blocks) for i in range(1, 5))
    return next((name for name, stages in RESNET_STAGES.items() if stages == (kind, depths)), None)


def save_published(model: ShelfNet, path: str | os.PathLike[str]) -> None:
    """Writes a model in the authors' format, as a torch.save file, which `from_published` reads.

    The state dicts of ShelfNet50 and 101 are nested under the key `state_dict`, as in the authors' files.

    Raises:
        ValueError: the authors have no such architecture, or a batch norm's |weight| is too small for their
            format; as `published.to_published`.
    """
    state = published.to_published(model)
    wrapped = {"state_dict": state} if model.config.head == "linear" else state
    with replacing(path) as temporary:
        torch.save(wrapped, temporary)


def open_model(name_or_path: str) -> ShelfNet:
    """The model of a shipped name, a `save_weights` file or an authors' checkpoint, in eval mode.

    Raises:
        OSError, RuntimeError: as for `from_weights` and `from_published`.
    """
    if names_its_model(name_or_path) or not Path(name_or_path).exists():
        return from_weights(name_or_path)
    return from_published(name_or_path)


def names_its_model(name_or_path: str) -> bool:
    """Whether weights say which model they belong to: a shipped name, or a file of `save_weights`.

    Raises:
        RuntimeError: a .safetensors file is cut short or of another kind.
    """
    path = Path(name_or_path)
    if name_or_path in shipped_weights():
        return True
    return path.suffix == ".safetensors" and path.is_file() and "config" in _metadata(path)


def _metadata(path: Path) -> dict[str, str]:
    """A safetensors file's, its tensors left where they are."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise RuntimeError(f"{path} is cut short or no safetensors file ({error})") from error


def from_published(path_or_state: PathOrState) -> ShelfNet:
    """Builds the published model that an authors' checkpoint belongs to, in eval mode.

    Raises:
        UnknownModelError: the checkpoint belongs to none of the four published models.
        RuntimeError: it is incomplete.
    """
    state = _unwrapped(_state(path_or_state))
    root = "pretrained." if "pretrained.conv1.weight" in state else "backbone."
    head = state.get("head.final.weight" if root == "pretrained." else "conv_out.conv_out.weight")
    backbone = _resnet_name({k.removeprefix(root): v for k, v in state.items() if k.startswith(root)})
    kind = "linear" if root == "pretrained." else "conv"
    made_of = {(config.head, config.backbone): name for name, config in PUBLISHED.items()}
    name = made_of.get((kind, str(backbone)))
    if name is None or not isinstance(head, Tensor) or head.dim() == 0:
        whose = "state_dict" if isinstance(path_or_state, Mapping) else f"{path_or_state}: state_dict"
        raise UnknownModelError(
            f"{whose} is none of the authors' four published models' and does not tell which model it "
            "belongs to: load it into one with load_state_dict, or save it with shelfkern.nn.save_weights"
        )
    with torch.device("meta"):
        model = create_model(name, len(head))
    model.load_state_dict(state, assign=True)
    return model.eval()
