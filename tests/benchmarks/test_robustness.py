"""Changes of validation frames, and the mIoU under them."""

import numpy as np
import pytest
import robustness
from PIL import Image


class Frames:
    """Two frames whose red says the class."""

    classes = ("low", "high")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        mask = np.zeros((40, 60), np.uint8)
        mask[10:, 8 * index + 16 :] = 1
        pixels = np.stack([mask * 200 + 20] * 3, axis=2)
        return type("Sample", (), {"image": Image.fromarray(pixels), "mask": Image.fromarray(mask)})


def by_brightness(pixels):
    return np.uint8(pixels[..., 0] > pixels[..., 0].mean())


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_images_and_masks_change_together(name):
    sample = Frames()[1]
    pixels, mask = robustness.CHANGES[name](sample.image, sample.mask, np.random.default_rng(0))
    scale = {"3/4 size": 0.75, "5/4 size": 1.25}.get(name, 1)
    assert mask.shape == (40 * scale, 60 * scale) and pixels.shape == (*mask.shape, 3)
    assert pixels.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
    assert (by_brightness(pixels) == mask).mean() > 0.97
    assert name == "none" or not np.array_equal(pixels, np.array(sample.image))


def test_miou_of_right_labels():
    assert robustness.miou(by_brightness, Frames(), robustness.CHANGES["dusk"]) == 1
    wrong = robustness.miou(
        lambda pixels: by_brightness(pixels)[:, ::-1], Frames(), robustness.CHANGES["mirror"]
    )
    assert 0.1 < wrong < 0.9
