"""The accuracy of lower precision: mIoU on CamVid in float32, 16 bits, int8 and fp8.

    python benchmarks/quantization.py --data camvid

On a CPU, torch computes the GPU's 8-bit products, exact except for the order of sums; on a GPU the kernels
chosen by the engine do. On a CPU the CPU engine, ONNX Runtime and OpenVINO follow, calibrated on the same
frames, in the form that `models.py` times.

Rows go to benchmarks/results/quantization.jsonl, from which the table of docs/quantization.md is generated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

# Metadata of the rows is shared with the op benchmarks.
sys.path.append(str(Path(__file__).parent / "ops"))

from cases import Size, normalised
from peers import Peer
from peers.cpu_runtimes import OnnxRuntime, OpenVino
from peers.ours import Shelfkern
from peers.quantised import RangeImages
from results import about
from table import replaced, titled

import shelfkern.nn
from shelfkern.data import Dataset, Sample, camvid
from shelfkern.engine.calibration import calibrate
from shelfkern.engine.gpu.program import GpuProgram, Options
from shelfkern.engine.gpu.timing import tuner_of
from shelfkern.engine.lower import lower
from shelfkern.engine.quantization import KINDS, quantized
from shelfkern.evaluate import ConfusionMatrix
from shelfkern.files import replacing
from shelfkern.nn import ShelfNet

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quantization.jsonl"
PAGE = ROOT / "docs" / "quantization.md"
BATCH = 4

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant: 8-bit `dtype` with ranges found by `method`, or floating activations of `dtype`."""

    name: str
    dtype: torch.dtype
    method: str | None = None


VARIANTS = (
    Variant("float32", torch.float32),
    Variant("float16", torch.float16),
    Variant("int8, least error", torch.int8, "least_error"),
    Variant("int8, largest", torch.int8, "largest"),
    Variant("fp8 (e4m3), largest", torch.float8_e4m3fn, "largest"),
)


def deployed(range_images: RangeImages) -> list[tuple[str, Peer, torch.dtype]]:
    """The 8-bit implementations for a CPU: name, peer and dtype."""
    ours = Shelfkern("shelfkern", "shelfkern", range_images=range_images)
    theirs = OpenVino(range_images=range_images)
    return [
        ("CPU engine, float32", ours, torch.float32),
        ("CPU engine, bfloat16", ours, torch.bfloat16),
        ("CPU engine, int8", ours, torch.int8),
        ("OpenVINO, bfloat16", theirs, torch.bfloat16),
        ("OpenVINO, int8", theirs, torch.int8),
        ("ONNX Runtime, int8", OnnxRuntime(range_images=range_images), torch.int8),
    ]


def spread(dataset: Dataset, count: int) -> list[Sample]:
    """`count` frames, spaced evenly over the film, because adjacent ones are alike."""
    count = min(count, len(dataset))
    return [dataset[index * len(dataset) // count] for index in range(count)]


def raw(frames: Sequence[Sample]) -> Tensor:
    """uint8 (N, H, W, 3)."""
    return torch.from_numpy(np.stack([np.asarray(frame.image) for frame in frames]))


def program_of(
    model: ShelfNet, variant: Variant, calibration: Sequence[Tensor], device: torch.device
) -> GpuProgram:
    """A variant's program for the network."""
    plan, dtype = lower(model), variant.dtype
    if dtype in KINDS:
        ranges = calibrate(plan, calibration, dtype, model.normalisation, variant.method)
        plan, dtype = quantized(plan, ranges, dtype), torch.float16
    options = Options(device, dtype, ours=device.type == "cuda", graphs=False)
    return GpuProgram(plan, options, model.normalisation, model.align_corners, tuner_of(device, False))


@torch.no_grad()
def labels_of(program: GpuProgram, frames: Sequence[Sample], device: torch.device) -> np.ndarray:
    """uint8 (N, H, W)."""
    parts = [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]
    return np.concatenate([program.labels(raw(part).to(device)).cpu().numpy() for part in parts])


@torch.no_grad()
def labels_by(peer: Peer, model: ShelfNet, dtype: torch.dtype, frames: Sequence[Sample]) -> np.ndarray:
    """uint8 (N, H, W), frame by frame."""
    images = normalised(raw(frames[:1]), model)
    run = peer.prepare(model, images, dtype, labels=True)
    found = []
    for frame in frames:
        images.copy_(normalised(raw([frame]), model))
        found.append(run().numpy().copy())
    return np.concatenate(found)


def row(
    variant: Variant, labels: np.ndarray, exact: np.ndarray, frames: Sequence[Sample], seconds: float
) -> Row:
    """One variant's results; `exact` are float32's labels."""
    matrix = ConfusionMatrix(len(camvid.CLASSES))
    for frame, predicted in zip(frames, labels, strict=True):
        matrix.update(np.asarray(frame.mask), predicted)
    return {
        "variant": variant.name,
        "dtype": str(variant.dtype).removeprefix("torch."),
        "method": variant.method,
        "miou": round(matrix.mean_iou(), 5),
        "pixel_accuracy": round(matrix.pixel_accuracy(), 5),
        "differs": round(float((labels != exact).mean()), 6),
        "iou": dict(zip(camvid.CLASSES, matrix.iou().round(4).tolist(), strict=True)),
        "frames": len(frames),
        "seconds": round(seconds, 1),
    }


def digest(model: ShelfNet) -> str:
    """Hash that identifies the weights."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def table(rows: list[Row]) -> str:
    """The page's table, and the source of its figures."""
    titles = ("variant", "mIoU", "change from float32", "pixel accuracy", "labels differing from float32")
    lines = titled(*titles)
    first = rows[0]
    for one in rows:
        if "reason" in one:
            lines.append(f"| {one['variant']} | {one['reason']} | | | |")
            continue
        change = "" if one is first else f"{100 * (one['miou'] - first['miou']):+.2f}"
        cells = (f"{100 * one['miou']:.2f} %", change, f"{100 * one['pixel_accuracy']:.2f} %")
        differs = "" if one is first else f"{100 * one['differs']:.2f} %"
        lines.append(f"| {one['variant']} | {' | '.join(cells)} | {differs} |")
    size = f"{first['frames']} validation frames, calibrated on {first['calibration']} training frames"
    machine = first.get("gpu") or f"{first['cpu']}, the GPU's int8 and fp8 products computed by torch"
    versions = f"torch {first['torch']}, shelfkern {first['shelfkern']} at {first['commit']}"
    weights = f"weights `{first['weights']}` ({first['digest']})"
    run = f"`{first['command']}`; {machine}; {versions}; {first['time'][:10]}."
    return "\n".join([*lines, "", f"{size}, {weights}; {run}"])


def write_page(rows: list[Row]) -> None:
    """Rewrites the part of docs/quantization.md between its markers."""
    text = replaced(PAGE.read_text(), table(rows))
    with replacing(PAGE) as temporary:
        temporary.write_text(text)


def rows_of_deployed(
    model: ShelfNet, pictures: Sequence[Tensor], frames: Sequence[Sample], exact: np.ndarray
) -> Iterator[Row]:
    """A row for each of `deployed`; with a reason if it has no labels."""

    def range_images(size: Size) -> Tensor:
        return torch.cat(list(pictures))

    for name, peer, dtype in deployed(range_images):
        variant, begin = Variant(name, dtype), time.monotonic()
        reason = peer.why_not()
        if reason is None:
            try:
                labels = labels_by(peer, model, dtype, frames)
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
        if reason is None:
            yield row(variant, labels, exact, frames, time.monotonic() - begin)
        else:
            yield {"variant": name, "dtype": str(dtype).removeprefix("torch."), "reason": reason}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--weights", default="camvid", help="A shipped name or a file.")
@click.option("--device", default="cpu", help="cpu, or a CUDA device, whose kernels are then judged.")
@click.option("--calibration", default=16, type=click.IntRange(1), help="Training frames to calibrate on.")
@click.option("--frames", type=click.IntRange(1), help="Validation frames; all by default.")
def main(data: Path, weights: str, device: str, calibration: int, frames: int | None) -> None:
    """Measures mIoU on CamVid in 32, 16 and 8 bits, and writes it down."""
    where = torch.device(device)
    model = shelfkern.nn.from_weights(weights, where)
    facts = {"weights": weights, "digest": digest(model)} | about(where.type)
    every = camvid.CamVid(data, "val")
    chosen = spread(every, frames or len(every))
    to_calibrate = spread(camvid.CamVid(data, "train"), calibration)
    pictures = [raw([frame]) for frame in to_calibrate]
    rows: list[Row] = []

    def add(found: Row) -> None:
        rows.append(found | {"calibration": len(pictures)} | facts)
        click.echo(f"{found['variant']:20}  " + (found.get("reason") or _figures(found)))

    exact = None
    for variant in VARIANTS:
        begin = time.monotonic()
        labels = labels_of(program_of(model, variant, pictures, where), chosen, where)
        exact = labels if exact is None else exact
        add(row(variant, labels, exact, chosen, time.monotonic() - begin))
    if where.type == "cpu":
        assert exact is not None
        for found in rows_of_deployed(model, pictures, chosen, exact):
            add(found)
    with replacing(RESULTS) as temporary:
        temporary.write_text("".join(json.dumps(one) + "\n" for one in rows))
    write_page(rows)


def _figures(row: Row) -> str:
    return f"mIoU {row['miou']:.4f}  unlike float32 {row['differs']:.4f}"


if __name__ == "__main__":
    main()
