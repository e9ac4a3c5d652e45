"""Accelerated networks in files: the same results without the model, and files that are none."""

import copy
import functools
import json
import math
import pickle
import re
import tempfile
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
from shelfkern.engine.lower import lower
from shelfkern.engine.quantization import quantized
from shelfkern.evaluate import Labeller, Protocol
from shelfkern.normalisation import Normalisation
from shelfkern.ops import _triton

needs_native = pytest.mark.skipif(native.why_not is not None, reason=f"no native kernels: {native.why_not}")
needs_emulation = pytest.mark.skipif(
    native.why_not_emulated is not None or not _triton.INTERPRETED, reason="no emulated kernels"
)
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.int8, marks=needs_native)]

DO_NOT_FIT = "is an accelerated network whose parts do not fit together"


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
        (_no_tensor, DO_NOT_FIT),
        (_other_shape, DO_NOT_FIT + " .*has weights of"),
        (_other_dtype, DO_NOT_FIT + " .*a weight is F16"),
        (_unknown_step, DO_NOT_FIT),
        (_too_early, DO_NOT_FIT + " .*reads what no step before it wrote"),
        (_other_stride, DO_NOT_FIT + " .*writes .* at the stride"),
        (_no_field, DO_NOT_FIT + " .*normalisation"),
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


@functools.cache
def _written(name: str, kind: str) -> tuple[dict, dict]:
    """The plan and the tensors of a file; of a GPU's 8 bits without running them."""
    model = build(CONFIGS[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        if kind.startswith("gpu"):
            dtype, plan = getattr(torch, kind.removeprefix("gpu ")), lower(model)
            values = [v for step in plan.steps for v in (*step.outputs, *step.temporaries)]
            ranges = {value.index: 1.0 for value in values}
            facts = saved.Facts(model.normalisation, model.align_corners, None, None)
            saved.Saved(quantized(plan, ranges, dtype), dtype, True, facts).write(path)
        else:
            accelerated(model, getattr(torch, kind)).save(path)
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[saved.KEY]), load_file(path)


def _write(path, about, tensors):
    save_file(tensors, path, {saved.KEY: json.dumps(about)})


@pytest.mark.parametrize("kind", ["gpu int8", "gpu float8_e4m3fn"])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_8_bits_for_a_gpu_are_read(name, kind, path):
    about, tensors = _written(name, kind)
    _write(path, about, tensors)
    found = saved.read_saved(path)
    found.write(path)
    assert _written(name, kind)[0] == about and found.on_gpu
    assert str(saved.read_saved(path).plan) == str(found.plan)


def _steps(about, kind, **fields):
    """Steps of a kind that have these fields."""
    found = [step for step in about["steps"] if step["record"] == kind]
    return [step for step in found if all(step[name] == value for name, value in fields.items())]


def _values(part, index=None):
    """All mentions of an activation, or of all."""
    if isinstance(part, list):
        return [found for one in part for found in _values(one, index)]
    if not isinstance(part, dict):
        return []
    own = [part] if part.get("record") == "Value" and index in (None, part["index"]) else []
    return own + _values(list(part.values()), index)


def _set(parts, **fields):
    for part in parts:
        part.update({name: f(part[name]) if callable(f) else f for name, f in fields.items()})


def _output(about, step, **fields):
    _set(_values(about, step["output"]["index"]), **fields)


def _reads(step, position, value):
    step["inputs"][position] = copy.deepcopy(value)


def _weight(about, tensors, step, change, field="weight"):
    name = step[field]["tensor"]
    tensors[name] = change(tensors[name]).contiguous()


def _doubled(scale):
    return lambda stride: stride and int(stride * scale)


TAMPERED = {
    "stem 64": (lambda a, t: _set(_values(a, 0), stride=64), "v0 has 16 channels at the stride 64"),
    "strides 16": (lambda a, t: _set(_values(a), stride=_doubled(16)), "v0 has 16 channels at the stride 64"),
    "strides half": (lambda a, t: _set(_values(a), stride=_doubled(0.5)), "stride 2, its inputs make .* 4"),
    "strides below 0": (lambda a, t: _set(_values(a), stride=_doubled(-1)), "v0 has 16 channels"),
    "no stride": (lambda a, t: _set(_values(a, 0), stride=0), "v0 has 16 channels at the stride 0"),
    "half a channel": (lambda a, t: _set(_values(a, 0), channels=16.0), "Value has the channels 16.0"),
    "a true stride": (lambda a, t: _set(_values(a, 0), stride=True), "Value has the stride True"),
    "other residual": (
        lambda a, t: _reads(_steps(a, "Conv", residual=True)[-1], 1, a["steps"][0]["output"]),
        "adds 16 channels at the stride 4 to",
    ),
    "no residual": (lambda a, t: _set([a["steps"][1]], residual=True), "reads 1 of 1 inputs, it needs 2"),
    "no skip": (lambda a, t: _set([a["steps"][1]], skip=True), "reads 1 of 1 inputs, it needs 2"),
    "one more": (
        lambda a, t: a["steps"][1]["inputs"].append(a["steps"][0]["output"]),
        "reads 2 of 2 inputs, it needs 1",
    ),
    "a stem that reads": (
        lambda a, t: a["steps"][5]["inputs"].clear(),
        "has weights of .*, they must be",
    ),
    "low skip": (
        lambda a, t: _reads(_steps(a, "UpsampleAdd")[-1], 1, _steps(a, "AttentionGate")[0]["inputs"][0]),
        "adds .* to .* at the stride 8",
    ),
    "high x": (
        lambda a, t: _reads(_steps(a, "UpsampleAdd")[-1], 0, _steps(a, "UpsampleAdd")[-1]["inputs"][1]),
        "adds .* to",
    ),
    "no gate": (
        lambda a, t: _reads(_steps(a, "UpsampleAdd")[-1], 2, _steps(a, "UpsampleAdd")[-1]["inputs"][1]),
        "reads 3 of 3 inputs, it needs 2 and 1 gates",
    ),
    "gate for x": (
        lambda a, t: _reads(_steps(a, "SharedBlockStep")[-1], 0, _steps(a, "AttentionGate")[0]["output"]),
        "reads 0 of 1 inputs, it needs 1",
    ),
    "other classes": (lambda a, t: _set([a], num_classes=300), "scores have 7 channels .* of 300 classes"),
    "stem 3x3": (
        lambda a, t: _weight(a, t, a["steps"][0], lambda w: w[:, :, 2:5, 2:5]),
        "has weights of .*, they must be .16, 3, 7, 7",
    ),
    "conv 0x0": (lambda a, t: _weight(a, t, a["steps"][1], lambda w: w[:, :, :0, :0]), "has the kernel 0"),
    "conv 2x2": (lambda a, t: _weight(a, t, a["steps"][1], lambda w: w[:, :, 1:, 1:]), "has the kernel 2"),
    "conv 2x3": (lambda a, t: _weight(a, t, a["steps"][1], lambda w: w[:, :, 1:]), "has weights of"),
    "conv 3-d": (lambda a, t: _weight(a, t, a["steps"][1], lambda w: w[..., 0]), "has weights of"),
    "a number": (lambda a, t: _weight(a, t, a["steps"][1], lambda w: w.sum()), "has weights of"),
    "stride 3": (
        lambda a, t: (_set([a["steps"][1]], stride=3), _output(a, a["steps"][1], stride=12)),
        "and the stride 3",
    ),
    "short scale": (
        lambda a, t: _weight(a, t, a["steps"][1], lambda w: w[1:], "scale"),
        "has weights of .15,., they must be .16,.",
    ),
    "hidden channels": (
        lambda a, t: _set([_steps(a, "SharedBlockStep")[-1]["hidden"]], channels=1),
        "writes 1 channels",
    ),
    "hidden stride": (
        lambda a, t: _set([_steps(a, "SharedBlockStep")[-1]["hidden"]], stride=2),
        "at the stride 2, its inputs make 40 channels at the stride 32",
    ),
    "low block": (
        lambda a, t: _output(a, _steps(a, "SharedBlockStep")[-1], stride=64),
        "v.* has 40 channels at the stride 64",
    ),
    "index below 0": (lambda a, t: _output(a, a["steps"][-1], index=-5), "v-5 has 7 channels"),
    "index twice": (lambda a, t: _set(_values(a, 3), index=0), "writes v0, which is written already"),
    "slope nan": (lambda a, t: _set([a["steps"][1]["act"]], slope=math.nan), "Activation has the slope nan"),
    "slope below 0": (lambda a, t: _set([a["steps"][1]["act"]], slope=-0.5), "of the slope -0.5"),
    "slope in words": (lambda a, t: _set([a["steps"][1]["act"]], slope="x"), "Activation has the slope 'x'"),
    "float64": (lambda a, t: _set([a], dtype={"dtype": "float64"}), "its dtype is torch.float64"),
    "no dtype": (lambda a, t: _set([a], dtype={"dtype": "zeros"}), "its dtype is <built-in"),
    "codes without": (lambda a, t: _set([a], dtype={"dtype": "int8"}), "codes of , not of torch.uint8"),
    "on no GPU": (lambda a, t: _set([a], on_gpu=0), "its on_gpu is 0"),
    "no steps": (lambda a, t: _set([a], steps=[]), "there are no steps"),
    "other steps": (lambda a, t: _set([a], steps={"a": 1}), "its steps is {'a': 1}"),
    "facts missing": (lambda a, t: a.pop("facts"), "facts"),
    "facts null": (lambda a, t: _set([a], facts=None), "its facts is None"),
    "align null": (lambda a, t: _set([a["facts"]], align_corners=None), "Facts has the align_corners None"),
    "classes": (lambda a, t: _set([a["facts"]], classes=[1, 2]), "Facts has the classes"),
    "two means": (lambda a, t: _set([a["facts"]["normalisation"]], mean=[0.1, 0.2]), "has the mean"),
    "extents null": (lambda a, t: _set([a], extents=None), "its extents is None"),
    "a part of 0": (lambda a, t: _set([a["extents"]], scale={"fraction": [1, 0]}), "Fraction"),
    "no scale": (lambda a, t: _set([a["extents"]], scale={"fraction": [0, 1]}), "are enlarged 0 times"),
    "fine scale": (lambda a, t: _set([a["extents"]], scale={"fraction": [99, 98]}), "enlarged 99/98 times"),
    "a list for a step": (lambda a, t: _set([a["steps"][2]], record=["Conv"]), "list"),
}
DECONV = {
    "other bias": (
        lambda a, t: _weight(a, t, _steps(a, "DeconvAdd")[0], lambda b: b[1:], "bias"),
        "has weights of",
    ),
    "other way": (
        lambda a, t: _weight(a, t, _steps(a, "DeconvAdd")[0], lambda w: w.transpose(0, 1)),
        "has weights of",
    ),
    "other skip": (
        lambda a, t: _reads(_steps(a, "DeconvAdd")[-1], 1, a["steps"][0]["output"]),
        "adds 8 channels at the stride 4 to 12",
    ),
}
POOLED = {
    "pool": (lambda a, t: _output(a, _steps(a, "MaxPool")[0], stride=2), "stride 2, its inputs make .* 4"),
    "image": (
        lambda a, t: _weight(a, t, a["steps"][0], lambda w: torch.cat([w, w], 1)),
        "has weights of .8, 6, 7, 7., they must be .8, 3, 7, 7.",
    ),
    "added to the image": (lambda a, t: _set([a["steps"][0]], skip=True), "reads 0 of 0 inputs"),
}
CODED = {
    "no quantum": (lambda a, t: _set(_values(a, 0), quantum=None), "v0 has codes of torch.uint8 and"),
    "no codes": (lambda a, t: _set(_values(a, 0), codes=None), "v0 has codes of None and the quantum"),
    "floating": (lambda a, t: _set(_values(a, 3), quantum=None, codes=None), "has no kernel for such codes"),
    "zero": (lambda a, t: [_set([v["quantum"]], zero=256) for v in _values(a, 0)], "has the quantum"),
    "step": (lambda a, t: [_set([v["quantum"]], step=0.0) for v in _values(a, 0)], "has the quantum"),
    "dtype": (lambda a, t: _set([a], dtype={"dtype": "bfloat16"}), "codes of torch.uint8, not of None"),
    "on a GPU": (lambda a, t: _set([a], on_gpu=True), "codes of torch.uint8, not of torch.int8"),
    "slope": (lambda a, t: _set([a["steps"][1]["act"]], slope=1.5), "an activation of the slope 1.5"),
    "float8": (lambda a, t: _set([a], dtype={"dtype": "float8_e4m3fn"}), "its dtype is torch.float8_e4m3fn"),
    "coded gate": (
        lambda a, t: _output(a, _steps(a, "AttentionGate")[0], quantum=a["steps"][0]["output"]["quantum"]),
        "has codes of None and the quantum",
    ),
}
GPU = {
    "on a CPU": (lambda a, t: _set([a], on_gpu=False), "codes of torch.int8, not of torch.uint8"),
    "other dtype": (
        lambda a, t: _set([a], dtype={"dtype": "float8_e4m3fn"}),
        "codes of torch.int8, not of torch.float8_e4m3fn",
    ),
    "a plain step": (lambda a, t: _plain(_steps(a, "QuantizedConv")[0]), "has no kernel for such codes"),
    "no codes": (
        lambda a, t: _set(_values(a, _steps(a, "QuantizedBlock")[0]["inputs"][0]["index"]), codes=None),
        "has no kernel for such codes",
    ),
    "floating hidden": (
        lambda a, t: _set([_steps(a, "QuantizedBlock")[0]["hidden"]], codes=None),
        "has no kernel for such codes",
    ),
    "no step": (lambda a, t: _set([_steps(a, "QuantizedConv")[0]], x_step=0.0), "has codes of the steps 0.0"),
    "no hidden step": (
        lambda a, t: _set([_steps(a, "QuantizedBlock")[0]], hidden_step=-1.0),
        "has hidden codes of the step -1.0",
    ),
    "no step of codes": (
        lambda a, t: _set([_steps(a, "Quantize")[0]], codes_step=0.0),
        "codes of the step 0",
    ),
    "low copy": (
        lambda a, t: _set(
            _values(a, next(s["copy"]["index"] for s in a["steps"] if s.get("copy"))), stride=32
        ),
        "writes .* at the stride 32",
    ),
}


CASES = [
    pytest.param(name, kind, *case, id=f"{name} {kind} {label}", marks=needs_native if kind == "int8" else ())
    for name, kind, cases in (
        ("attention", "float32", TAMPERED),
        ("deconv", "float32", DECONV),
        ("five_levels", "float32", POOLED),
        ("attention", "int8", CODED),
        ("attention", "gpu int8", GPU),
    )
    for label, case in cases.items()
]


@pytest.mark.parametrize("name, kind, change, message", CASES)
def test_plans_that_kernels_cannot_run(name, kind, change, message, path):
    about, tensors = copy.deepcopy(_written(name, kind))
    change(about, tensors)
    _write(path, about, tensors)
    with pytest.raises(RuntimeError, match=f"{DO_NOT_FIT} .*{message}"):
        saved.read_saved(path)


def _plain(step):
    for name in ("x_step", "codes_step", "copy"):
        del step[name]
    step["record"] = "Conv"


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        shelfkern.accelerate(build(CONFIGS["attention"])).save(tmp_path / "nosuch" / "network.safetensors")
