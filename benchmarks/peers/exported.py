"""The network as an ONNX graph, for runtimes that read one."""

from __future__ import annotations

import io
import warnings

import torch
from torch import Tensor

from shelfkern.nn import ShelfNet

from .network import Network

INPUT, OUTPUT = "images", "result"


def export(model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> bytes:
    """The network for images of this very shape as ONNX: `images` to `result`."""
    network = Network(model, dtype, labels).to(images.device).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (images,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    assert program is not None  # as dynamo=True promises
    found = io.BytesIO()
    program.save(found)
    return found.getvalue()
