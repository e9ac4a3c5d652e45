"""`shelfkern evaluate`: every option, and what happens when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_array_equal
from PIL import Image
from torch import nn

from shelfkern import accelerate, native
from shelfkern.cli import commands
from shelfkern.cli import evaluate as command
from shelfkern.data import camvid, open_dataset
from shelfkern.evaluate import PROTOCOLS, Evaluation, Protocol
from shelfkern.evaluate import evaluate as evaluate_model
from shelfkern.nn import ShelfNet, ShelfNetConfig, from_weights, save_weights

pytest.importorskip("scipy")

# The module itself: the package's name for it is the command.
evaluate_module = sys.modules[command.callback.__module__]


def save_tiny(path: Path, num_classes: int) -> Path:
    torch.manual_seed(1)
    config = ShelfNetConfig(
        num_classes=num_classes, backbone="resnet18", backbone_width=4, widths=(4, 8, 12), merge="attention",
        negative_slope=0.01, head="conv", head_width=4, presence=False,
    )  # fmt: skip
    model = ShelfNet(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
    # Scores of a trained network's size: exp of larger ones is infinite.
    last = [module for module in model.head.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight /= model(torch.randn(1, 3, 64, 96)).std() / 3
    save_weights(model, path, classes=None if num_classes != len(camvid.CLASSES) else camvid.CLASSES)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", len(camvid.CLASSES))


@pytest.fixture(scope="module")
def model(weights) -> ShelfNet:
    return from_weights(weights)


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path) -> Path:
    """Four validation frames in CamVid's layout."""
    for name in ("images", "labels"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
    for index in range(4):
        picture(seed=index).save(tmp_path / "data" / "val" / "images" / f"{index}.jpg")
        labels = np.random.default_rng(index).integers(0, camvid.UNLABELLED + 1, (7, 9)).astype(np.uint8)
        mask = Image.fromarray(labels).resize((90, 70), Image.Resampling.NEAREST)
        mask.save(tmp_path / "data" / "val" / "labels" / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def run(weights, root):
    """Runs `evaluate` on the frames with the tiny weights; anything but an exit is a failure."""

    def run(*args: object, weights: object = weights, dataset: str = "camvid", data: Path = root) -> Result:
        words = ["evaluate", weights, "--dataset", dataset, "--data", data, *args]
        result = CliRunner().invoke(commands, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def complaints(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.strip()]


def expected(model: ShelfNet, root: Path, protocol: Protocol = Protocol()) -> Evaluation:  # noqa: B008
    return evaluate_model(model, open_dataset("camvid", root, "val"), protocol)


@pytest.mark.parametrize(
    ("options", "protocol"),
    [
        ("", Protocol()),
        ("--boundary", Protocol(boundary=True)),
        ("--scales 0.5,1 --mirror", Protocol((0.5, 1.0), True)),
        ("--base-size 96 --crop-size 64", Protocol(base_size=96, crop_size=64)),
        (
            "--protocol published --scales 1 --no-mirror --base-size 96 --crop-size 64",
            Protocol((1.0,), False, 96, 64),
        ),
        ("--accelerate --workers 1", Protocol()),
        ("--batch 3 --boundary", Protocol(boundary=True)),
        ("--dtype bfloat16", Protocol()),
    ],
)
def test_protocols(options: str, protocol: Protocol, run, model, root, tmp_path) -> None:
    result = run(*options.split(), "--json", tmp_path / "found.json")
    assert result.exit_code == 0 and complaints(result) == []
    found = Evaluation.from_json((tmp_path / "found.json").read_text())
    assert found.protocol == protocol and found.images == 4 and found.classes == camvid.CLASSES
    truth = expected(model, root, protocol)
    # Other kernels and dtypes may tip pixels of which two classes are as likely.
    allowed = 0 if "accelerate" not in options and "dtype" not in options else 0.05
    difference = np.abs(found.matrix.counts - truth.matrix.counts).sum() / truth.matrix.counts.sum()
    assert difference <= allowed
    assert found.summary() in result.stdout
    assert all(name in result.stdout for name in camvid.CLASSES)
    assert ("boundary" in result.stdout) == protocol.boundary


def test_an_accelerated_network(run, model, root, tmp_path) -> None:
    fast = accelerate(model, torch.bfloat16)
    fast.save(tmp_path / "saved.safetensors")
    assert run("--json", tmp_path / "found.json", weights=tmp_path / "saved.safetensors").exit_code == 0
    found = Evaluation.from_json((tmp_path / "found.json").read_text())
    assert_array_equal(found.matrix.counts, expected(fast, root).matrix.counts)
    result = run("--dtype", "bfloat16", weights=tmp_path / "saved.safetensors")
    assert result.exit_code == 1 and "dtype is bfloat16, " in complaints(result)[-1]


@pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
def test_tuning_is_kept(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SHELFKERN_CACHE", str(tmp_path / "tuned"))
    assert run("--accelerate").exit_code == 0 and not (tmp_path / "tuned").exists()
    assert run("--accelerate", "--tune").exit_code == 0
    assert list((tmp_path / "tuned").glob("tuning-*.json"))


def test_the_published_protocol_by_name(run, monkeypatch) -> None:
    asked: list[Protocol] = []

    def keep(model: object, dataset: object, protocol: Protocol, **rest: object) -> None:
        asked.append(protocol)
        raise ValueError("enough")

    monkeypatch.setattr(evaluate_module, "evaluate_model", keep)
    assert "enough" in run("--protocol", "published").stderr
    assert asked == [PROTOCOLS["published"]]


def test_two_processes(run, model, root, tmp_path) -> None:
    result = run("--processes", 2, "--workers", 1, "--boundary", "--json", tmp_path / "found.json")
    assert result.exit_code == 0 and complaints(result) == []
    found, alone = Evaluation.from_json((tmp_path / "found.json").read_text()), expected(model, root)
    assert_array_equal(found.matrix.counts, alone.matrix.counts)
    assert found.images == 4 and not torch.distributed.is_initialized()


def test_under_torchrun(weights, model, root, tmp_path) -> None:
    words = ["evaluate", weights, "--dataset", "camvid", "--data", root, "--json", tmp_path / "found.json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "shelfkern", *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    found = Evaluation.from_json((tmp_path / "found.json").read_text())
    assert_array_equal(found.matrix.counts, expected(model, root).matrix.counts)
    assert done.stdout.count("mIoU") == 1


def test_files_that_are_written(run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--plot", tmp_path / "confusion.png", "--json", tmp_path / "found.json")
    assert result.exit_code == 0
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width > 300
    assert {file.name for file in tmp_path.iterdir()} == {"data", "confusion.png", "found.json"}


# --- submissions


def voc_test(root: Path) -> str:
    """Two test images in VOC's layout; gives the name of the first."""
    names = ["2008_000006", "2008_000011"]
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    (root / "VOC2012" / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(names) + "\n")
    for index, name in enumerate(names):
        picture(seed=index).save(root / "VOC2012" / "JPEGImages" / f"{name}.jpg")
    return names[0]


def cityscapes_test(root: Path) -> str:
    """Two test images in Cityscapes' layout; gives the name of the first."""
    folder = root / "leftImg8bit" / "test" / "berlin"
    folder.mkdir(parents=True)
    names = ["berlin_000000_000019", "berlin_000001_000019"]
    for index, name in enumerate(names):
        picture(seed=index).save(folder / f"{name}_leftImg8bit.png")
    return names[0]


@pytest.mark.parametrize(
    ("kind", "classes", "build", "written"),
    [
        ("voc", 21, voc_test, "results/VOC2012/Segmentation/comp6_test_cls/{}.png"),
        ("cityscapes", 19, cityscapes_test, "{}_pred_labelIds.png"),
    ],
)
def test_submissions(kind, classes, build, written, run, tmp_path) -> None:
    weights, name = save_tiny(tmp_path / "other.safetensors", classes), build(tmp_path / "test")
    options = ("--submission", kind, "--out", tmp_path / "out", "--split", "test")
    result = run(*options, weights=weights, dataset=kind, data=tmp_path / "test")
    assert result.exit_code == 0 and result.stdout.startswith("no labelled pixels; 2 images in ")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 2 and tmp_path / "out" / written.format(name) in files
    with Image.open(files[0]) as image:
        assert image.size == (90, 70)


# --- what is wrong


def test_images_that_cannot_be_read(run, model, root, tmp_path) -> None:
    path = root / "val" / "images" / "2.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (root / "val" / "labels" / "1.png").unlink()
    result = run("--json", tmp_path / "found.json")
    assert result.exit_code == 1
    first, second = complaints(result)
    assert first.startswith("1 is skipped: ") and "1.png is missing" in first
    assert second.startswith("2 is skipped: ") and "2.jpg cannot be decoded" in second
    assert "2 images, 2 skipped in " in result.stdout
    found = Evaluation.from_json((tmp_path / "found.json").read_text())
    assert_array_equal(found.matrix.counts, expected(model, root).matrix.counts)
    assert [name for name, _ in found.skipped] == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--scales 1,two", "'1,two' must be numbers separated by commas, such as 0.75,1,1.25"),
        ("--scales 0", "scales is (0.0,), it may be one or more numbers above 0"),
        ("--crop-size 64", "crop_size is 64 and base_size None, windows need both"),
        ("--split nosuch", "split is 'nosuch'"),
        ("--submission voc", "--submission and --out belong together: give both or neither"),
        ("--out somewhere", "--submission and --out belong together: give both or neither"),
        (
            "--submission cityscapes --out somewhere",
            "submission cityscapes is of 19 classes, the model has 11",
        ),
        ("--json nosuch/file.json", "--json nosuch/file.json cannot be written: nosuch is not a folder"),
        ("--plot nosuch/file.png", "--plot nosuch/file.png cannot be written: nosuch is not a folder"),
        ("--accelerate --dtype float16", "dtype is torch.float16, on a CPU it may be"),
        ("--tune", "--tune is for accelerated networks, give --accelerate too"),
        ("--batch 2 --mirror", "batch is 2, it must be 1 with other scales than 1, mirror images or windows"),
        ("--processes 2 --device cuda", "--processes is 2 and --device cuda, use torchrun for GPUs"),
        ("--device cuda", "device is 'cuda', and there is no GPU that torch can use"),
        ("--device gpu", "device is 'gpu', it may be 'cpu' or a CUDA device such as 'cuda'"),
    ],
)
def test_options_that_cannot_be(options: str, said: str, run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*options.split())
    assert result.exit_code in (1, 2) and said in result.stderr
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"data"}


def test_a_plot_that_cannot_be_is_refused_before_the_work(run, tmp_path) -> None:
    result = run("--plot", tmp_path / "file.txt", weights=tmp_path / "nosuch.safetensors")
    assert result.exit_code == 1 and "file.txt is of no kind of picture" in complaints(result)[0]


def test_weights_and_data_that_do_not_fit(run, tmp_path) -> None:
    other = save_tiny(tmp_path / "other.safetensors", 5)
    result = run(weights=other)
    assert result.exit_code == 1 and "Error: model has 5 classes, dataset has 11" in result.stderr
    result = run(weights=tmp_path / "nosuch.safetensors")
    assert result.exit_code == 1 and "nosuch.safetensors" in complaints(result)[0]
    result = run(data=tmp_path / "nosuch")
    assert result.exit_code == 1 and f"{tmp_path / 'nosuch'}" in complaints(result)[0]
    result = run(weights=other, dataset="nosuch")
    assert result.exit_code == 2


def test_nothing_that_can_be_read(run, root) -> None:
    for path in (root / "val" / "images").iterdir():
        path.write_bytes(b"damaged")
    result = run()
    assert result.exit_code == 1 and "Error: none of the 4 images can be read: 0: " in result.stderr


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from shelfkern.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
whole, calls = Image.Image.save, []
def save(self, path, *args):
    calls.append(path)
    if len(calls) < 2:
        return whole(self, path, *args)
    Path(path).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGINT)
Image.Image.save = save
main()
"""


def test_control_c(tmp_path) -> None:
    weights, name = save_tiny(tmp_path / "other.safetensors", 21), voc_test(tmp_path / "test")
    words = ["evaluate", weights, "--dataset", "voc", "--data", tmp_path / "test", "--split", "test",
             "--submission", "voc", "--out", tmp_path / "out", "--json", tmp_path / "found.json"]  # fmt: skip
    command = [sys.executable, "-c", INTERRUPTED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGINT and done.stderr.split() == ["interrupted"]
    written = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written == [f"{name}.png"] and not (tmp_path / "found.json").exists()


def test_the_json_is_for_others_too(run, tmp_path) -> None:
    run("--json", tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert set(read["figures"]) == {"mean_iou", "pixel_accuracy", "frequency_weighted_iou"}
    assert len(read["confusion"]) == len(read["by_class"]["iou"]) == len(read["classes"]) == 11
