"""TensorRT, if its Python package is installed: the network exported as ONNX, in a CUDA graph."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import torch
from measure import record
from torch import Tensor

from shelfkern.nn import ShelfNet

from . import Peer, Run
from .exported import INPUT, OUTPUT, export

# TensorRT's most thorough search.
OPTIMISATION = 5
NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
}


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """An engine with the network's own dtypes, which reads its images in place."""

    key: str = "tensorrt"
    name: str = "TensorRT"
    ours: bool = False
    seconds: float = 240

    def why_not(self) -> str | None:
        """It needs the packages tensorrt, onnx and onnxscript."""
        missing = [
            name for name in ("tensorrt", "onnx", "onnxscript") if importlib.util.find_spec(name) is None
        ]
        return f"not installed: {', '.join(missing)}" if missing else None

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        trt = importlib.import_module("tensorrt")
        engine = build(trt, export(model, images, dtype, labels))
        context = engine.create_execution_context()
        out = torch.empty(
            tuple(engine.get_tensor_shape(OUTPUT)),
            dtype=_dtype(trt, engine.get_tensor_dtype(OUTPUT)),
            device=images.device,
        )
        context.set_tensor_address(INPUT, images.data_ptr())
        context.set_tensor_address(OUTPUT, out.data_ptr())

        def run() -> None:
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise RuntimeError("TensorRT could not run the network")

        graph = record(run)

        def replay() -> Tensor:
            graph.replay()
            return out

        # The context owns the network's memory, so it must live as long as the returned function.
        replay.context = context  # type: ignore[attr-defined]
        return replay


def build(trt: Any, onnx: bytes) -> Any:
    """An engine of an ONNX graph, which computes each tensor in the graph's dtype.

    Raises:
        RuntimeError: TensorRT cannot read the graph, or finds no engine for it.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise RuntimeError(f"TensorRT cannot read the network: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = OPTIMISATION
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise RuntimeError("TensorRT finds no engine for the network")
    return trt.Runtime(logger).deserialize_cuda_engine(serialised)


def _dtype(trt: Any, found: Any) -> torch.dtype:
    return next(dtype for dtype, name in NAMES.items() if getattr(trt, name, None) == found)


def on_gpu() -> list[Peer]:
    """The peer on a GPU."""
    return [TensorRT()]
