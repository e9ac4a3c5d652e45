"""Whether a model's tensors are still what they were when its weights were folded."""

from __future__ import annotations

import ctypes
import itertools

from torch import Tensor, nn


class Fingerprint:
    """A model's tensors at one moment; `matches()` costs microseconds.

    Seen are: tensors or modules replaced, in-place writes that torch's version counters count
    (optimisers, load_state_dict, copy_), and for CPU tensors also writes through `.data`, numpy or
    another process, if they change a tensor's first or last element.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [
            slots
            for module in model.modules()
            for slots in (module._parameters, module._buffers, module._modules)
        ]
        # Held, so that no id and no address is reused while this lives.
        self._held = self._contents()
        self._tensors = [item for item in self._held if isinstance(item, Tensor)]
        self._storages = [tensor.detach() for tensor in self._tensors]
        self._words = list(itertools.chain.from_iterable(map(_end_words, self._storages)))
        self._state = self._read()

    def matches(self) -> bool:
        """Whether nothing has changed since."""
        held = self._contents()
        same = len(held) == len(self._held) and all(map(_is, held, self._held))
        return same and self._read() == self._state

    def _contents(self) -> list[object]:
        return [item for slots in self._slots for item in slots.values()]

    def _read(self) -> list[int]:
        state = [tensor.data_ptr() for tensor in self._tensors]
        state += [_version(tensor) for tensor in self._tensors]
        return state + [word.value for word in self._words]


def _is(a: object, b: object) -> bool:
    return a is b


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode cannot be changed outside it and have no counter.
    return 0 if tensor.is_inference() else tensor._version


def _end_words(tensor: Tensor) -> list[ctypes._SimpleCData[int]]:
    if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
        return []
    words = (ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64)
    word: type[ctypes._SimpleCData[int]] = words[tensor.itemsize.bit_length() - 1]
    first = tensor.data_ptr()
    last = first + (tensor.numel() - 1) * tensor.itemsize
    return [word.from_address(first), word.from_address(last)]
