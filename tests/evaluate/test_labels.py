"""Labels by every protocol against full-size tensors and plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import picture, tiny
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import shelfkern
from shelfkern import native
from shelfkern.evaluate import PROTOCOLS, Labeller, Protocol
from shelfkern.nn import ShelfNet

needs_native = pytest.mark.skipif(native.reason("conv_bn_act") is not None, reason="no native kernels")

WHOLE = (
    Protocol(),
    Protocol(mirror=True),
    Protocol((0.5, 1.0, 1.75)),
    Protocol((0.4, 0.75, 1.0, 1.3), mirror=True),
)
WINDOWS = (
    Protocol((1.0,), False, 64, 64),
    Protocol((0.5, 1.0, 1.75), True, 81, 64),
    Protocol((0.7, 2.0), True, 100, 32),
)


def stretched(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def normalised(pixels: np.ndarray, model: ShelfNet) -> Tensor:
    mean, std = (np.array(part) for part in (model.normalisation.mean, model.normalisation.std))
    return torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None]


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=True)


def whole_by_hand(model: ShelfNet, pixels: np.ndarray, protocol: Protocol) -> Tensor:
    """Sums of probabilities, each scale's scores made at full size."""
    height, width = pixels.shape[:2]
    total = torch.zeros(1, model.config.num_classes, height, width, dtype=torch.float64)
    for scale in protocol.scales:
        x = normalised(stretched(pixels, round(height * scale), round(width * scale)), model)
        rows, columns = (32 * math.ceil(extent / 32) for extent in x.shape[2:])
        x = F.pad(x, (0, columns - x.shape[3], 0, rows - x.shape[2]))
        full = max(height, round(rows / scale)), max(width, round(columns / scale))
        for mirror in (False, True)[: 1 + protocol.mirror]:
            scores = resized(model.coarse_scores(x.flip(3) if mirror else x), full)
            scores = scores.flip(3) if mirror else scores
            total += scores.softmax(1)[:, :, :height, :width]
    return total


def windows_by_hand(model: ShelfNet, pixels: np.ndarray, protocol: Protocol) -> Tensor:
    """Sums of exp(scores) as published, window by window."""
    height, width = pixels.shape[:2]
    total = torch.zeros(1, model.config.num_classes, height, width, dtype=torch.float64)
    side = protocol.crop_size
    for scale in protocol.scales:
        longer = math.ceil(protocol.base_size * scale)
        shorter = int(min(height, width) / max(height, width) * longer + 0.5)
        rows, columns = (longer, shorter) if height > width else (shorter, longer)
        scaled = stretched(pixels, rows, columns)
        sums, visits = (
            torch.zeros(*total.shape[:2], rows, columns, dtype=torch.float64),
            torch.zeros(rows, columns),
        )
        for top in starts(rows, side):
            for left in starts(columns, side):
                part = scaled[top : top + side, left : left + side]
                black = np.zeros((side, side, 3), np.uint8)
                black[: part.shape[0], : part.shape[1]] = part
                x = normalised(black, model)
                for mirror in (False, True)[: 1 + protocol.mirror]:
                    scores = model(x.flip(3)).flip(3) if mirror else model(x)
                    part_scores = scores.exp()[:, :, : part.shape[0], : part.shape[1]]
                    sums[:, :, top : top + side, left : left + side] += part_scores
                visits[top : top + side, left : left + side] += 1
        assert visits.min() >= 1
        total += resized(sums / visits, (height, width))
    return total


def starts(extent: int, side: int) -> list[int]:
    """Every two thirds of a window, until one reaches the end."""
    found = [0]
    while found[-1] + side < extent:
        found.append(found[-1] + side * 2 // 3)
    return found


def by_hand(model: ShelfNet, pixels: np.ndarray, protocol: Protocol) -> Tensor:
    with torch.no_grad():
        return (whole_by_hand if protocol.crop_size is None else windows_by_hand)(model, pixels, protocol)


def without_full_size_scores(model: ShelfNet) -> ShelfNet:
    """The same model; its call, which makes scores at full size, fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("scores at full size")

    model.register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("size", [(70, 90), (96, 64), (20, 131)])
@pytest.mark.parametrize("protocol", [*WHOLE, *WINDOWS], ids=str)
def test_float64_against_brute_force(protocol: Protocol, size: tuple[int, int]) -> None:
    pixels = picture(*size)
    expected = by_hand(tiny(torch.float64), pixels, protocol)
    labeller = Labeller(without_full_size_scores(tiny(torch.float64)), protocol)
    found = labeller.sums(pixels)
    assert found.dtype is torch.float64
    assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.mean().item())
    labels = labeller(pixels)
    assert labels.dtype == np.uint8 and labels.shape == size
    # Without sums labels come from scores that are resized in float32.
    assert (labels == expected.argmax(1)[0].numpy()).mean() > (0.999 if protocol.is_plain else 0.999999)
    assert len(np.unique(labels)) > 1


class Rounded:
    """A model of another dtype that takes and gives float64, for `by_hand`."""

    def __init__(self, model: ShelfNet, dtype: torch.dtype) -> None:
        self.model, self.dtype = model.to(dtype), dtype
        self.config, self.normalisation = model.config, model.normalisation

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype)).double()

    def coarse_scores(self, x: Tensor) -> Tensor:
        return self.model.coarse_scores(x.to(self.dtype)).double()


def relative(sums: Tensor) -> Tensor:
    return sums.double() / sums.double().sum(1, keepdim=True)


def assert_as_exact_as_brute_force(
    found: Tensor, pixels: np.ndarray, protocol: Protocol, dtype: torch.dtype, **changes: object
) -> None:
    """The error of probabilities is at most twice that of `by_hand` with scores in `dtype`."""
    expected = relative(by_hand(tiny(torch.float64, **changes), pixels, protocol))
    rounded = relative(by_hand(Rounded(tiny(**changes), dtype), pixels, protocol))
    allowed = (rounded - expected).square().mean().sqrt()
    assert 0 < (relative(found) - expected).square().mean().sqrt() <= 2 * allowed


@pytest.mark.parametrize("changes", [{}, dict(head="linear", merge="deconv")], ids=["conv", "linear"])
@pytest.mark.parametrize("protocol", [WHOLE[-1], WINDOWS[1]], ids=str)
def test_float32_is_as_exact_as_brute_force(protocol: Protocol, changes: dict[str, object]) -> None:
    pixels = picture(70, 90)
    found = Labeller(tiny(**changes), protocol).sums(pixels)
    assert found.dtype is torch.float32
    assert_as_exact_as_brute_force(found, pixels, protocol, torch.float32, **changes)


@needs_native
@pytest.mark.parametrize("protocol", [WHOLE[0], WHOLE[-1], WINDOWS[1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerated_is_as_exact_as_brute_force(dtype: torch.dtype, protocol: Protocol) -> None:
    pixels = picture(70, 90)
    found = Labeller(shelfkern.accelerate(tiny(), dtype), protocol).sums(pixels)
    assert found.dtype is torch.float32
    assert_as_exact_as_brute_force(found, pixels, protocol, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("protocol", [WHOLE[0], WHOLE[-1], WINDOWS[1]], ids=str)
def test_on_a_gpu(protocol: Protocol) -> None:
    pixels = picture(70, 90)
    found = Labeller(tiny().cuda(), protocol).sums(pixels)
    assert found.is_cuda
    assert_as_exact_as_brute_force(found.cpu(), pixels, protocol, torch.float32)
    fast = Labeller(shelfkern.accelerate(tiny(), torch.float16, "cuda"), protocol)
    assert_as_exact_as_brute_force(fast.sums(pixels).cpu(), pixels, protocol, torch.float16)
    assert (fast(pixels) == fast.sums(pixels).argmax(1)[0].cpu().numpy()).mean() > 0.999


@needs_native
def test_an_accelerated_model_takes_images_below_32_pixels() -> None:
    for protocol in (Protocol(), WHOLE[-1], WINDOWS[1]):
        found = Labeller(shelfkern.accelerate(tiny()), protocol)(picture(20, 45))
        assert (found == Labeller(tiny(), protocol)(picture(20, 45))).mean() > 0.999


def test_single_scale_is_the_model_s_own_argmax() -> None:
    for size in ((70, 90), (64, 96), (33, 47)):
        pixels, model = picture(*size), tiny(torch.float64)
        with torch.no_grad():
            scores = model(normalised(pixels, model))
        found = Labeller(model, Protocol())(pixels)
        assert (found == scores.argmax(1)[0].numpy()).mean() > 0.999


@needs_native
def test_single_scale_of_an_accelerated_model_is_predict() -> None:
    fast, pixels = shelfkern.accelerate(tiny()), picture(70, 90)
    found = Labeller(fast, Protocol())(pixels)
    assert (found == fast.predict(torch.from_numpy(pixels)[None])[0].numpy()).all()


@pytest.mark.parametrize("size", [(70, 90), (20, 45)])
def test_a_model_that_enlarges_images_pads_them_as_itself(size: tuple[int, int]) -> None:
    pixels, model = picture(*size), tiny(torch.float64, input_scale=1.6)
    x = normalised(pixels, model)
    # At least 32 rows are needed, of multiples of 20.
    x = F.pad(x, (0, 0, 0, max(0, 40 - size[0])))
    with torch.no_grad():
        scores = model(x)[:, :, : size[0]]
    for protocol in (Protocol(), Protocol((1.0, 1.0))):
        labels = Labeller(model, protocol)(pixels)
        assert (labels == scores.argmax(1)[0].numpy()).mean() > 0.999


def test_more_classes_than_a_byte_holds() -> None:
    model = tiny(torch.float64, num_classes=300)
    with torch.no_grad():
        scores = model(normalised(picture(70, 90), model))
    found = Labeller(model, Protocol())(picture(70, 90))
    assert found.dtype == np.int64 and found.max() > 255
    assert (found == scores.argmax(1)[0].numpy()).mean() > 0.999


def test_the_mirror_of_an_image_gives_mirrored_labels() -> None:
    # Only where nothing is padded: padding is on the right of an image and of its mirror image.
    for protocol in (Protocol((1.0,), True), Protocol((1.0,), True, 64, 64)):
        pixels = picture(64, 64)
        labeller = Labeller(tiny(torch.float64), protocol)
        one, other = labeller.sums(pixels), labeller.sums(np.ascontiguousarray(pixels[:, ::-1]))
        assert_close(one, other.flip(3), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", [WHOLE[0], WHOLE[-1], WINDOWS[1]], ids=str)
def test_arrays_of_any_strides_that_are_left_alone(protocol: Protocol) -> None:
    pixels = picture(70, 90)
    before = pixels.copy()
    labeller = Labeller(tiny(), protocol)
    expected = labeller(pixels)
    pixels.flags.writeable = False
    hostile = [pixels, np.ascontiguousarray(pixels[::-1])[::-1], np.repeat(pixels, 2, 1)[:, ::2]]
    hostile.append(np.asfortranarray(pixels))
    for array in hostile:
        assert (labeller(array) == expected).all()
    assert (pixels == before).all()


def test_what_is_no_model() -> None:
    with pytest.raises(
        TypeError, match=r"^model is a Linear, it may be a ShelfNet or what accelerate gives$"
    ):
        Labeller(torch.nn.Linear(1, 1), Protocol())


def test_scores_too_large_for_exp() -> None:
    model = tiny()
    last = [module for module in model.head.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    last.weight.data *= 1000
    Labeller(model, WHOLE[-1])(picture(70, 90))
    with pytest.raises(RuntimeError, match=r"are not finite: windows need scores below 88$"):
        Labeller(model, WINDOWS[1])(picture(70, 90))


# --- the protocol itself


def test_the_published_protocol() -> None:
    published = PROTOCOLS["published"]
    assert published.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and published.mirror
    assert published.stride() == 341
    assert published.window_size(375, 500, 1.25) == (480, 640)
    assert published.window_size(500, 375, 0.75) == (384, 288)
    assert PROTOCOLS["single"].is_plain and not published.is_plain


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(scales=()), r"^scales is \(\), it may be one or more numbers above 0, up to 16$"),
        (dict(scales=(1.0, 0.0)), r"^scales is \(1.0, 0.0\)"),
        (dict(scales=(math.nan,)), r"^scales is \(nan,\)"),
        (dict(scales=("1",)), r"^scales is \('1',\)"),
        (dict(base_size=512), "^base_size is 512 and crop_size None, windows need both$"),
        (dict(crop_size=512), "^crop_size is 512 and base_size None, windows need both$"),
        (dict(base_size=0, crop_size=64), "^base_size is 0, it may be any integer from 1$"),
        (dict(base_size=64, crop_size=72), "^crop_size is 72, it may be a multiple of 32 from 32$"),
        (dict(base_size=64, crop_size=0), "^crop_size is 0, it may be"),
        (dict(tolerance=0), "^tolerance is 0, it may be between 0 and 1$"),
    ],
)
def test_protocols_that_cannot_be(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Protocol(**fields)
