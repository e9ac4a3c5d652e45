"""From a model to its fast twin."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.shelfnet import ShelfNet
from .fingerprint import Fingerprint
from .image import image_size, padded
from .lower import lower
from .plan import Plan
from .program import Program

BACKENDS = ("auto", "native", "library")
DTYPES = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


def accelerate(
    model: ShelfNet,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> FastShelfNet:
    """An inference module with a ShelfNet's outputs, several times faster.

    The model may be in any mode and of any floating dtype; it is left untouched. When its weights
    change afterwards, the next call takes them up.

    Args:
        model: a `shelfkern.nn.ShelfNet`.
        dtype: of the activations and of the scores: float32, or bfloat16, which halves the memory;
            sums are in float32.
        device: where it runs; the CPU, the default, is what there is.
        backend: "native" is shelfkern's kernels, "library" PyTorch's with folded batch norms, "auto"
            the native ones where they can run.

    Raises:
        TypeError: model is not a ShelfNet of known blocks, or has hooks.
        ValueError: dtype, device or backend is none of the above.
        RuntimeError: backend="native" and the native kernels cannot run; the message says why.
    """
    if not isinstance(model, ShelfNet):
        raise TypeError(f"model is a {type(model).__qualname__}, it must be a shelfkern.nn.ShelfNet")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}, on a CPU it may be {' or '.join(map(str, DTYPES))}")
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise ValueError(f"device is {str(device)!r}, it may be 'cpu'")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it may be one of {', '.join(BACKENDS)}")
    return FastShelfNet(model, dtype, backend)


class FastShelfNet(nn.Module):
    """What `accelerate` gives: a ShelfNet for inference.

    Calls may come from several threads at once and with changing sizes. It holds the source model,
    folded copies of its weights, and a few idle arenas; none of these are in its state dict.
    """

    def __init__(self, source: ShelfNet, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        # In a list, so that the source's parameters do not become this module's.
        self._source = [source]
        self.dtype = dtype
        self.backend = backend
        self._refresh_lock = threading.Lock()
        self.refresh()
        self.eval()

    def refresh(self) -> None:
        """Takes up the source model's present weights. Calls do so themselves when they see a change."""
        source = self._source[0]
        fingerprint = Fingerprint(source)
        program = Program(lower(source), self.dtype, self.backend, source.normalisation, source.align_corners)
        # One assignment, so that a call in another thread sees the old pair or the new one.
        self._current = (fingerprint, program)

    @property
    def plan(self) -> Plan:
        """The fused ops, in order; `print` shows them."""
        return self._program().plan

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, backend={self.backend!r}, steps={len(self.plan.steps)}"

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes, H, W), contiguous, in `dtype`, of normalised float images (N, 3, H, W).

        Raises:
            ValueError: x is not (N, 3, H, W) with H, W >= 32, or not on the CPU.
            TypeError: x is not floating.
            RuntimeError: the module is in train mode.
        """
        if x.dtype is torch.uint8:
            raise TypeError("x is uint8, it must be floating (N, 3, H, W): predict takes raw images")
        return self._run(x, "scores")

    def predict(self, images: Tensor) -> Tensor:
        """Labels (N, H, W) uint8: the best class of every pixel. Full-size scores are never made.

        Args:
            images: normalised float (N, 3, H, W), or raw uint8 RGB (N, H, W, 3).

        Raises: as `forward`.
        """
        return self._run(images, "labels")

    @torch.no_grad()
    def _run(self, images: Tensor, want: str) -> Tensor:
        if self.training:
            raise RuntimeError("the accelerated module is in train mode, it only runs in eval mode")
        if images.device.type != "cpu":
            raise ValueError(f"images is on {images.device}, it must be on the cpu")
        n, h, w = image_size(images)
        program = self._program()
        with program.pool.borrow((n, padded(h), padded(w))) as workspace:
            scores = program.low_resolution_scores(images, workspace)
            resize = program.resize if want == "scores" else program.argmax
            return resize(scores, (padded(h), padded(w)), (h, w))

    def _program(self) -> Program:
        current = self._current
        if self._is_present(*current):
            return current[1]
        with self._refresh_lock:
            if not self._is_present(*self._current):
                log.info("the source model changed: folding its weights again")
                self.refresh()
            return self._current[1]

    def _is_present(self, fingerprint: Fingerprint, program: Program) -> bool:
        return fingerprint.matches() and program.normalisation == self._source[0].normalisation

    def __reduce__(self) -> tuple[Any, ...]:
        # Plans hold native buffers: copies and pickles are made from the source.
        return accelerate, (self._source[0], self.dtype, "cpu", self.backend)
