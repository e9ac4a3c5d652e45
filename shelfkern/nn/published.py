"""Conversion of the authors' checkpoints to this library's state dicts, and back.

The authors' real-time models use in-place activated batch norms, which scale by |weight| + 1e-5 and have no
`num_batches_tracked`; otherwise only names differ. Their files also contain tensors that no forward pass
uses: a shared block `decoder.inconv` and the backbone's classifier.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blocks import SharedBlock

if TYPE_CHECKING:
    from .shelfnet import ShelfNet, ShelfNetConfig

EPS = 1e-5

_WRAPPERS = ("module.", "_orig_mod.")


def prefixes(config: ShelfNetConfig) -> list[tuple[str, str]]:
    """Pairs of (prefix here, prefix in the authors' files); empty for architectures the authors do not have.

    The authors' networks have two pairs of columns: a decoder (column 2) and a ladder (columns 3 and 4).
    """
    shape = (config.head, config.merge, config.levels, config.pairs)
    if shape == ("linear", "deconv", 4, 2):
        return [*_names_50(config), *_shelf_names(config, "head.")]
    if shape == ("conv", "attention", 3, 2):
        return [*_names_lw(config), *_shelf_names(config, "")]
    return []


def _names_50(config: ShelfNetConfig) -> Iterator[tuple[str, str]]:
    yield "backbone.", "pretrained."
    for i in range(config.levels if config.lateral else 0):
        yield f"shelf.laterals.{i}.conv.", f"head.conv{i + 1}."
        yield f"shelf.laterals.{i}.bn.", f"head.bn{i + 1}."
    yield "head.classify.", "head.final."
    if config.presence:
        yield "presence_head.classify.", "head.selayer."
    if config.aux:
        yield "aux_heads.0.features.conv.", "auxlayer.conv5.0."
        yield "aux_heads.0.features.bn.", "auxlayer.conv5.1."
        yield "aux_heads.0.classify.", "auxlayer.conv5.4."


def _names_lw(config: ShelfNetConfig) -> Iterator[tuple[str, str]]:
    yield "backbone.", "backbone."
    for i in range(config.levels if config.lateral else 0):
        yield f"shelf.laterals.{i}.", f"trans{i + 1}."
    heads = {"head.": "conv_out."}
    if config.aux:
        heads |= {"aux_heads.0.": "conv_out16.", "aux_heads.1.": "conv_out32."}
    for own, theirs in heads.items():
        yield f"{own}features.", f"{theirs}conv."
        yield f"{own}classify.", f"{theirs}conv_out."


def _shelf_names(config: ShelfNetConfig, root: str) -> Iterator[tuple[str, str]]:
    decoder, ladder = f"{root}decoder.", f"{root}ladder."
    yield from _block_names("shelf.columns.0.bottom.", f"{decoder}bottom.")
    yield from _block_names("shelf.columns.1.entry.", f"{ladder}inconv.")
    yield from _block_names("shelf.columns.1.bottom.", f"{ladder}bottom.")
    merge_names = _deconv_names if config.merge == "deconv" else _attention_names
    for i in range(config.levels - 1):
        yield from _block_names(f"shelf.columns.1.blocks.{i}.", f"{ladder}down_module_list.{i}.")
        yield f"shelf.columns.1.downs.{i}.conv.", f"{ladder}down_conv_list.{i}."
        yield from merge_names(f"shelf.columns.0.merges.{i}.", decoder, i)
        yield from merge_names(f"shelf.columns.2.merges.{i}.", ladder, i)


def _block_names(own: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield f"{own}conv.", f"{theirs}conv1."
    yield f"{own}bn1.", f"{theirs}bn1."
    yield f"{own}bn2.", f"{theirs}bn2."


def _deconv_names(own: str, column: str, i: int) -> Iterator[tuple[str, str]]:
    yield f"{own}deconv.", f"{column}up_conv_list.{i}."
    yield from _block_names(f"{own}block.", f"{column}up_dense_list.{i}.")


def _attention_names(own: str, column: str, i: int) -> Iterator[tuple[str, str]]:
    yield f"{own}refine.features.", f"{column}up_conv_list.{i}.conv."
    yield f"{own}refine.gate_conv.", f"{column}up_conv_list.{i}.conv_atten."
    yield f"{own}refine.gate_bn.", f"{column}up_conv_list.{i}.bn_atten."
    yield f"{own}fuse.", f"{column}up_dense_list.{i}."


def unused_prefixes(config: ShelfNetConfig) -> tuple[str, ...]:
    """Prefixes of the tensors in the authors' files that no forward pass uses."""
    if config.head == "linear":
        return "head.decoder.inconv.", "pretrained.fc."
    return "decoder.inconv.", "backbone.fc."


def adapt(state_dict: Mapping[str, Any], model: ShelfNet) -> dict[str, Any]:
    """Converts a state dict of this library's or the authors' names to this library's names.

    It may be nested under `state_dict` and have prefixes such as `module.`. Unknown names are left unchanged,
    and so is the model.

    Raises:
        TypeError: state_dict does not map names to tensors.
        RuntimeError: two of its names mean the same tensor.
    """
    state = unwrap(state_dict)
    table = prefixes(model.config)
    if _is_published(state, table):
        state = _own_names(state, table, unused_prefixes(model.config))
        for name in _inplace_norms(model):
            weight = state.get(f"{name}.weight")
            if isinstance(weight, Tensor):
                state[f"{name}.weight"] = weight.abs() + EPS
    count_no_batches(state, model)
    return state


def count_no_batches(state: dict[str, Any], model: nn.Module) -> None:
    """Adds `num_batches_tracked` = 0 to batch norms that lack it.

    The authors' in-place norms and all files older than torch 0.4.1 lack it.
    """
    for name in _norms(model):
        mean = state.get(f"{name}.running_mean")
        if isinstance(mean, Tensor):
            zero = torch.zeros((), dtype=torch.long, device=mean.device)
            state.setdefault(f"{name}.num_batches_tracked", zero)


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state dict, or of the one nested under `state_dict`, without the prefixes of wrappers.

    Raises:
        TypeError: it does not map names to tensors.
    """
    inner = state_dict
    if isinstance(state_dict, Mapping):
        inner = state_dict.get("state_dict", state_dict)
    if not isinstance(inner, Mapping):
        raise TypeError(f"state_dict is of type {type(inner).__name__}, it must map names to tensors")
    odd = [key for key in inner if not isinstance(key, str)]
    if odd:
        raise TypeError(f"state_dict has the key {odd[0]!r}, keys must be names")
    state: OrderedDict[str, Any] = OrderedDict(inner)
    if hasattr(inner, "_metadata"):  # versions of the modules' formats, which torch looks for here
        state._metadata = inner._metadata  # type: ignore[attr-defined]
    while wrapper := next((w for w in _WRAPPERS if state and all(k.startswith(w) for k in state)), None):
        state = OrderedDict((key.removeprefix(wrapper), value) for key, value in state.items())
    return state


def _is_published(state: Mapping[str, Any], table: list[tuple[str, str]]) -> bool:
    own = tuple(prefix for prefix, _ in table)
    theirs = tuple(prefix for _, prefix in table)
    return any(key.startswith(theirs) and not key.startswith(own) for key in state)


def _own_names(
    state: Mapping[str, Any], table: list[tuple[str, str]], unused: tuple[str, ...]
) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in state.items():
        if key.startswith(unused):
            continue
        own, theirs = next((row for row in table if key.startswith(row[1])), ("", ""))
        name = own + key.removeprefix(theirs)
        if name in renamed:
            raise RuntimeError(f"state_dict holds {name} twice, under this model's name and the authors'")
        renamed[name] = value
    return renamed


def _norms(model: nn.Module) -> list[str]:
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    return [name for name, module in model.named_modules() if isinstance(module, norms)]


def _inplace_norms(model: ShelfNet) -> list[str]:
    """Names of batch norms that are in-place in the authors' real-time models: all but shared blocks' bn2."""
    if model.config.merge != "attention":
        return []
    plain = {f"{name}.bn2" for name, module in model.named_modules() if isinstance(module, SharedBlock)}
    return [name for name in _norms(model) if name not in plain]


def check(state: Mapping[str, Any], model: ShelfNet, strict: bool = True) -> None:
    """Checks that torch can load a state dict completely.

    Args:
        state: a result of `adapt`.
        model: the model; not changed.
        strict: whether missing and unexpected tensors are errors too.

    Raises:
        RuntimeError: something does not fit; the message is one sentence.
    """
    expected = model.state_dict()
    if strict:
        check_names(state, expected)
    check_values(state, expected)
    _check_classes(state, expected, model.config.num_classes)
    check_shapes(state, expected)


def check_names(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError unless both have the same names."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    faults = []
    if missing:
        faults.append(f"lacks {_count(missing)} of the model ({_some(missing)})")
    if unexpected:
        faults.append(f"has {_count(unexpected)} that the model does not have ({_some(unexpected)})")
    if faults:
        raise RuntimeError(f"state_dict {' and '.join(faults)}")


def check_values(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError unless all values under common names are tensors that can be copied."""
    for name in (name for name in expected if name in state):
        value = state[name]
        if not isinstance(value, Tensor):
            raise RuntimeError(f"state_dict has {name} of type {type(value).__name__}, it must be a tensor")
        if value.is_meta and not expected[name].is_meta:
            raise RuntimeError(f"state_dict has {name} on the meta device, where it holds no values")
        if value.is_floating_point() != expected[name].is_floating_point():
            raise RuntimeError(f"state_dict has {name} as {value.dtype}, the model as {expected[name].dtype}")


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError unless tensors under common names have the same shapes."""
    wrong = _misshapen(state, expected)
    if wrong:
        shapes = [f"{n} is {tuple(state[n].shape)} and must be {tuple(expected[n].shape)}" for n in wrong]
        raise RuntimeError(f"state_dict has {_count(wrong)} of the wrong shape: {_some(shapes)}")


def _check_classes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_classes: int) -> None:
    """Raises RuntimeError if another number of classes explains every wrong shape."""
    wrong = _misshapen(state, expected)
    if "head.classify.weight" not in wrong or state["head.classify.weight"].dim() != 4:
        return
    classes = state["head.classify.weight"].shape[0]
    if all(
        expected[n].shape[:1] == (num_classes,) and state[n].shape == (classes, *expected[n].shape[1:])
        for n in wrong
    ):
        raise RuntimeError(
            f"state_dict has {classes} classes, the model {num_classes}; build it with num_classes={classes}"
        )


def _misshapen(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name in expected if name in state and state[name].shape != expected[name].shape]


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _some(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (", ..." if len(items) > most else "")


@torch.no_grad()
def to_published(model: ShelfNet) -> dict[str, Tensor]:
    """A state dict in the authors' format, for a network with the same outputs in eval mode.

    Tensors that no forward pass uses are neutral: zeros for weights and biases, the identity for batch norms.
    In the real-time models that format cannot store a negative scale of a batch norm: its sign is moved into
    the convolution before it.

    Raises:
        ValueError: the authors have no such architecture, or a batch norm's |weight| is below 1e-5, which
            their format adds to it.
    """
    table = prefixes(model.config)
    if not table:
        raise ValueError(
            "model is not one of the authors' architectures: deconv merges, a linear head and 4 levels, "
            "or attention merges, conv heads and 3 levels, both with 2 pairs"
        )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    shared = {f"{n}.bn1": n for n, module in model.named_modules() if isinstance(module, SharedBlock)}
    for norm in _inplace_norms(model):
        if norm in shared:
            _make_shared_positive(state, shared[norm])
        else:
            _make_positive(state, norm)
        _subtract_eps(state, norm)
        del state[f"{norm}.num_batches_tracked"]
    published = {_their_name(name, table): value for name, value in state.items()}
    return published | _unused_tensors(model)


def _make_positive(state: dict[str, Tensor], norm: str) -> None:
    """w * (conv(x) - mean) = -w * (-conv(x) + mean), channel by channel."""
    sign = _sign(state[f"{norm}.weight"])
    state[f"{_conv_before(norm)}.weight"] *= sign[:, None, None, None]
    state[f"{norm}.running_mean"] *= sign
    state[f"{norm}.weight"] *= sign


def _make_shared_positive(state: dict[str, Tensor], block: str) -> None:
    """Like `_make_positive`. The second use of the convolution changes sign too, which bn2 undoes."""
    sign = _sign(state[f"{block}.bn1.weight"])
    state[f"{block}.conv.weight"] *= sign[:, None, None, None]
    for name in ("conv.bias", "bn1.running_mean", "bn1.weight", "bn2.running_mean", "bn2.weight"):
        state[f"{block}.{name}"] *= sign


def _sign(weight: Tensor) -> Tensor:
    return torch.where(weight < 0, -1, 1).to(weight.dtype)


def _conv_before(norm: str) -> str:
    parent, _, leaf = norm.rpartition(".")
    return f"{parent}.0" if leaf == "1" else f"{parent}.{leaf.replace('bn', 'conv')}"


def _subtract_eps(state: dict[str, Tensor], norm: str) -> None:
    name = f"{norm}.weight"
    smallest = state[name].min().item()
    if smallest < EPS:
        raise ValueError(f"{name} has the magnitude {smallest:.3g}, the authors' format needs at least {EPS}")
    state[name] -= EPS


def _their_name(name: str, table: list[tuple[str, str]]) -> str:
    own, theirs = next(row for row in table if name.startswith(row[0]))
    return theirs + name.removeprefix(own)


def _unused_tensors(model: ShelfNet) -> dict[str, Tensor]:
    block = SharedBlock(model.config.widths[0], dropout=0.0, negative_slope=0.0)
    for parameter in block.conv.parameters():
        nn.init.zeros_(parameter)
    names = dict(block.state_dict())
    inconv, fc = unused_prefixes(model.config)
    if model.config.head == "conv":
        del names["bn1.num_batches_tracked"]
    tensors = {inconv + name.replace("conv.", "conv1."): value for name, value in names.items()}
    if model.config.head == "linear":
        tensors[f"{fc}weight"] = torch.zeros(1000, model.backbone.channels[-1])
        tensors[f"{fc}bias"] = torch.zeros(1000)
    like = model.backbone.conv1.weight
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in tensors.items()
    }
