"""Checks a network's result: each variant is checked before it is timed, and not timed if it is wrong."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from cases import Case, normalised
from torch import Tensor

from shelfkern.nn import ShelfNet

# Root-mean-square error of scores relative to their deviation: about twice that of eager torch in 16 bits on
# a CPU. On a GPU float32 is TF32, which has float16's precision. In 8 bits it is twice the largest error of
# ONNX Runtime and OpenVINO on the networks here: 0.03 for the bundled one, 0.08 for a random ShelfNet50.
MAX_ERROR = {"float32": 2e-5, "tf32": 0.01, "float16": 0.01, "bfloat16": 0.07, "int8": 0.16}
# The largest error of a single score, as a multiple of that.
LARGEST = 10
# Fraction of labels that may differ from float32's, beyond those of eager torch in the same dtype. Of
# eager's, a quarter more is allowed, since its own fraction varies by as much between memory formats in small
# images.
MAX_DIFFERENT, EAGERS = 0.001, 1.25
# The same in 8 bits, which eager torch lacks: twice the largest of ONNX Runtime and OpenVINO, 0.02 for the
# bundled network on noisy shapes, 0.07 for a random ShelfNet50, whose scores are close to each other.
MAX_DIFFERENT_INT8 = 0.14


class Wrong(Exception):
    """A variant's result differs too much from eager torch in float32."""


class Judge:
    """Compares results of one case with eager torch in float32, computed image by image.

    Attributes:
        limit: limit of the error.
    """

    def __init__(self, model: ShelfNet, images: Tensor, case: Case) -> None:
        self._labels = case.labels
        network = copy.deepcopy(model).to(images.device)
        with exact_float32():
            found = [_finished(_scores(network, image, torch.float32), case) for image in images.split(1)]
        self._truth = found
        if case.labels and case.dtype == "int8":
            self.limit = MAX_DIFFERENT_INT8
        elif case.labels:
            with without_search():
                self.limit = MAX_DIFFERENT + EAGERS * self._eager_difference(network, images, case)
        else:
            self._deviation = torch.stack([scores.double().std() for scores in found]).mean().item()
            tf32 = case.device == "cuda" and case.dtype == "float32"
            self.limit = MAX_ERROR["tf32" if tf32 else case.dtype]

    def _eager_difference(self, network: ShelfNet, images: Tensor, case: Case) -> float:
        network = network.to(case.torch_dtype)
        found = [_finished(_scores(network, image, case.torch_dtype), case) for image in images.split(1)]
        return self._difference(torch.cat(found))

    def _difference(self, labels: Tensor) -> float:
        pairs = zip(labels.split(1), self._truth, strict=True)
        return torch.stack([(mine != truth).double().mean() for mine, truth in pairs]).mean().item()

    def error_of(self, result: Tensor) -> float:
        """For scores the root-mean-square error relative to their deviation, for labels the fraction that
        differs.

        Raises:
            Wrong: it is more than `limit`, or one score is far off, or the result has another shape or dtype.
        """
        shape = (len(self._truth), *self._truth[0].shape[1:])
        if result.shape != shape or (self._labels and result.dtype is not torch.uint8):
            raise Wrong(f"the result is {result.dtype} {tuple(result.shape)}, it must be {shape}")
        if self._labels:
            error, largest = self._difference(result), 0.0
        else:
            error, largest = self._errors(result)
        # This form of comparison treats NaN as wrong.
        if not error <= self.limit:
            raise Wrong(f"the error is {error:.3g}, at most {self.limit:.3g} is allowed")
        if not largest <= LARGEST * self.limit:
            raise Wrong(f"the largest error is {largest:.3g}, at most {LARGEST * self.limit:.3g} is allowed")
        return error

    def _errors(self, scores: Tensor) -> tuple[float, float]:
        squares, largest = [], []
        for mine, truth in zip(scores.split(1), self._truth, strict=True):
            off = (mine.float() - truth).abs()
            squares.append(off.double().square().mean())
            largest.append(off.max())
        error = torch.stack(squares).mean().sqrt().item()
        return error / self._deviation, torch.stack(largest).max().item() / self._deviation


def _scores(network: ShelfNet, image: Tensor, dtype: torch.dtype) -> Tensor:
    x = normalised(image, network) if image.dtype is torch.uint8 else image
    return network(x.to(dtype))


def _finished(scores: Tensor, case: Case) -> Tensor:
    return scores.argmax(1).to(torch.uint8) if case.labels else scores


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Context in which float32 products use float32, not TF32; cuDNN does not search."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with without_search():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Context in which cuDNN takes its first choice: searching would cost more than the few calls."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
