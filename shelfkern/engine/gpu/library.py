"""The library's ways to run a step: cuDNN's and cuBLASLt's calls through torch, norms folded into weights.

Results of cuDNN are tensors allocated by torch; a matrix product writes into the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import ops
from ...normalisation import Normalisation
from .. import plan as p
from ..image import prepare_image, statistics

# inputs (the images, for a step without any) and outputs in the arena; returns a result outside it, or None.
Size = tuple[int, int]
Folded = tuple[Tensor, Tensor | None]
LibraryRun = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor | None]


def folded(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Folded:
    """Filters times scale in channels_last storage, and the shift, both in `dtype`."""
    if scale is not None:
        weight = weight * scale[:, None, None, None]
    weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return weight, None if shift is None else shift.to(device, dtype)


def finish_(
    out: Tensor, slope: float | None, residual: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """act(out + residual) + skip, in place."""
    if residual is not None:
        out += residual
    if slope is not None:
        out = F.leaky_relu_(out, slope) if slope else out.relu_()
    if skip is not None:
        out += skip
    return out


def others(step: p.Conv, inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """A convolution's residual and skip among its inputs."""
    return inputs[1] if step.residual else None, inputs[-1] if step.skip else None


def conv(
    step: p.Conv, weight: Tensor, bias: Tensor | None, normalisation: Normalisation, size: Size
) -> LibraryRun:
    """A convolution with its bias, then the rest of the epilogue in place."""
    # Created here: a graph capture cannot copy from the host.
    colours = statistics(normalisation, weight.device)

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        x = inputs[0] if step.inputs else prepare_image(inputs[0], size, *colours).to(weight.dtype)
        out = F.conv2d(x, weight, bias, step.stride, step.padding)
        return finish_(out, step.act.slope, *others(step, inputs))

    return run


def cudnn_fused_fits(step: p.Conv) -> bool:
    """Whether cuDNN has the epilogue: a bias, perhaps a residual, and relu."""
    return step.act.slope == 0 and not step.skip and step.shift is not None and bool(step.inputs)


def cudnn_fused(step: p.Conv, weight: Tensor, bias: Tensor | None) -> LibraryRun:
    """A cuDNN convolution fused with bias, residual and relu."""
    geometry: Any = ([step.stride] * 2, [step.padding] * 2, [1, 1], 1)

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        if step.residual:
            return torch.cudnn_convolution_add_relu(inputs[0], weight, inputs[1], 1.0, bias, *geometry)
        return torch.cudnn_convolution_relu(inputs[0], weight, bias, *geometry)

    return run


def cublaslt_fits(step: p.Conv) -> bool:
    """Whether it is a matrix product with a cuBLASLt epilogue: 1x1, bias, and relu or no activation."""
    plain = step.weight.shape[2:] == (1, 1) and step.stride == 1 and step.act.slope in (None, 0)
    return plain and bool(step.inputs) and step.shift is not None and not (step.residual or step.skip)


def cublaslt(step: p.Conv, weight: Tensor, bias: Any) -> LibraryRun:
    """A 1x1 convolution as a product of (pixels, C) with (C, K), written into the arena."""
    matrix = weight.flatten(1).t()

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        x, out = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (inputs[0], outputs[0]))
        if step.act.slope is None:
            torch.addmm(bias, x, matrix, out=out)
        else:
            torch._addmm_activation(bias, x, matrix, out=out)

    return run


def shared_block(step: p.SharedBlockStep, first: Folded, second: Folded) -> LibraryRun:
    """Two convolutions, each with its norm folded into the filters: two copies of the weights."""

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        (x,) = inputs
        h = finish_(F.conv2d(x, *first, padding=1), step.act.slope)
        return finish_(F.conv2d(h, *second, padding=1), 0.0, x, x if step.skip else None)

    return run


def cudnn_fused_block(step: p.SharedBlockStep, first: Folded, second: Folded) -> LibraryRun:
    """The shared block as two fused cuDNN calls, if both activations are relu."""
    geometry: Any = ([1, 1], [1, 1], [1, 1], 1)

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        (x,) = inputs
        h = torch.cudnn_convolution_relu(x, *first, *geometry)
        out = torch.cudnn_convolution_add_relu(h, second[0], x, 1.0, second[1], *geometry)
        return out.add_(x) if step.skip else out

    return run


def deconv_add(weight: Tensor, bias: Tensor | None) -> LibraryRun:
    """A transposed convolution, then the skip in place."""
    return lambda inputs, outputs: F.conv_transpose2d(inputs[0], weight, bias, 2, 1, 1).add_(inputs[1])


def stem(
    step: p.Stem, weight: Tensor, bias: Tensor | None, normalisation: Normalisation, size: Size
) -> LibraryRun:
    """Normalisation, convolution, activation and pooling as separate calls."""
    colours = statistics(normalisation, weight.device)

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        image = prepare_image(inputs[0], size, *colours).to(weight.dtype)
        return F.max_pool2d(finish_(F.conv2d(image, weight, bias, 2, 3), step.act.slope), 3, 2, 1)

    return run


def attention_gate(weight: Tensor, scale: Tensor, shift: Tensor) -> LibraryRun:
    """The reference's calls."""

    def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
        return ops.attention_gate(inputs[0], weight, scale, shift, backend="reference")

    return run


def upsample_add(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """The reference's calls."""
    return ops.upsample_add(*inputs, backend="reference")


def max_pool(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """3x3 maximum, stride 2."""
    return F.max_pool2d(inputs[0], 3, 2, 1)
