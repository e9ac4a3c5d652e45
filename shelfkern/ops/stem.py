"""stem: from an image to pooled features; the network's largest activations are never stored."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import native
from . import _backends as backends
from . import _common as common
from ._stem_winograd import PackedStemWinograd
from .conv_bn_act import PackedConv, conv_bn_act_reference, pack_conv, product_dtype, whole_panels
from .quantize import Quantum, quantize_weight

OP = "stem"
Size = tuple[int, int]
# Image dtypes of the native kernel.
NATIVE_IMAGES = (torch.uint8, torch.float32, torch.bfloat16)

# As in csrc/cuda/stem.cu: output channels of a block, elements of a block's weights at 16 bits, and blocks
# that fit on a multiprocessor.
CUDA_CHANNELS = 64
CUDA_WEIGHT_ROW = 184
CUDA_BLOCKS_A_MULTIPROCESSOR = 2


def normalise(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> (image / 255 - mean) / std as (N, 3, H, W), dtype of mean."""
    return ((image.to(mean.dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


def stem_reference(
    image: Tensor, w: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor, size: Size,
    slope: float | None = 0.0, padded: Size | None = None,
) -> Tensor:  # fmt: skip
    """stem in torch calls, for any device and dtype; differentiable."""
    padded = padded or size
    x = normalise(image, mean.to(w.dtype), std.to(w.dtype)) if image.dtype is torch.uint8 else image
    x = F.pad(x, (0, padded[1] - x.shape[3], 0, padded[0] - x.shape[2]))
    if padded != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    return F.max_pool2d(conv_bn_act_reference(x, w, scale, shift, stride=2, padding=3, slope=slope), 3, 2, 1)


def can_run(image: Tensor, w: Tensor, enlarges: bool = False) -> backends.Reasons:
    """Reason why each kernel cannot take the image and w; None for those that can.

    enlarges: whether the padded image is resized, so that `padded` differs from `size`.
    """
    why = backends.reasons(OP, w, "w")
    for name in ("cuda", "emulated") if enlarges else ():
        why[name] = why[name] or "padded differs from size, and the CUDA kernel does not enlarge images"
    if image.dtype not in NATIVE_IMAGES and why["native"] is None:
        why["native"] = f"image is {image.dtype}, the native kernel takes uint8, float32 and bfloat16"
    return why


def normalised_values(mean: Tensor, std: Tensor) -> Tensor:
    """(v / 255 - mean) / std for every v from 0 to 255, rounded once: float32 (256, 3)."""
    values = torch.arange(256, dtype=torch.float64, device=mean.device)[:, None] / 255
    return common.float32((values - mean.double()) / std.double())


@dataclasses.dataclass(frozen=True)
class StemCodes:
    """Quantization parameters of the native kernel.

    Attributes:
        raw: (6,) float32, for int8 products: raw values of floating images are raw[c] * x + raw[3 + c].
        zero: for int8 products: the raw pixel that stands for 0, its channels in the bytes of a word.
        bias: zero point of the result.
    """

    raw: Tensor | None = None
    zero: int = 0
    bias: float = 0.0


def pack_stem_rows(w: Tensor, dtype: torch.dtype) -> PackedConv:
    """Packs weights (K, 3, 7, 7) for the native kernel: a kernel row's pixels are the channels of one tap.

    dtype: dtype of the multiplied values: float32, bfloat16, or int8 for raw pixels, which take one word
        each.
    """
    if dtype is torch.int8:
        w = F.pad(w, (0, 0, 0, 0, 0, 1))
    rows = w.permute(0, 3, 1, 2).flatten(1, 2).unsqueeze(-1)
    return pack_conv(rows, stride=2, padding=3, dtype=dtype)


def stem_native(
    image: Tensor,
    packed: PackedConv | PackedStemWinograd,
    scale: Tensor,
    shift: Tensor,
    values: Tensor,
    out: Tensor,
    slope: float | None,
    codes: StemCodes | None = None,
    padded: Size | None = None,
) -> None:
    """Runs the native kernel into `out` (N, K, H / 4, W / 4), unchecked: image contiguous, out in NHWC
    storage.

    padded: size to which the image is padded before it is resized to H x W; by default it is not resized.

    Products are of the packed dtype: float32 or bfloat16 with float32 sums, or int8 with the parameters in
    `codes`. Where out is uint8, scale and shift cover whole panels and are in quantization steps of out.

    With Winograd's filtering a non-finite value in the image spoils the results of every tile whose window
    contains it: tiles are 4 x 4 outputs of the convolution, counted from the top left, windows 14 x 14
    pixels. An infinity may become NaN.
    """
    raw = image.dtype is torch.uint8
    n, k, out_h, out_w = out.shape
    image_h, image_w = image.shape[1:3] if raw else image.shape[2:]
    codes, seen = codes or StemCodes(), (4 * out_h, 4 * out_w)
    native.module.stem(
        image.data_ptr(),
        values.data_ptr(),
        packed.data.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[image.dtype],
        native.DTYPE_CODES[out.dtype],
        native.PRODUCT_CODES[packed.data.dtype],
        n, image_h, image_w, *(padded or seen), *seen, k,
        common.native_slope(slope),
        torch.get_num_threads(),
        native.address(codes.raw),
        codes.zero,
        codes.bias,
        isinstance(packed, PackedStemWinograd),
    )  # fmt: skip


def fold_raw(
    w: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor, out: Quantum
) -> tuple[PackedConv, Tensor, Tensor, StemCodes]:
    """Folds the normalisation into weights (K, 3, 7, 7) and the norm, for products of raw pixels.

    mean, std: (3,) float64, for images from 0 to 1. The padding is the raw pixel nearest to the mean, at most
        half a raw step off.

    Returns:
        arguments of `stem_native`: int8 filters, scale, shift, and codes.
    """
    codes, step = quantize_weight(w / (255 * std.float()[:, None, None]), torch.int8)
    filters = codes.unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    scales = scale.double() * step.double() / out.step
    of_mean = filters.sum((2, 3)).double() @ (255 * mean)
    zero = sum(round(255 * value) << 8 * channel for channel, value in enumerate(mean.tolist()))
    raw = 255 * torch.cat([std, mean]).float()
    shifts = shift.double() / out.step - scales * of_mean
    packed = pack_stem_rows(filters, torch.int8)
    return packed, whole_panels(scales), whole_panels(shifts), StemCodes(raw, zero, out.zero)


@dataclasses.dataclass(frozen=True)
class PackedStem:
    """A stem's parameters for the CUDA kernel: groups of 64 output channels, zero-padded beyond the last.

    Attributes:
        weight: in the kernel's dtype. float32: (groups, 7 * 21, 64), the 7 x 3 elements of each filter row.
            16 bits: (groups, 64, 184), each filter row with one zero before and two after it, then zeros.
        scale, shift: (groups * 64,) float32.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor


def pack_stem(w: Tensor, scale: Tensor, shift: Tensor) -> PackedStem:
    """Packs a stem's parameters for the CUDA kernel."""
    k = w.shape[0]
    groups = -(-k // CUDA_CHANNELS)
    more = groups * CUDA_CHANNELS - k
    rows = F.pad(w.detach().permute(0, 2, 3, 1).reshape(k, 7, 21), (0, 0, 0, 0, 0, more))
    if w.dtype is torch.float32:
        weight = rows.reshape(groups, CUDA_CHANNELS, 7 * 21).transpose(1, 2)
    else:
        rows = F.pad(rows, (1, 2)).reshape(groups, CUDA_CHANNELS, 7 * 24)
        weight = F.pad(rows, (0, CUDA_WEIGHT_ROW - 7 * 24))
    scale, shift = (F.pad(common.float32(v), (0, more)) for v in (scale, shift))
    return PackedStem(weight.contiguous(), scale, shift)


def stem_cuda(
    image: Tensor,
    packed: PackedStem,
    values: Tensor,
    out: Tensor,
    slope: float | None,
    backend: str = "cuda",
    blocks: int | None = None,
    overlap: bool = False,
) -> None:
    """Runs the CUDA kernel into `out` (N, K, H / 4, W / 4), unchecked: channel stride 1 in out, any image.

    blocks: number of blocks that share the tiles, by default as many as the GPU holds at once.
    overlap: see `call_cuda`.
    """
    raw = image.dtype is torch.uint8
    n, k, out_h, out_w = out.shape
    image = image.permute(0, 3, 1, 2) if raw else image
    backends.call_cuda(
        backend,
        overlap,
        OP,
        image,
        image.data_ptr(),
        values.data_ptr(),
        packed.weight.data_ptr(),
        packed.scale.data_ptr(),
        packed.shift.data_ptr(),
        out.data_ptr(),
        native.DTYPE_CODES[image.dtype],
        native.DTYPE_CODES[out.dtype],
        n, *image.shape[2:],
        image.stride(),
        out_h, out_w, k,
        common.strides(out),
        common.native_slope(slope),
        blocks or CUDA_BLOCKS_A_MULTIPROCESSOR * backends.multiprocessors(image),
    )  # fmt: skip


def _empty(image: Tensor, w: Tensor, size: list[int]) -> Tensor:
    return image.new_empty((image.shape[0], size[0] // 4, size[1] // 4, w.shape[0]), dtype=w.dtype).permute(
        0, 3, 1, 2
    )


@backends.custom_op(OP)
def _op(
    image: Tensor, w: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor, size: list[int],
    padded: list[int], slope: float | None, backend: str,
) -> Tensor:  # fmt: skip
    out, values = _empty(image, w, size), normalised_values(mean, std)
    if backend == "native":
        packed = pack_stem_rows(w, product_dtype(w.dtype, w.dtype))
        parameters = common.float32(scale), common.float32(shift), values
        stem_native(image.contiguous(), packed, *parameters, out, slope, padded=(padded[0], padded[1]))
    else:
        stem_cuda(image, pack_stem(w, scale, shift), values, out, slope, backend)
    return out


@_op.register_fake
def _(
    image: Tensor, w: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, std: Tensor, size: list[int],
    padded: list[int], slope: float | None, backend: str,
) -> Tensor:  # fmt: skip
    return _empty(image, w, size)


def stem(
    image: Tensor,
    w: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    size: Size | None = None,
    padded: Size | None = None,
    slope: float | None = 0.0,
    backend: str = "auto",
) -> Tensor:
    """max_pool3x3s2(act(scale * conv7x7s2((image / 255 - mean) / std) + shift)).

    Args:
        image: uint8 (N, H, W, 3), or (N, 3, H, W) in w's dtype, which is already normalised.
        w: (K, 3, 7, 7), stride 2, padding 3.
        scale, shift: (K,), the folded batch norm.
        mean, std: (3,), normalisation of raw images.
        size: height and width to which the image is brought; multiples of 4, by default the image's own.
        padded: height and width to which the image is padded with zeros, after normalisation and before it
            is resized to `size`, bilinearly as by `torch.nn.functional.interpolate` without align_corners. By
            default `size`: it is only padded.
        slope: slope of the activation for negative values: 0 is relu, up to 1 leaky relu, None no activation.
        backend: one of `BACKENDS`; "auto" takes the best kernel that can run, else torch's own calls.

    Returns:
        (N, K, height / 4, width / 4), dtype of w.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for cannot run.
    """
    image, w = common.autocast(image), common.autocast(w)
    size, padded = _check(image, w, size, padded)
    for name, value in (("scale", scale), ("shift", shift)):
        common.check_shape(OP, name, value, (w.shape[0],), f"w of {tuple(w.shape)}")
    for name, value in (("mean", mean), ("std", std)):
        common.check_shape(OP, name, value, (3,), "an RGB image")
    for name, value in (("w", w), ("scale", scale), ("shift", shift), ("mean", mean), ("std", std)):
        common.check_device(OP, name, value, image)
    common.check_slope(OP, slope)
    tensors = (image, w, scale, shift, mean, std)
    chosen = backends.choose(OP, backend, can_run(image, w, padded != size), tensors)
    if chosen == "reference":
        return stem_reference(*tensors, size, slope, padded)
    return _op(*tensors, list(size), list(padded), slope, chosen)


def _check(image: Tensor, w: Tensor, size: Size | None, padded: Size | None) -> tuple[Size, Size]:
    common.check_tensor(OP, "image", image)
    common.check_tensor(OP, "w", w)
    raw = image.dtype is torch.uint8
    channels = 3 if raw else 1
    if image.ndim != 4 or image.shape[channels] != 3:
        layout = "(N, H, W, 3)" if raw else "(N, 3, H, W)"
        raise ValueError(f"{OP}: image is {image.dtype} {tuple(image.shape)}, it must be {layout}")
    if not raw and image.dtype != w.dtype:
        raise TypeError(f"{OP}: image is {image.dtype}, it may be uint8 or w's {w.dtype}")
    if w.ndim != 4 or tuple(w.shape[1:]) != (3, 7, 7):
        raise ValueError(f"{OP}: w is {tuple(w.shape)}, it must be (K, 3, 7, 7)")
    own = (image.shape[1], image.shape[2]) if raw else (image.shape[2], image.shape[3])
    size = own if size is None else size
    padded = size if padded is None else padded
    if len(padded) != 2 or padded[0] < own[0] or padded[1] < own[1]:
        name = "size" if padded is size else "padded"
        raise ValueError(f"{OP}: {name} is {padded}, it must be at least the image's {own}")
    if len(size) != 2 or size[0] % 4 or size[1] % 4 or min(size) < 4:
        raise ValueError(f"{OP}: size is {size}, it must be multiples of 4")
    return size, padded
