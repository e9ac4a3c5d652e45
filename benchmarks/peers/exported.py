"""The network as an ONNX graph, for runtimes that read ONNX."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from sessions import INPUT, OUTPUT
from torch import Tensor

from shelfkern.nn import ShelfNet

from .network import Network

# Maximum number of networks whose files are kept.
KEPT = 32


def export(model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> bytes:
    """The network for images of exactly this shape as ONNX, from `images` to `result`."""
    network = Network(model, dtype, labels).to(images.device).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (images,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    assert program is not None  # guaranteed by dynamo=True
    found = io.BytesIO()
    program.save(found)
    return found.getvalue()


def float_file(model: ShelfNet, images: Tensor, labels: bool) -> Path:
    """The network in float32 as an ONNX file, exported once per process and image shape.

    model: must not change between calls.
    """
    return _float_file(model, images.shape, images.dtype, labels)


@functools.lru_cache(KEPT)
def _float_file(model: ShelfNet, shape: torch.Size, dtype: torch.dtype, labels: bool) -> Path:
    path = fresh_file("onnx")
    path.write_bytes(export(model, torch.zeros(shape, dtype=dtype), torch.float32, labels))
    return path


@functools.cache
def folder() -> Path:
    """A folder that is deleted when the process ends."""
    found = tempfile.mkdtemp(prefix="shelfkern-")
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return Path(found)


def fresh_file(suffix: str) -> Path:
    """A name for a new file in `folder`."""
    return folder() / f"{len(list(folder().iterdir()))}.{suffix}"
