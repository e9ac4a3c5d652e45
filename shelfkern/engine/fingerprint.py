"""Whether a model is still what it was when its weights were folded."""

from __future__ import annotations

import ctypes
import itertools
import operator
from typing import Any

from torch import Tensor, nn

from ..nn.shelfnet import ShelfNet

# What else of a module is folded, by its kind.
_ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    ShelfNet: ("config",),
    nn.modules.batchnorm._BatchNorm: ("eps",),
    nn.LeakyReLU: ("negative_slope",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    nn.modules.conv._ConvNd: (
        "stride", "padding", "dilation", "groups", "padding_mode", "output_padding",
    ),
}  # fmt: skip

_pointer = Tensor.data_ptr
_version = operator.attrgetter("_version")
_values = dict[str, Any].values
_value = operator.attrgetter("value")


class Fingerprint:
    """A model at one moment; `matches()` costs microseconds.

    Seen are: hooks; attributes of convolutions, norms and activations; tensors or modules replaced;
    in-place writes that torch's version counters count (optimisers, load_state_dict, copy_), and for CPU
    tensors also writes through `.data`, numpy or another process, if they change a tensor's first or last
    element.

    Raises:
        RuntimeError: the memory of a tensor was freed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots: list[dict[str, Any]] = [
            slots
            for module in model.modules()
            for slots in (module._parameters, module._buffers, module._modules)
        ]
        self._hooks = [
            hooks
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._settings = [
            (operator.attrgetter(*names), modules)
            for kind, names in _ATTRIBUTES.items()
            if (modules := [module for module in model.modules() if isinstance(module, kind)])
        ]
        self._set = self._attributes()
        # Held, so that no id and no address is reused while this lives.
        self._held = self._contents()
        # Counters of batches do not matter.
        self._tensors = [item for item in self._held if isinstance(item, Tensor) and item.is_floating_point()]
        # Tensors made in inference mode cannot be changed outside it and have no counter.
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._storages = [tensor.detach() for tensor in self._tensors]
        self._pointers = self._addresses()
        self._words = list(itertools.chain.from_iterable(map(_end_words, self._storages)))
        self._state = self._read()

    def matches(self) -> bool:
        """Whether nothing has changed since."""
        # Every call of an accelerated model asks: loops in C, not in Python.
        held = self._contents()
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        same = same and not any(self._hooks) and self._attributes() == self._set
        # Storages may have moved, as those of `share_memory` do: words are read only where memory still is.
        return same and self._addresses() == self._pointers and self._read() == self._state

    def _contents(self) -> list[object]:
        return list(itertools.chain.from_iterable(map(_values, self._slots)))

    def _attributes(self) -> list[list[Any]]:
        return [list(map(get, modules)) for get, modules in self._settings]

    def _addresses(self) -> list[int]:
        return list(map(_pointer, self._tensors))

    def _read(self) -> list[int]:
        state = list(map(_version, self._counted))
        state += map(_value, self._words)
        return state


def _end_words(tensor: Tensor) -> list[ctypes._SimpleCData[int]]:
    if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
        return []
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
    if tensor.untyped_storage().nbytes() < needed:
        shape = tuple(tensor.shape)
        raise RuntimeError(f"model has a tensor of {shape} whose storage was freed, it must hold its values")
    words = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)
    word: type[ctypes._SimpleCData[int]] = words[tensor.itemsize.bit_length() - 1]
    first = tensor.data_ptr()
    last = first + (tensor.numel() - 1) * tensor.itemsize
    return [word.from_address(first), word.from_address(last)]
