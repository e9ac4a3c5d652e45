"""`accelerate` and `load`: inference modules that run a ShelfNet on fused kernels."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import native
from ..nn.images import as_batch, check_image_size, check_label_classes, image_size
from ..nn.shelfnet import ShelfNet
from ..normalisation import Normalisation
from ..ops._backends import MIN_CAPABILITY
from ..ops.upsample_argmax import MAX_CLASSES
from .calibration import Images, batches_of, check_calibration
from .cpu.program import Program
from .cpu.timing import Tuners
from .frames import Frame, FrameStream, batches
from .gpu.device import runtime_of
from .gpu.forward import BoundStep, Forward
from .gpu.program import GpuProgram, Options
from .gpu.timing import tuner_of
from .origin import FromFile, FromModel, Origin, State
from .plan import Plan
from .quantization import KINDS
from .saved import Saved

# "emulated" runs the GPU kernels on a CPU, thread by thread, for developing and testing them.
BACKENDS = ("auto", "native", "library", "emulated")
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *KINDS)
OUTPUTS = ("scores", "labels")
_UNKNOWN_DEVICE = "device is {!r}, it may be 'cpu' or a CUDA device such as 'cuda'"

log = logging.getLogger(__name__)


def accelerate(
    model: ShelfNet,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
    *,
    tune: bool | float = False,
    graphs: bool = True,
    calibration: Images | None = None,
) -> FastShelfNet:
    """An inference module with the same outputs as a ShelfNet, several times faster.

    The model may be in train or eval mode, of any floating dtype and on any device; it is not changed. If its
    weights change later, the next call uses the new ones.

    Args:
        model: a `shelfkern.nn.ShelfNet`.
        dtype: dtype of the activations and the scores; sums are accumulated in float32.
            On a CPU: torch.float32, or torch.bfloat16, which halves the memory, and the time where the CPU
            has bfloat16 instructions.
            On a GPU: torch.float32 (TF32 where torch's own convolutions would use it), torch.bfloat16 or
            torch.float16.
            8 bits: torch.int8, and on GPUs torch.float8_e4m3fn. On a CPU all activations except gates are
            stored in 8 bits, and the scores are float32; on a GPU convolutions have 8-bit inputs, everything
            else and the scores are float16 (docs/quantization.md).
        device: a CPU or CUDA device; by default the device of the model.
        backend: "native" uses shelfkern's kernels; "library" uses PyTorch, cuDNN and cuBLASLt with folded
            batch norms; "auto" uses the faster of them for each layer. "emulated" runs the GPU kernels on the
            CPU, thousands of times slower, to test them.
        tune: whether to benchmark the best candidate algorithms for each new input size, and on a CPU for
            each new number of threads, and to cache the winners on disk (`shelfkern.engine.tuning`). True:
            for at most 60 s in total. A number: for at most that many seconds in total, so 1 is one second.
            False or 0: no benchmarks; cached winners and a cost model decide.
        graphs: on a GPU, whether to record forward passes as CUDA graphs.
        calibration: required for the 8-bit dtypes, and only allowed there: representative images, which the
            ranges of the activations are measured on. uint8 (N, H, W, 3), normalised floating (N, 3, H, W),
            or a sequence of such batches. A copy is kept and used again if the weights change.

    Raises:
        TypeError: model is not a ShelfNet of known blocks, or has hooks; or dtype is not a torch.dtype.
        ValueError: dtype, device, backend or tune has none of the values above; or calibration is missing for
            an 8-bit dtype, or given for another.
        RuntimeError: the device cannot run the model, or backend="native" and a native kernel cannot run; the
            message says why.
    """
    if not isinstance(model, ShelfNet):
        raise TypeError(f"model is a {type(model).__qualname__}, it must be a shelfkern.nn.ShelfNet")
    where = _device(_device_of(model) if device is None else device)
    _check_options(dtype, where, backend, tune)
    check_calibration(dtype, calibration)
    batches = None if calibration is None else [batch.cpu() for batch in batches_of(calibration)]
    return FastShelfNet(FromModel(model, batches), dtype, where, backend, tune, graphs)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    backend: str = "auto",
    *,
    tune: bool | float = False,
    graphs: bool = True,
) -> FastShelfNet:
    """Loads an accelerated network that `FastShelfNet.save` wrote.

    It needs less memory than `accelerate`: there is no model, and the weights are memory-mapped and read only
    while they are packed. The file may therefore be replaced by another one while the network is in use, but
    not be overwritten in place.

    Args:
        path: the file.
        device: a CPU or CUDA device; by default the CPU, or the GPU for 8-bit networks made for GPU kernels.
        backend, tune, graphs: as for `accelerate`.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is truncated, is not an accelerated network, or has another format version; or
            as for `accelerate`.
        ValueError: the device cannot run the network's dtype, or its 8-bit values are for the kernels of the
            other kind of device; or as for `accelerate`.
    """
    origin = FromFile(path)
    saved = origin.saved
    kind = "cuda" if saved.on_gpu and backend == "auto" else "cpu"
    where = _device(kind if device is None else device)
    _check_options(saved.dtype, where, backend, tune)
    if saved.dtype in KINDS and saved.on_gpu != _takes_gpu_program(saved.dtype, where, backend):
        made, here = ("a GPU", "a CPU") if saved.on_gpu else ("a CPU", "a GPU")
        raise ValueError(
            f"{path} is an 8-bit network for the kernels of {made}, device and backend select those of {here}"
        )
    return FastShelfNet(origin, saved.dtype, where, backend, tune, graphs)


def _check_options(dtype: torch.dtype, where: torch.device, backend: str, tune: bool | float) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it may be one of {', '.join(BACKENDS)}")
    if backend == "emulated" and where.type != "cpu":
        raise ValueError(f"backend is 'emulated' and device {str(where)!r}, it must be 'cpu'")
    _check_dtype(dtype, where, backend)
    if not isinstance(tune, (bool, int, float)) or not tune >= 0:
        raise ValueError(f"tune is {tune!r}, it may be True, False or seconds from 0")


def _check_dtype(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is {dtype!r}, it must be a torch.dtype such as torch.float16")
    on_gpu = device.type == "cuda" or backend == "emulated"
    # On a CPU torch's own calls emulate every 8-bit dtype: slowly, but its accuracy can be measured.
    codes = KINDS if backend == "library" else (torch.int8,)
    dtypes = GPU_DTYPES if on_gpu else (*CPU_DTYPES, *codes)
    if dtype not in dtypes:
        place = "with GPU kernels" if on_gpu else "on a CPU"
        raise ValueError(f"dtype is {dtype}, {place} it may be {', '.join(map(str, dtypes))}")


def _takes_gpu_program(dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    """Whether a `GpuProgram` runs it, with GPU kernels or torch's calls in their place."""
    if device.type == "cuda" or backend == "emulated":
        return True
    without_ours = backend == "auto" and native.reason("conv_bn_act") is not None
    return dtype in KINDS and (backend == "library" or without_ours)


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, it may be one of {', '.join(OUTPUTS)}")


def _device_of(model: ShelfNet) -> torch.device:
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    # A model on the meta device has no values and is refused when it is lowered.
    return found if found.type != "meta" else torch.device("cpu")


def _device(device: torch.device | str) -> torch.device:
    """The requested device, with its index."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(_UNKNOWN_DEVICE.format(str(device))) from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(_UNKNOWN_DEVICE.format(str(found)))
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {str(found)!r}, and there is no GPU that torch can use")
    found = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
    capability = torch.cuda.get_device_capability(found)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"device is {str(found)!r} of compute capability {capability[0]}.{capability[1]}, it needs 8.0"
        )
    return found


class FastShelfNet(nn.Module):
    """A ShelfNet for inference, made by `accelerate` or `load`.

    It may be called from several threads and CUDA streams at once, and with changing image sizes. It holds
    the original model, folded copies of its weights, and a few idle memory arenas with their CUDA graphs;
    its state dict is empty.

    Its device and dtype are fixed: `to`, `cuda`, `cpu`, `half`, `float` and similar methods raise a
    RuntimeError unless they request the device and dtype that it already has.
    """

    def __init__(
        self,
        origin: Origin,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        tune: bool | float,
        graphs: bool,
    ) -> None:
        super().__init__()
        self._origin = origin
        self.dtype = dtype
        self.device = device
        self.backend = backend
        self.tune = tune
        self.graphs = graphs
        self._on_gpu = _takes_gpu_program(dtype, device, backend)
        # Shared by all programs, so that changed weights need no new search for algorithms.
        self._tuner = tuner_of(device, tune) if self._on_gpu else None
        self._tuners = Tuners(tune)
        self._refresh_lock = threading.Lock()
        self.refresh()
        self.eval()

    def refresh(self) -> None:
        """Folds the model's current weights again. Calls do this by themselves when the weights changed."""
        state = self._origin.state()
        # Calibration runs the network: the caller's autocast is not for it.
        with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
            plan = self._origin.plan(self.dtype, self._on_gpu)
        program = self._gpu_program(plan) if self._on_gpu else self._cpu_program(plan)
        # One assignment, so that a call in another thread sees the old pair or the new one.
        self._current: tuple[State, Program | GpuProgram] = (state, program)

    def _cpu_program(self, plan: Plan) -> Program:
        facts = self._origin.facts
        options = self.scores_dtype, self.backend, facts.normalisation, facts.align_corners
        return Program(plan, *options, self._tuners, self._origin.packed)

    def _gpu_program(self, plan: Plan) -> GpuProgram:
        facts = self._origin.facts
        ours, theirs = self.backend != "library", self.backend != "native"
        options = Options(self.device, self.scores_dtype, ours, theirs, self.graphs)
        assert self._tuner is not None
        return GpuProgram(plan, options, facts.normalisation, facts.align_corners, self._tuner)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network with its current weights, folded and calibrated, to a file that `load` reads.

        The weights are stored in float32, so the file does not depend on image size, number of threads or CPU
        model. It works on CPUs and on GPUs, except for 8-bit networks, which are made for one of the two.

        Raises:
            OSError: the file cannot be written.
        """
        Saved(self._program().plan, self.dtype, self._on_gpu, self._origin.facts).write(path)

    @property
    def scores_dtype(self) -> torch.dtype:
        """dtype of the scores, and of activations that are not stored in 8 bits."""
        if self.dtype not in KINDS:
            return self.dtype
        return torch.float16 if self._on_gpu else torch.float32

    @property
    def source(self) -> ShelfNet | None:
        """The model that was accelerated; None after `load`."""
        return self._origin.model if isinstance(self._origin, FromModel) else None

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation that raw images are normalised with."""
        return self._origin.facts.normalisation

    @property
    def align_corners(self) -> bool:
        """Whether the final bilinear resize aligns corners."""
        return self._origin.facts.align_corners

    @property
    def classes(self) -> tuple[str, ...] | None:
        """A name per class, where known."""
        return self._origin.facts.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...] | None:
        """An (r, g, b) per class, where known."""
        return self._origin.facts.palette

    @property
    def plan(self) -> Plan:
        """The fused ops in order: print it, or `plan.describe(n, h, w)` for a given image size."""
        return self._program().plan

    def extra_repr(self) -> str:
        return (
            f"dtype={self.dtype}, device={str(self.device)!r}, backend={self.backend!r}, "
            f"steps={len(self.plan.steps)}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes, H, W) of normalised images, contiguous, of dtype `scores_dtype`.

        Args:
            x: floating (N, 3, H, W), any memory format, on the module's device.

        Raises:
            ValueError: x is not (N, 3, H, W) with H, W >= 32, or is not on the module's device.
            TypeError: x is not floating, or is sparse.
            RuntimeError: the module is in train mode.
        """
        if isinstance(x, Tensor) and x.dtype is torch.uint8:
            raise TypeError(
                "x is torch.uint8, it must be floating (N, 3, H, W): predict takes raw uint8 images"
            )
        return self._run(x, "scores")

    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """Labels (N, H, W) uint8: the class with the highest score at every pixel.

        Faster than the argmax of `forward`, and with less memory: full-size scores are never computed.

        Args:
            images: raw uint8 RGB (N, H, W, 3), or normalised floating (N, 3, H, W): tensors on the module's
                device, or numpy arrays, which are copied to it. A single raw image (H, W, 3) gives labels
                (H, W).

        Returns:
            A tensor on the module's device.

        Raises:
            ValueError: images has another shape, is smaller than 32 x 32 pixels or on another device, or the
                network has more than 256 classes.
            TypeError: images is neither a tensor nor an array, or neither uint8 nor floating.
            RuntimeError: the module is in train mode.
        """
        batch, single = as_batch(images, self.device)
        labels = self._run(batch, "labels")
        return labels[0] if single else labels

    def coarse_scores(self, x: Tensor) -> Tensor:
        """Scores (N, classes, h, w) at the resolution of the network's head, before the final resize.

        Resized bilinearly (`align_corners`) to the padded image size (`ShelfNet.padded_size`) and cropped to
        the image, they are the scores of `forward`.

        Args:
            x: as for `forward`.

        Raises: as for `forward`.
        """
        return self._run(x, "coarse_scores")

    def warmup(
        self, sizes: Iterable[Sequence[int]], batch: int = 1, outputs: str | Sequence[str] | None = None
    ) -> None:
        """Compiles kernels, tunes and records CUDA graphs ahead of the first calls.

        Args:
            sizes: the (height, width) of the images, in pixels, for each size to prepare.
            batch: number of images per call.
            outputs: "scores" for calls with floating images, "labels" for `predict` with raw images, or a
                sequence of these. By default both, or only the scores if there are more than 256 classes.

        Raises:
            ValueError: a size is not a (height, width) of at least 32 x 32, batch is less than 1, an output
                is neither of the two, or is "labels" with more than 256 classes.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        plan = self.plan
        if outputs is None:
            outputs = OUTPUTS if plan.scores.channels <= MAX_CLASSES else ("scores",)
        outputs = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        for output in outputs:
            _check_output(output)
        if "labels" in outputs:
            check_label_classes(plan.scores.channels)
        for size in sizes:
            if not isinstance(size, Sequence) or len(size) != 2:
                raise ValueError(f"sizes has {size!r}, it must be a sequence of (height, width) pairs")
            height, width = size
            check_image_size((batch, 3, height, width))
            if "scores" in outputs:
                self(torch.zeros((batch, 3, height, width), device=self.device))
            if "labels" in outputs:
                raw = torch.zeros((batch, height, width, 3), dtype=torch.uint8, device=self.device)
                self.predict(raw)

    def predict_frames(self, frames: Iterable[Frame], batch: int = 1) -> Iterator[Tensor]:
        """Yields the labels of each frame of a video, in order: uint8 (H, W) on the CPU.

        On a GPU, upload, inference and download of consecutive batches overlap, through pinned memory. Up to
        two batches are read ahead.

        Args:
            frames: raw uint8 RGB (H, W, 3), numpy arrays or CPU tensors; their size may change.
            batch: number of frames per call; smaller at the end and where the size changes.

        Raises:
            ValueError: batch is less than 1, or the network has more than 256 classes; during iteration, a
                frame is not uint8 (H, W, 3) of at least 32 x 32 pixels on the CPU.
            TypeError: during iteration, a frame is neither an array nor a tensor.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        check_label_classes(self.plan.scores.channels)
        grouped = batches(frames, batch)
        if not self._on_gpu:
            return (labels for some in grouped for labels in self.predict(torch.stack(some)))
        return FrameStream(self.predict, self.device, runtime_of(self.device)).run(grouped)

    def bind(self, images: Tensor, output: str = "scores") -> BoundImages:
        """Binds an input buffer for the lowest latency: update it in place between calls.

            bound = fast.bind(buffer, "labels")
            buffer.copy_(frame)
            labels = bound()

        Args:
            images: the buffer, on the module's device: uint8 (N, H, W, 3), for labels only, or normalised
                (N, 3, H, W) of dtype `scores_dtype`.
            output: "scores" or "labels".

        Returns:
            A callable without arguments. Its result is a tensor that the next call overwrites.

        Raises:
            ValueError: output is neither of the two, or is "labels" with more than 256 classes; or images has
                the wrong shape or device.
            TypeError: images has another dtype.
            RuntimeError: the module runs on CPU kernels, which have no graphs to bind, or is in train mode.
        """
        _check_output(output)
        if not self._on_gpu:
            raise RuntimeError("bind needs a GPU, for CUDA graphs: on a CPU call the module itself")
        self._check(images)
        if output == "scores" and images.dtype is torch.uint8:
            raise TypeError("images is torch.uint8, for scores it must be floating (N, 3, H, W)")
        if images.dtype not in (torch.uint8, self.scores_dtype):
            wanted = f"it must be torch.uint8 or {self.scores_dtype}"
            raise TypeError(f"images is {images.dtype}, to be bound {wanted}")
        image_size(images)
        return BoundImages(self, images, output == "labels")

    @torch.no_grad()
    def bound_steps(self, images: Tensor) -> list[BoundStep]:
        """Every step of a forward pass with its real tensors, for benchmarking steps one by one.

        Raises: as for `bind`.
        """
        forward = self.bind(images).forward
        forward.run()
        return forward.bound_steps()

    @torch.no_grad()
    def _run(self, images: Tensor, want: str) -> Tensor:
        self._check(images)
        if self.device.type == "cpu":
            return _made(self._program(), want, images)
        # Checked after the launch, so that the GPU works while the host looks for changed weights.
        program = self._current[1]
        out = _made(program, want, images)
        present = self._program()
        return out if present is program else _made(present, want, images)

    def _check(self, images: Tensor) -> None:
        if self.training:
            raise RuntimeError("the accelerated module is in train mode, it only runs in eval mode")
        if not isinstance(images, Tensor):
            raise TypeError(f"images is {type(images).__name__}, it must be a tensor")
        if images.layout is not torch.strided:
            raise TypeError(f"images has the layout {images.layout}, it must be dense")
        if images.device != self.device:
            raise ValueError(f"images is on {images.device}, it must be on {self.device}")

    def _program(self) -> Program | GpuProgram:
        current = self._current
        if self._is_present(*current):
            return current[1]
        with self._refresh_lock:
            if not self._is_present(*self._current):
                log.info("the model changed: folding its weights again")
                self.refresh()
            return self._current[1]

    def _is_present(self, state: State, program: Program | GpuProgram) -> bool:
        return state.matches() and program.normalisation == self._origin.facts.normalisation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastShelfNet:
        # Called by `to`, `cuda`, `half` and so on. There are no parameters for torch to convert, so what the
        # conversion asks for is found by applying it to a tensor.
        before = torch.empty(0, dtype=self.scores_dtype, device=self.device)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise RuntimeError(
                f"an accelerated network stays on {self.device} in {self.dtype}, it cannot be converted to "
                f"{after.device} and {after.dtype}: call accelerate or load with another device or dtype"
            )
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs hold native buffers and graphs, so copies and pickles are built again from the origin.
        options = self.dtype, str(self.device), self.backend, self.tune, self.graphs
        return _again, (self._origin, *options)


def _made(program: Program | GpuProgram, want: str, images: Tensor) -> Tensor:
    if want == "labels":
        check_label_classes(program.plan.scores.channels)
    made: Tensor = getattr(program, want)(images)
    return made


def _again(
    origin: Origin, dtype: torch.dtype, device: str, backend: str, tune: bool | float, graphs: bool
) -> FastShelfNet:
    return FastShelfNet(origin, dtype, _device(device), backend, tune, graphs)


class BoundImages:
    """A forward pass with fixed input and output buffers, made by `FastShelfNet.bind`.

    Not thread-safe. Changed weights are used from the next call on, as by the module itself.

    Attributes:
        images: the input buffer, read at every call.
        out: the output buffer: scores (N, classes, H, W), or labels (N, H, W) uint8.
    """

    def __init__(self, module: FastShelfNet, images: Tensor, labels: bool) -> None:
        self.images = images
        self._module, self._labels = module, labels
        self.out: Tensor | None = None
        self._bind(module._program())

    @torch.no_grad()
    def _bind(self, program: Program | GpuProgram) -> None:
        assert isinstance(program, GpuProgram)
        if self._labels:
            check_label_classes(program.plan.scores.channels)
        self._program = program
        self.forward: Forward = program.bind(self.images, self._labels, self.out)
        self.out = self.forward.result

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Runs on the current stream and returns `out`, which the next call overwrites."""
        self._launch()
        # Checked after the launch, so that the GPU works while the host looks for changed weights.
        present = self._module._program()
        if present is not self._program:
            self._bind(present)
            self._launch()
        assert self.out is not None
        return self.out

    def _launch(self) -> None:
        self.forward.wait()
        self.forward.launch()
        self.forward.done()
