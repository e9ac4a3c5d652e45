"""ONNX Runtime and OpenVINO on a CPU, where they are installed: the network exported as ONNX."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import torch
from torch import Tensor

from shelfkern.nn import ShelfNet

from . import Peer, Run
from .exported import INPUT, export


def _missing(*packages: str) -> str | None:
    found = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(found)}" if found else None


def _read(images: Tensor) -> Tensor:
    """Images as the exported network takes them: raw, or in float32, contiguous."""
    return (images if images.dtype is torch.uint8 else images.float()).contiguous()


@dataclasses.dataclass(frozen=True)
class OnnxRuntime:
    """A session with all graph optimisations and as many threads as torch has."""

    key: str = "onnxruntime"
    name: str = "ONNX Runtime"
    ours: bool = False
    seconds: float = 120

    def why_not(self) -> str | None:
        """Needs the packages onnxruntime, onnx and onnxscript."""
        return _missing("onnxruntime", "onnx", "onnxscript")

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`.

        Raises:
            ValueError: dtype is not float32, the only one that its CPU kernels of convolutions have.
        """
        if dtype is not torch.float32:
            raise ValueError(f"dtype is {dtype}, ONNX Runtime's convolutions on a CPU take float32")
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning beside the next variant.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        images = _read(images)
        graph = export(model, images, dtype, labels)
        session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feed = {INPUT: images.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])


@dataclasses.dataclass(frozen=True)
class OpenVino:
    """A model compiled for latency, in the dtype asked for, with as many threads as torch has."""

    key: str = "openvino"
    name: str = "OpenVINO"
    ours: bool = False
    seconds: float = 120

    def why_not(self) -> str | None:
        """Needs the packages openvino, onnx and onnxscript."""
        return _missing("openvino", "onnx", "onnxscript")

    def prepare(self, model: ShelfNet, images: Tensor, dtype: torch.dtype, labels: bool) -> Run:
        """As `Peer.prepare`."""
        openvino = importlib.import_module("openvino")
        images = _read(images)
        graph = export(model, images, torch.float32, labels)
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(graph),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "bf16" if dtype is torch.bfloat16 else "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            },
        )
        request = compiled.create_infer_request()
        feed = {INPUT: images.numpy()}

        def run() -> Tensor:
            return torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])

        return run


def on_cpu() -> list[Peer]:
    """Those that take part on a CPU."""
    return [OnnxRuntime(), OpenVino()]
