"""From a model to its fast twin."""

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

# On a CPU "emulated" runs the GPU's kernels there, thread by thread: for those who work on them.
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
    """An inference module with a ShelfNet's outputs, several times faster.

    The model may be in any mode, of any floating dtype and on any device; it is left untouched. When its
    weights change afterwards, the next call takes them up.

    Args:
        model: a `shelfkern.nn.ShelfNet`.
        dtype: of the activations and of the scores; sums are in float32. On a CPU float32, or bfloat16,
            which halves the memory, and the time where the CPU has instructions for it; on a GPU float16
            too, and float32 is TF32 where torch's own convolutions would be. torch.int8, and on GPUs
            torch.float8_e4m3fn: on a CPU all activations but gates are codes of 8 bits, and scores
            float32; on a GPU convolutions multiply codes, the rest and the scores are float16
            (docs/quantization.md).
        device: where it runs: the CPU or a CUDA device; by default where the model is.
        backend: "native" is shelfkern's kernels, "library" PyTorch's, cuDNN's and cuBLASLt's with folded
            batch norms, "auto" the faster for each layer. "emulated" runs the GPU's kernels on the CPU,
            thousands of times slower, for tests of them.
        tune: times the best few algorithms for each layer the first time that a size comes, on a CPU with
            each number of threads, and keeps the results on disk (`shelfkern.engine.tuning`); for a minute
            in all, or so many seconds as it is. Otherwise results of earlier runs and a cost model decide.
        graphs: on a GPU, records forward passes as CUDA graphs.
        calibration: for 8 bits, images such as those to come: uint8 (N, H, W, 3), normalised floating
            (N, 3, H, W), or several such batches. They are kept, for when the weights change.

    Raises:
        TypeError: model is not a ShelfNet of known blocks, or has hooks; or dtype is not a torch.dtype.
        ValueError: dtype, device or backend is none of the above; calibration is missing, or not wanted.
        RuntimeError: the device cannot run it, or backend="native" and the native kernels cannot run; the
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
    """The accelerated network in a file of `FastShelfNet.save`, without its model and calibration.

    It takes less memory than `accelerate`, which holds the model: the weights in the file are mapped, and
    read while they are packed. So the file may be replaced while the network lives, and not overwritten.

    Args:
        path: the file.
        device: where it runs: the CPU by default, or for a network of a GPU's 8 bits the GPU.
        backend, tune, graphs: as of `accelerate`.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is cut short, or of another kind or version; or as `accelerate`.
        ValueError: the network's dtype cannot run there, or its 8 bits are another kind of device's; or as
            `accelerate`.
    """
    origin = FromFile(path)
    saved = origin.saved
    kind = "cuda" if saved.on_gpu and backend == "auto" else "cpu"
    where = _device(kind if device is None else device)
    _check_options(saved.dtype, where, backend, tune)
    if saved.dtype in KINDS and saved.on_gpu != _takes_gpu_program(saved.dtype, where, backend):
        made, here = ("a GPU", "a CPU") if saved.on_gpu else ("a CPU", "a GPU")
        raise ValueError(
            f"{path} has 8 bits for the kernels of {made}, and device and backend ask for {here}'s"
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
    # On a CPU torch's own calls compute with all codes: slowly, but their accuracy can be judged.
    codes = KINDS if backend == "library" else (torch.int8,)
    dtypes = GPU_DTYPES if on_gpu else (*CPU_DTYPES, *codes)
    if dtype not in dtypes:
        place = "with GPU kernels" if on_gpu else "on a CPU"
        raise ValueError(f"dtype is {dtype}, {place} it may be {', '.join(map(str, dtypes))}")


def _takes_gpu_program(dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    """Whether GPU kernels run it, or torch's calls in their place."""
    if device.type == "cuda" or backend == "emulated":
        return True
    without_ours = backend == "auto" and native.reason("conv_bn_act") is not None
    return dtype in KINDS and (backend == "library" or without_ours)


def _check_output(output: str) -> None:
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}, it may be one of {', '.join(OUTPUTS)}")


def _device_of(model: ShelfNet) -> torch.device:
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    # A model without values runs nowhere: what is wrong with it shows when it is lowered.
    return found if found.type != "meta" else torch.device("cpu")


def _device(device: torch.device | str) -> torch.device:
    """The device asked for, with its index."""
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
    """What `accelerate` and `load` give: a ShelfNet for inference.

    Calls may come from several threads at once, in several CUDA streams, and with changing sizes. It
    holds the model that it was made from, folded copies of its weights, and a few idle arenas with their
    graphs; none of these are in its state dict.

    Its device and dtype are fixed: `to`, `cuda`, `cpu`, `half`, `float` and the like raise a RuntimeError
    unless they ask for what it has.
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
        # Of all programs, so that weights can change without another search.
        self._tuner = tuner_of(device, tune) if self._on_gpu else None
        self._tuners = Tuners(tune)
        self._refresh_lock = threading.Lock()
        self.refresh()
        self.eval()

    def refresh(self) -> None:
        """Takes up the model's present weights. Calls do so themselves when they see a change."""
        state = self._origin.state()
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
        """Writes the network as it is now, folded and calibrated, to a file that `load` reads.

        The file holds the weights in float32, for every size, number of threads and CPU; and, but for 8 bits,
        for CPUs and GPUs.

        Raises:
            OSError: the file cannot be written.
        """
        Saved(self._program().plan, self.dtype, self._on_gpu, self._origin.facts).write(path)

    @property
    def scores_dtype(self) -> torch.dtype:
        """Of the scores, and of activations that are not codes of 8 bits."""
        if self.dtype not in KINDS:
            return self.dtype
        return torch.float16 if self._on_gpu else torch.float32

    @property
    def source(self) -> ShelfNet | None:
        """The model that was accelerated; None of a file."""
        return self._origin.model if isinstance(self._origin, FromModel) else None

    @property
    def normalisation(self) -> Normalisation:
        """Of the raw images that the network was trained on."""
        return self._origin.facts.normalisation

    @property
    def align_corners(self) -> bool:
        """Of the final resize."""
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
        """The fused ops, in order; `print` shows them, `plan.describe(n, h, w)` for a size of one's own."""
        return self._program().plan

    def extra_repr(self) -> str:
        return (
            f"dtype={self.dtype}, device={str(self.device)!r}, backend={self.backend!r}, "
            f"steps={len(self.plan.steps)}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes, H, W), contiguous, in `scores_dtype`, of normalised float images (N, 3, H, W).

        Raises:
            ValueError: x is not (N, 3, H, W) with H, W >= 32, or not on the module's device.
            TypeError: x is not floating.
            RuntimeError: the module is in train mode.
        """
        if isinstance(x, Tensor) and x.dtype is torch.uint8:
            raise TypeError(
                "x is torch.uint8, it must be floating (N, 3, H, W): predict takes raw uint8 images"
            )
        return self._run(x, "scores")

    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """Labels (N, H, W) uint8: the best class of every pixel. Full-size scores are never made.

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
        """Scores (N, classes, h, w), of low resolution, of normalised float images (N, 3, H, W).

        Resized to the next multiples of 32 of H and W, and cropped, they are those of `forward`.

        Raises: as `forward`.
        """
        return self._run(x, "coarse_scores")

    def warmup(
        self, sizes: Iterable[Sequence[int]], batch: int = 1, outputs: str | Sequence[str] | None = None
    ) -> None:
        """Does now what the first calls would do: compiling, tuning, and recording graphs.

        Args:
            sizes: (height, width) of images to come.
            batch: images in a call.
            outputs: "scores" of float images, "labels" of raw ones, or a sequence of both; by default both,
                or the scores alone where there are more than 256 classes.

        Raises:
            ValueError: a size is no pair of at least 32 x 32, batch is less than 1, an output is unknown, or
                "labels" is asked of more than 256 classes.
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
                raise ValueError(f"sizes holds {size!r}, it must hold pairs of height and width")
            height, width = size
            check_image_size((batch, 3, height, width))
            if "scores" in outputs:
                self(torch.zeros((batch, 3, height, width), device=self.device))
            if "labels" in outputs:
                raw = torch.zeros((batch, height, width, 3), dtype=torch.uint8, device=self.device)
                self.predict(raw)

    def predict_frames(self, frames: Iterable[Frame], batch: int = 1) -> Iterator[Tensor]:
        """Labels of a stream of frames, such as a video's: uint8 (H, W) on the CPU, in their order.

        On a GPU one batch is uploaded while another is segmented and the one before comes back, through
        page-locked memory: a video runs at the speed of the network. It reads up to two batches ahead.

        Args:
            frames: raw uint8 RGB (H, W, 3), arrays or CPU tensors; their size may change.
            batch: frames of one call; the last may have fewer, and those before a change of size.

        Raises:
            ValueError: batch is less than 1, or the network has more than 256 classes; and while frames are
                drawn, as `predict` for each.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, it must be at least 1")
        check_label_classes(self.plan.scores.channels)
        grouped = batches(frames, batch)
        if not self._on_gpu:
            return (labels for some in grouped for labels in self.predict(torch.stack(some)))
        return FrameStream(self.predict, self.device, runtime_of(self.device)).run(grouped)

    def bind(self, images: Tensor, output: str = "scores") -> BoundImages:
        """A call bound to the memory of some images: the least latency, for whoever writes them in place.

        Args:
            images: as `forward` and `predict` take them, on the module's device; read at every call.
            output: "scores" or "labels".

        Raises:
            ValueError: output is neither, or "labels" of more than 256 classes; or as `forward`.
            RuntimeError: the module runs on the CPU's kernels, where there is nothing to bind.
        """
        _check_output(output)
        if not self._on_gpu:
            raise RuntimeError("bind is for graphs of a GPU: on a CPU call the module itself")
        self._check(images)
        if output == "scores" and images.dtype is torch.uint8:
            raise TypeError("images is uint8, scores are made of floating (N, 3, H, W)")
        if images.dtype not in (torch.uint8, self.scores_dtype):
            wanted = f"it must be uint8 or {self.scores_dtype}"
            raise TypeError(f"images is {images.dtype}, to be read in place {wanted}")
        image_size(images)
        return BoundImages(self, images, output == "labels")

    @torch.no_grad()
    def bound_steps(self, images: Tensor) -> list[BoundStep]:
        """Every step on tensors of a real forward pass, to be timed one by one.

        Raises: as `bind`.
        """
        forward = self.bind(images).forward
        forward.run()
        return forward.bound_steps()

    @torch.no_grad()
    def _run(self, images: Tensor, want: str) -> Tensor:
        self._check(images)
        if self.device.type == "cpu":
            return _made(self._program(), want, images)
        # The GPU works while the host looks whether the weights are still the same.
        program = self._current[1]
        out = _made(program, want, images)
        present = self._program()
        return out if present is program else _made(present, want, images)

    def _check(self, images: Tensor) -> None:
        if self.training:
            raise RuntimeError("the accelerated module is in train mode, it only runs in eval mode")
        if not isinstance(images, Tensor):
            raise TypeError(f"images is {type(images).__name__}, it must be a tensor")
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
        # Of `to`, `cuda`, `half` and the like. Weights are packed for one device and dtype, and nothing here
        # is a parameter that torch could convert: what a request means shows in what it does to a tensor.
        before = torch.empty(0, dtype=self.scores_dtype, device=self.device)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise RuntimeError(
                f"an accelerated network stays on {self.device} in {self.dtype}, it cannot be converted to "
                f"{after.device} and {after.dtype}: call accelerate or load with the device and dtype"
            )
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Programs hold native buffers and graphs: copies and pickles are made from the origin.
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
    """What `FastShelfNet.bind` gives: calls that read images in place and write to one tensor.

    For one thread at a time. Changed weights are taken up as by the module itself.

    Attributes:
        images: read at every call.
        out: the result: scores (N, classes, H, W), or labels (N, H, W) uint8.
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
        """Runs on the current stream; gives `out`, which the next call overwrites."""
        self._launch()
        # The GPU works while the host looks whether the weights are still the same.
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
