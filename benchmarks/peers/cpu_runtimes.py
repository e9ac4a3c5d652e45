"""ONNX Runtime and OpenVINO on a CPU, if installed, with the network exported as ONNX."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import torch
from cases import range_images
from sessions import RUNTIMES
from torch import Tensor

from shelfkern.nn import ShelfNet

from . import Peer, Run
from .exported import float_file
from .quantised import RangeImages, onnx_file, openvino_file


def _missing(*packages: str) -> str | None:
    found = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(found)}" if found else None


def read(images: Tensor) -> Tensor:
    """Images in the form of the exported network's input: raw, or in float32, contiguous."""
    return (images if images.dtype is torch.uint8 else images.float()).contiguous()


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A runtime with as many threads as torch has.

    Attributes:
        range_images: returns images for calibrating 8-bit networks.
    """

    key: str = ""
    name: str = ""
    ours: bool = False
    # Quantizing a large network takes half a minute.
    seconds: float = 240
    range_images: RangeImages = range_images

    def why_not(self) -> str | None:
        """It needs its own package, and onnx and onnxscript."""
        return _missing(self.key, "onnx", "onnxscript")

    def file(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Path:
        """The network in the runtime's file format, for images of a shape; in 8 bits calibrated.

        Raises:
            ValueError: it has no convolutions of dtype.
        """
        raise NotImplementedError

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`; it reads normalised float32 images in place."""
        images = read(images)
        path = self.file(model, images, dtype, labels)
        name = str(dtype).removeprefix("torch.")
        call = RUNTIMES[self.key](path, images.numpy(), torch.get_num_threads(), name)
        return lambda: torch.from_numpy(call())


@dataclasses.dataclass(frozen=True)
class OnnxRuntime(Runtime):
    """ONNX Runtime with its own CPU kernels."""

    key: str = "onnxruntime"
    name: str = "ONNX Runtime"

    def file(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Path:
        """As `Runtime.file`."""
        if dtype is torch.int8:
            return onnx_file(model, images.shape, labels, self.range_images)
        if dtype is not torch.float32:
            raise ValueError(
                f"dtype is {dtype}, ONNX Runtime's convolutions on a CPU take float32 or codes of int8"
            )
        return float_file(model, images, labels)


@dataclasses.dataclass(frozen=True)
class OpenVino(Runtime):
    """OpenVINO's CPU plugin."""

    key: str = "openvino"
    name: str = "OpenVINO"

    def file(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Path:
        """As `Runtime.file`. bfloat16 is selected when it is compiled."""
        if dtype is torch.int8:
            return openvino_file(model, images.shape, labels, self.range_images)
        return float_file(model, images, labels)


def on_cpu() -> list[Peer]:
    """Peers on a CPU."""
    return [OnnxRuntime(), OpenVino()]
