"""The network in 8 bits by the tools of ONNX Runtime and OpenVINO, calibrated on the same images as ours."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from cases import Size, normalised
from sessions import INPUT
from torch import Tensor

from shelfkern.nn import ShelfNet

from .exported import KEPT, float_file, fresh_file

# Returns raw uint8 images (N, H, W, 3) of a size for calibration.
RangeImages = Callable[[Size], Tensor]


@functools.lru_cache(KEPT)
def onnx_file(model: ShelfNet, shape: torch.Size, labels: bool, range_images: RangeImages) -> Path:
    """An ONNX file with every op in 8 bits that ONNX Runtime supports, weights per output channel."""
    quantization = importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")
    folded, path = fresh_file("folded.onnx"), fresh_file("int8.onnx")
    # Batch norms are folded before weights are quantized.
    source = float_file(model, torch.zeros(shape), labels)
    shapes.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self._feeds = ({INPUT: images} for images in _inputs(model, shape, range_images))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    kinds = quantization.QuantType
    with _quietly():
        quantization.quantize_static(
            str(folded),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            # With signed activations ONNX Runtime takes twice the time on x86-64.
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
        )
    return path


@functools.lru_cache(KEPT)
def openvino_file(model: ShelfNet, shape: torch.Size, labels: bool, range_images: RangeImages) -> Path:
    """An OpenVINO file by its own tool, nncf; without it, ONNX Runtime's file, which OpenVINO also reads."""
    if importlib.util.find_spec("nncf") is None:
        return onnx_file(model, shape, labels, range_images)
    nncf, openvino = (importlib.import_module(name) for name in ("nncf", "openvino"))
    nncf.set_log_level(logging.ERROR)
    inputs = list(_inputs(model, shape, range_images))
    source = openvino.Core().read_model(str(float_file(model, torch.zeros(shape), labels)))
    with _quietly():
        found = nncf.quantize(source, nncf.Dataset(inputs), subset_size=len(inputs))
    path = fresh_file("xml")
    openvino.save_model(found, str(path), compress_to_fp16=False)
    return path


def _inputs(model: ShelfNet, shape: torch.Size, range_images: RangeImages) -> Iterator[np.ndarray]:
    """Normalised images for calibration, in the exported network's batch size."""
    batch, _, height, width = shape
    images = normalised(range_images((height, width)), model)
    return (part.contiguous().numpy() for part in images.split(batch) if len(part) == batch)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Context in which only errors are printed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
