"""Segments a photograph with the weights that ship, and compares speed and results with eager.

`make demo` runs it; `make demo IMAGE=street.jpg` takes another picture.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

import shelfkern
from shelfkern.cli.inputs import read_image
from shelfkern.files import replacing
from shelfkern.timing import median_ratio, time_interleaved
from shelfkern.visualise import overlay

OUTPUT = Path("shelfkern_out")
ROUNDS = 11
# Of the frames that the weights were trained on: larger pictures are made as small.
LONGER_SIDE = 480


def default_photo() -> tuple[Path, str]:
    """A photograph inside an installed package, and whose it is."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise SystemExit("the demo's photo comes with scikit-learn, which is not installed: run make demo")
    photo = Path(package.origin).parent / "datasets" / "images" / "china.jpg"
    return photo, "photo: Daniel Büchele, CC BY 2.0, from scikit-learn's sample images"


@torch.no_grad()
def main() -> None:
    """Runs the demo on the picture given, or on the default one."""
    photo, credit = (Path(sys.argv[1]), "") if len(sys.argv) > 1 else default_photo()
    image = read_image(photo)
    image.thumbnail((LONGER_SIDE, LONGER_SIDE))
    model = shelfkern.nn.from_weights("camvid")
    fast = shelfkern.accelerate(model)

    raw = torch.from_numpy(np.array(image))[None]
    x = torch.from_numpy(model.normalisation(np.asarray(image))).permute(2, 0, 1)[None]
    labels = fast.predict(raw)
    OUTPUT.mkdir(exist_ok=True)
    target = OUTPUT / "demo.png"
    with replacing(target) as temporary:
        overlay(image, labels[0].numpy(), model.palette, model.classes).save(temporary, "PNG")

    eager = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    scores = model(x)
    error = ((fast(x) - scores).abs().max() / scores.std()).item()
    equal = (labels == scores.argmax(1)).float().mean().item()
    print(f"{photo.name}, {image.width} x {image.height}; {credit}")
    print(f"parity with eager: scores within {error:.1e} of their deviation, {equal:.3%} of the labels equal")
    timings = time_interleaved(
        {
            "eager, channels_last": lambda: eager(x_last).argmax(1),
            "accelerated": lambda: fast(x).argmax(1),
            "accelerated, predict": lambda: fast.predict(raw),
        },
        ROUNDS,
    )
    baseline = timings["eager, channels_last"]
    for name, timing in timings.items():
        ratio = median_ratio(baseline, timing)
        print(f"  {name:22} {timing.median * 1e3:7.1f} ms   {ratio:.2f}x   labels of one picture")
    print(f"the picture: {target.resolve()}")


if __name__ == "__main__":
    main()
