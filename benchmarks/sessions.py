"""ONNX Runtime and OpenVINO running a network from a file on a CPU, with their best settings there.

Does not import torch, so that a process which measures a runtime's memory holds nothing else.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INPUT, OUTPUT = "images", "result"
# Returns the result for the images, which may be overwritten between calls.
Call = Callable[[], np.ndarray]
# OpenVINO's names of convolutions in a compiled model, and of 8-bit dtypes.
CONVOLUTIONS, BITS_8 = ("Convolution", "Deconvolution"), ("u8", "i8")


def onnxruntime(path: Path, images: np.ndarray, threads: int, dtype: str) -> Call:
    """A session with all graph optimisations, for an ONNX file."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning while the next variant runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {INPUT: images})[0]


def openvino(path: Path, images: np.ndarray, threads: int, dtype: str) -> Call:
    """A model compiled for latency, from an ONNX file or one in OpenVINO's format.

    In 8-bit models the rest is in bfloat16 if the CPU has instructions for its products, which is faster.

    Raises:
        RuntimeError: dtype is int8, and no convolution runs in 8 bits.
    """
    core = importlib.import_module("openvino").Core()
    half = dtype == "bfloat16" or (dtype == "int8" and _has_bfloat16(core))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    if dtype == "int8" and not any(kind in BITS_8 for kind in convolutions(compiled)):
        raise RuntimeError("OpenVINO runs no convolution of this network in 8 bits on this CPU")
    request = compiled.create_infer_request()
    feed = {INPUT: images}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def convolutions(compiled: Any) -> Counter[str]:
    """Number of convolutions of a compiled model by dtype, with OpenVINO's names."""
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return Counter(
        fact["runtimePrecision"].astype(str)
        for fact in facts
        if fact["layerType"].astype(str) in CONVOLUTIONS
    )


RUNTIMES: dict[str, Callable[[Path, np.ndarray, int, str], Call]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
