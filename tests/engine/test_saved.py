"""Accelerated networks in files: the same results without the model, and files that are none."""

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from models import CONFIGS, build, images
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shelfkern
from shelfkern import native
from shelfkern.engine import saved
from shelfkern.evaluate import Labeller, Protocol
from shelfkern.normalisation import Normalisation
from shelfkern.ops import _triton

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
needs_emulation = pytest.mark.skipif(
    native.why_not_emulated is not None or not _triton.INTERPRETED, reason="no emulated kernels"
)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.int8, marks=needs_native)]


def pictures(n: int, h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def accelerated(model, dtype: torch.dtype, **options):
    calibration = {"calibration": pictures(2, 64, 96)} if dtype is torch.int8 else {}
    return shelfkern.accelerate(model, dtype, **calibration, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "network.safetensors"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_file_gives_what_was_saved(name, dtype, path):
    fast = accelerated(build(CONFIGS[name]), dtype)
    fast.save(path)
    loaded = shelfkern.load(path)
    x = images(2, 45, 83)
    assert torch.equal(loaded(x), fast(x))
    assert torch.equal(loaded.predict(pictures(1, 64, 64)), fast.predict(pictures(1, 64, 64)))
    assert loaded.dtype is dtype and loaded.source is None
    assert str(loaded.plan) == str(fast.plan)


@torch.no_grad()
def test_what_is_known_of_the_model_is_kept(path):
    model = build(CONFIGS["attention"])
    model.classes = tuple("abcdefg")
    model.palette = tuple((i, 2 * i, 3 * i) for i in range(7))
    model.normalisation = Normalisation((0.3, 0.5, 0.4), (0.2, 0.3, 0.25))
    shelfkern.accelerate(model).save(path)
    loaded = shelfkern.load(path)
    for fact in ("classes", "palette", "normalisation", "align_corners"):
        assert getattr(loaded, fact) == getattr(model, fact)
    raw = pictures(1, 64, 64)
    assert torch.equal(loaded.predict(raw), shelfkern.accelerate(model).predict(raw))


@torch.no_grad()
def test_a_file_is_of_the_moment_and_may_be_replaced(path):
    model, x = build(CONFIGS["attention"]), images(1, 64, 64)
    fast = shelfkern.accelerate(model)
    fast.save(path)
    loaded, before = shelfkern.load(path), fast(x)
    model.head.classify.weight.mul_(2)
    fast.save(path)
    assert not torch.equal(fast(x), before)
    assert torch.equal(loaded(x), before)
    assert torch.equal(shelfkern.load(path)(x), fast(x))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_twins_and_files_of_files(dtype, path, tmp_path):
    accelerated(build(CONFIGS["attention"]), dtype).save(path)
    loaded, x = shelfkern.load(path), images(1, 64, 64)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        path.unlink(missing_ok=True)
        assert torch.equal(twin(x), loaded(x))
        twin.save(tmp_path / "twin.safetensors")
    assert (tmp_path / "twin.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@needs_native
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
@torch.no_grad()
def test_weights_leave_memory_when_they_are_packed(path):
    fast = shelfkern.accelerate(shelfkern.nn.shelfnet18_lw(backbone_width=32, widths=(32, 64, 128)).eval())
    fast.save(path)
    size = path.stat().st_size
    loaded, x = shelfkern.load(path), images(1, 64, 64)
    plan = loaded.plan
    assert sum(weight.sum().item() for step in plan.steps for weight in step.weights())
    assert resident(path) > 0.9 * size
    assert torch.equal(loaded(x), fast(x))
    # What is left shares its pages with what is small.
    assert resident(path) < 0.4 * size
    assert torch.equal(loaded(images(2, 96, 64)), fast(images(2, 96, 64)))


def resident(path: Path) -> int:
    """Bytes of a file that are mapped and in memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    found = [re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE) for part in parts if str(path) in part]
    return 1024 * sum(int(one.group(1)) for one in found if one)


@torch.no_grad()
def test_labels_by_a_protocol(path):
    fast = shelfkern.accelerate(build(CONFIGS["enlarged"]))
    fast.save(path)
    pixels = pictures(1, 45, 83)[0].numpy()
    for protocol in (Protocol(), Protocol((0.75, 1.25), mirror=True)):
        found = Labeller(shelfkern.load(path), protocol)(pixels)
        assert np.array_equal(found, Labeller(fast, protocol)(pixels))


@needs_emulation
@torch.no_grad()
def test_networks_of_8_bits_are_of_one_kind_of_kernels(path, tmp_path):
    model, x = build(CONFIGS["attention"]), images(1, 32, 32)
    fast = accelerated(model, torch.int8, backend="emulated")
    fast.save(path)
    assert torch.equal(shelfkern.load(path, "cpu", "emulated")(x), fast(x))
    with pytest.raises(ValueError, match=r"8-bit network for the kernels of a GPU, .* select those of a CPU"):
        shelfkern.load(path, "cpu")
    accelerated(model, torch.int8).save(path)
    with pytest.raises(ValueError, match=r"8-bit network for the kernels of a CPU, .* select those of a GPU"):
        shelfkern.load(path, backend="emulated")
    # Others are of any.
    shelfkern.accelerate(model, torch.bfloat16).save(path)
    fast = shelfkern.accelerate(model, torch.bfloat16, backend="emulated")
    assert torch.equal(shelfkern.load(path, backend="emulated")(x), fast(x))


def test_options_are_those_of_accelerate(path):
    shelfkern.accelerate(build(CONFIGS["attention"])).save(path)
    assert shelfkern.load(path, backend="library").backend == "library"
    with pytest.raises(ValueError, match="backend is 'fast', it may be one of"):
        shelfkern.load(path, backend="fast")
    with pytest.raises(ValueError, match="tune is -1, it may be True, False or seconds from 0"):
        shelfkern.load(path, tune=-1)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        shelfkern.load(path, "tpu")


def test_files_that_are_none(path, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"is not a file, it must be one that FastShelfNet\.save wrote"
    ):
        shelfkern.load(path)
    shelfkern.accelerate(build(CONFIGS["attention"])).save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RuntimeError, match="is cut short or not an accelerated network"):
            shelfkern.load(path)
    for metadata in (None, {"config": "{}"}):
        save_file({"a": torch.zeros(3)}, path, metadata)
        with pytest.raises(RuntimeError, match=r"has no plan in its metadata, FastShelfNet\.save writes one"):
            shelfkern.load(path)
    save_file({"a": torch.zeros(3)}, path, {saved.KEY: "{"})
    with pytest.raises(RuntimeError, match="is cut short or not an accelerated network"):
        shelfkern.load(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        shelfkern.load(tmp_path)


def _other_format(about, tensors):
    about["format"] = 2


def _no_tensor(about, tensors):
    del tensors[about["steps"][0]["weight"]["tensor"]]


def _other_shape(about, tensors):
    name = about["steps"][3]["weight"]["tensor"]
    tensors[name] = tensors[name][:-1].contiguous()


def _other_dtype(about, tensors):
    name = about["steps"][3]["weight"]["tensor"]
    tensors[name] = tensors[name].half()


def _unknown_step(about, tensors):
    about["steps"][1]["record"] = "Extents"


def _too_early(about, tensors):
    about["steps"] = about["steps"][1:]


def _other_stride(about, tensors):
    step = next(one for one in about["steps"] if one["record"] == "Conv" and one["stride"] == 2)
    step["stride"] = 1


def _no_field(about, tensors):
    del about["facts"]["normalisation"]


@pytest.mark.parametrize(
    "change, message",
    [
        (_other_format, "has the format 2, this version reads 1: save it again"),
        (_no_tensor, "is an accelerated network whose parts do not fit together"),
        (_other_shape, "is an accelerated network whose parts do not fit together .*has weights of"),
        (_other_dtype, "is an accelerated network whose parts do not fit together .*a weight is F16"),
        (_unknown_step, "is an accelerated network whose parts do not fit together"),
        (
            _too_early,
            "is an accelerated network whose parts do not fit together .*reads what no step before it wrote",
        ),
        (_other_stride, "is an accelerated network whose parts do not fit together .*writes at the stride"),
        (_no_field, "is an accelerated network whose parts do not fit together .*normalisation"),
    ],
)
def test_files_that_do_not_fit_together(change, message, path):
    shelfkern.accelerate(build(CONFIGS["attention"])).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[saved.KEY])
    change(about, tensors)
    save_file(tensors, path, {saved.KEY: json.dumps(about)})
    with pytest.raises(RuntimeError, match=message):
        shelfkern.load(path)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        shelfkern.accelerate(build(CONFIGS["attention"])).save(tmp_path / "nosuch" / "network.safetensors")
