"""A CamVid of a few random frames, and a recipe small enough for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stages import RECIPE


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def data(tmp_path) -> Path:
    """Four frames to train on and two to validate with, as CamVid lies on disk."""
    for split, seeds in (("train", range(4)), ("val", range(4, 6))):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for seed in seeds:
            generator = np.random.default_rng(seed)
            pixels = generator.integers(0, 256, (40, 48, 3), np.uint8)
            labels = generator.integers(0, 12, (40, 48), np.uint8)
            name = f"frame{seed}"
            Image.fromarray(pixels).save(tmp_path / "data" / split / "images" / f"{name}.jpg")
            Image.fromarray(labels).save(tmp_path / "data" / split / "labels" / f"{name}.png")
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path) -> Path:
    """The recipe's file."""
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path / "tiny.toml"
