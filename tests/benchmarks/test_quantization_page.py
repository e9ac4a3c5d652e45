"""What fewer bits cost on CamVid: variants that run on a CPU in the end, their rows and the page's table."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import quantization
import torch
from cases import SHIPPED, build
from PIL import Image

from shelfkern.data import Sample, camvid


@pytest.fixture(scope="module")
def frames():
    """Two frames of noise."""
    values = np.random.default_rng(0)
    image = values.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    mask = values.integers(0, len(camvid.CLASSES), (2, 64, 96), dtype=np.uint8)
    pairs = zip(image, mask, strict=True)
    return [Sample("noise", Image.fromarray(one), Image.fromarray(other)) for one, other in pairs]


@dataclasses.dataclass(frozen=True)
class Fake:
    """A peer that tells bright from dark, or fails."""

    failure: Exception | None = None
    missing: str | None = None

    def why_not(self):
        return self.missing

    def prepare(self, model, images, dtype, labels):
        if self.failure is not None:
            raise self.failure
        assert labels
        return lambda: (images[:, 0] > 0).to(torch.uint8)


@torch.no_grad()
def test_labels_are_of_each_frame(frames):
    model = build(SHIPPED)
    found = quantization.labels_by(Fake(), model, torch.float32, frames)
    assert found.shape == (2, 64, 96) and found.dtype == np.uint8
    assert not np.array_equal(found[0], found[1])
    (again,) = quantization.labels_by(Fake(), model, torch.float32, frames[1:])
    assert np.array_equal(found[1], again)


@torch.no_grad()
def test_what_cannot_run_is_a_row_with_its_reason(frames, monkeypatch):
    model = build(SHIPPED)
    seen = []

    def deployed(range_images):
        seen.append(range_images((64, 96)))
        return [
            ("it runs", Fake(), torch.float32),
            ("it fails", Fake(failure=ValueError("dtype is torch.int8\nand more")), torch.int8),
            ("it is absent", Fake(missing="not installed: it"), torch.int8),
        ]

    monkeypatch.setattr(quantization, "deployed", deployed)
    pictures = [quantization.raw([frame]) for frame in frames]
    exact = quantization.labels_by(Fake(), model, torch.float32, frames)
    found = list(quantization.rows_of_deployed(model, pictures, frames, exact))
    assert torch.equal(seen[0], torch.cat(pictures))
    assert found[0]["differs"] == 0 and 0 <= found[0]["miou"] <= 1
    assert [row.get("reason") for row in found] == [None, "dtype is torch.int8", "not installed: it"]
    about = {"weights": "w", "digest": "d", "cpu": "A CPU", "torch": "2", "shelfkern": "1", "commit": "c"}
    about |= {"command": "it", "time": "2026-01-02T", "calibration": 2}
    lines = quantization.table([row | about for row in found]).splitlines()
    assert lines[2].startswith("| it runs | ") and lines[3] == "| it fails | dtype is torch.int8 | | | |"
    assert "2 validation frames, calibrated on 2 training frames" in lines[-1]


def test_the_page_shows_the_results():
    rows = [json.loads(line) for line in quantization.RESULTS.read_text().splitlines()]
    text = quantization.PAGE.read_text()
    assert quantization.replaced(text, quantization.table(rows)) == text


def test_all_that_is_deployed_takes_the_frames_for_its_ranges():
    def range_images(size):
        raise NotImplementedError

    found = quantization.deployed(range_images)
    assert all(peer.range_images is range_images for _, peer, _ in found)
    assert len({name for name, _, _ in found}) == len(found)
