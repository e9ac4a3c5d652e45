"""Training on a CamVid of a few random frames."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.testing import assert_allclose
from PIL import Image
from torch import Tensor

from shelfkern.data import camvid
from shelfkern.data.camvid import Frame
from shelfkern.nn import from_weights, save_weights, shelfnet18_lw
from shelfkern.nn.weights import read_safetensors
from shelfkern.train import camvid as training
from shelfkern.train import curve
from shelfkern.train.camvid import Recipe, Run, batch_at, evaluate, export, main, uninterrupted
from shelfkern.train.schedule import poly_with_warmup

TINY = Recipe(steps=6, batch=2, crop=(64, 64), width=8, warmup=2)
SMALLEST = dataclasses.replace(TINY, crop=(32, 32), width=4)
ARGUMENTS = dict(steps=4, batch=2, crop="32 32", width=4, every=4)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def frame(seed: int, height: int = 72, width: int = 80) -> Frame:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
    labels = generator.integers(0, 12, (height, width), np.uint8)
    return Frame(f"frame{seed}", Image.fromarray(pixels), Image.fromarray(labels))


FRAMES = [frame(seed) for seed in range(4)]


@pytest.fixture
def data(tmp_path) -> Path:
    """Four frames to train on and two to validate with, as CamVid lies on disk."""
    for split, seeds in (("train", range(4)), ("val", range(4, 6))):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for one in map(lambda seed: frame(seed, 40, 48), seeds):
            one.image.save(tmp_path / "data" / split / "images" / f"{one.name}.jpg")
            one.mask.save(tmp_path / "data" / split / "labels" / f"{one.name}.png")
    return tmp_path / "data"


def command(data: Path, out: Path, **changes: object) -> Result:
    arguments = f"--data {data} --out {out}".split()
    for name, value in (ARGUMENTS | changes).items():
        arguments += [f"--{name}", *str(value).split()]
    return CliRunner().invoke(main, arguments)


def assert_same(a: object, b: object) -> None:
    """Bit for bit, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a: Run, b: Run) -> None:
    assert a.step == b.step
    assert_same(dict(a.model.state_dict()), dict(b.model.state_dict()))
    assert_same(dict(a.average.state_dict()), dict(b.average.state_dict()))
    assert_same(a.optimizer.state_dict(), b.optimizer.state_dict())


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_equals_one_never_stopped(tmp_path) -> None:
    straight, first = Run(FRAMES, TINY), Run(FRAMES, TINY)
    before = straight.model.state_dict()["backbone.conv1.weight"].clone()
    losses = [straight.advance() for _ in range(5)]
    resumed_losses = [first.advance() for _ in range(2)]
    first.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(1234)
    second = Run(FRAMES, TINY)
    second.resume(tmp_path / "checkpoint.pt")
    assert_same_run(first, second)
    resumed_losses += [second.advance() for _ in range(3)]
    assert resumed_losses == losses and len(set(losses)) == 5
    assert_same_run(straight, second)
    assert not torch.equal(before, second.model.state_dict()["backbone.conv1.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_seed_decides() -> None:
    one, other = Run(FRAMES, SMALLEST), Run(FRAMES, dataclasses.replace(SMALLEST, seed=1))
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))
    assert not torch.equal(batch_at(FRAMES, one.recipe, 0)[0], batch_at(FRAMES, other.recipe, 0)[0])


def test_light_is_part_of_the_recipe() -> None:
    plain, relit = (batch_at(FRAMES, dataclasses.replace(SMALLEST, light=light), 0) for light in (0.0, 1.0))
    assert not torch.equal(plain[0], relit[0])


def test_a_run_begins_with_given_weights(tmp_path) -> None:
    first = Run(FRAMES, SMALLEST)
    first.advance()
    export(first, evaluate(first.average, FRAMES), tmp_path / "start.safetensors")
    recipe = dataclasses.replace(SMALLEST, start=str(tmp_path / "start.safetensors"), seed=5)
    second = Run(FRAMES, recipe)
    for name, value in first.average.state_dict().items():
        assert_allclose(second.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert second.step == 0
    before = second.model.head.classify.weight.detach().clone()
    second.advance()
    assert not torch.equal(second.model.head.classify.weight, before)


def test_weights_that_no_run_can_begin_with(data, tmp_path) -> None:
    other = shelfnet18_lw(5, backbone_width=4, widths=(4, 8, 16), head_width=4)
    save_weights(other, tmp_path / "five.safetensors")
    refused = command(data, tmp_path / "out", start=tmp_path / "five.safetensors")
    assert refused.exit_code == 1 and "has 5 classes, CamVid has 11" in refused.output
    missing = command(data, tmp_path / "out", start="nowhere")
    assert missing.exit_code == 1 and "weights 'nowhere' is neither a file" in missing.output


def test_the_loss_falls_on_one_easy_frame() -> None:
    image, mask = Image.new("RGB", (64, 64), (200, 30, 90)), Image.new("L", (64, 64), 3)
    run = Run([Frame("even", image, mask)], dataclasses.replace(SMALLEST, steps=20, lr=1e-2))
    losses = [run.advance() for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_has_the_rate_of_the_schedule() -> None:
    run = Run(FRAMES, SMALLEST)
    for step in range(3):
        run.advance()
        rates = {group["lr"] for group in run.optimizer.param_groups}
        assert rates == {poly_with_warmup(step, 6, SMALLEST.lr, 2)}


def test_norms_and_biases_do_not_decay() -> None:
    run = Run(FRAMES, SMALLEST)
    decaying, others = run.optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (SMALLEST.weight_decay, 0)
    assert {p.ndim for p in decaying["params"]} == {4} and {p.ndim for p in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(list(run.model.parameters()))


def test_the_average_by_hand() -> None:
    run = Run(FRAMES, SMALLEST)
    expected = {name: value.double() for name, value in run.average.state_dict().items()}
    for step in (1, 2):
        run.advance()
        decay = step / (step + 9)
        for name, value in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in run.average.state_dict().items():
        if value.is_floating_point():
            assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
    assert run.average.backbone.bn1.num_batches_tracked == 2 and not run.average.training


def test_batches() -> None:
    images, labels = batch_at(FRAMES, TINY, 3)
    assert images.shape == (2, 3, 64, 64) and images.dtype is torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (2, 64, 64) and labels.dtype is torch.int64
    assert set(labels.unique().tolist()) == set(range(12))
    assert -2.2 < images.min() < -1 and 1 < images.max() < 2.7
    again, other = batch_at(FRAMES, TINY, 3), batch_at(FRAMES, TINY, 4)
    assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    assert not torch.equal(other[0], images) and not torch.equal(other[1], labels)


def test_a_frame_is_cropped_anew_each_time() -> None:
    crops = [crop for step in range(3) for crop in batch_at(FRAMES[:1], SMALLEST, step)[0]]
    assert len({crop.numpy().tobytes() for crop in crops}) == 6


@pytest.mark.parametrize("count, batch", [(4, 2), (5, 2), (5, 7)])
def test_every_frame_is_seen_once_an_epoch(count: int, batch: int, monkeypatch) -> None:
    frames = [frame(seed, 8, 8) for seed in range(count)]
    seen: list[int] = []

    def note(image, mask, *rest):
        (index,) = [i for i, one in enumerate(frames) if one.image is image and one.mask is mask]
        seen.append(index)
        return np.asarray(image), np.asarray(mask)

    monkeypatch.setattr(training, "augment", note)
    for step in range(6 * count):
        batch_at(frames, dataclasses.replace(TINY, batch=batch), step)
    epochs = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    assert len(epochs) == 6 * batch
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 3


@torch.no_grad()
def test_evaluate_by_hand() -> None:
    run = Run(FRAMES, SMALLEST)
    frames = [frame(seed, 40, 50) for seed in range(3)]
    found = evaluate(run.average, frames, batch=2)
    counts = np.zeros((11, 11), int)
    for one in frames:
        pixels = (np.asarray(one.image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        scores = run.average(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
        truth = np.asarray(one.mask)
        keep = truth != camvid.IGNORE
        np.add.at(counts, (truth[keep], scores.argmax(1)[0].numpy()[keep]), 1)
    # An argmax may turn where two scores tie but for rounding.
    assert np.abs(found.counts - counts).sum() <= 4 and counts.sum() == found.counts.sum() > 0


def test_exported_weights_know_their_classes(tmp_path) -> None:
    run = Run(FRAMES, SMALLEST)
    run.advance()
    matrix = evaluate(run.average, FRAMES[:1])
    export(run, matrix, tmp_path / "camvid.safetensors")
    model = from_weights(tmp_path / "camvid.safetensors")
    assert (model.classes, model.palette) == (camvid.CLASSES, camvid.PALETTE)
    for name, value in run.average.state_dict().items():
        stored = value.half().float() if value.ndim > 1 else value
        assert torch.equal(model.state_dict()[name], stored), name
    metadata = read_safetensors(tmp_path / "camvid.safetensors")[1]
    assert metadata["validation_miou"] == f"{matrix.mean_iou():.4f}" and metadata["steps"] == "1"


def test_the_command_trains_validates_and_goes_on(data, tmp_path) -> None:
    out = tmp_path / "a" / "out"
    result = command(data, out, every=3)
    assert result.exit_code == 0, result.output
    assert [row["step"] for row in rows_of(out)] == ["3", "4"]
    result = command(data, out, every=3, steps=5)
    assert result.exit_code == 0 and result.output.startswith("going on from step 4\n")
    lines = (out / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(["step", "loss", "miou", *camvid.CLASSES])
    assert [line.split(",")[0] for line in lines] == ["step", "3", "4", "5"]
    last = rows_of(out)[-1]
    ious = np.array([float(last[name]) for name in camvid.CLASSES])
    assert float(last["miou"]) == pytest.approx(np.nanmean(ious), abs=2e-4) and float(last["loss"]) > 1
    metadata = read_safetensors(out / "camvid.safetensors")[1]
    assert float(metadata["validation_miou"]) == float(last["miou"]) and metadata["steps"] == "5"
    assert json.loads(metadata["config"])["backbone_width"] == 4
    assert from_weights(out / "camvid.safetensors").classes == camvid.CLASSES


def press_ctrl_c_at(monkeypatch, name: str, call: int) -> None:
    """A Ctrl-C in the middle of the `call`-th call of a function of the training script."""
    function, calls = getattr(training, name), []

    def interrupted(*args):
        result = function(*args)
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(training, name, interrupted)


def test_ctrl_c_in_a_step_and_going_on(data, tmp_path, monkeypatch) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert command(data, straight).exit_code == 0
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, "total_loss", 2)
        result = command(data, stopped)
    assert result.exit_code == 130
    assert result.output == "stopped at step 2; the same command goes on from here\n"
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (stopped / "log.csv").exists()
    result = command(data, stopped)
    assert result.exit_code == 0 and result.output.startswith("going on from step 2\n")
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (straight, stopped)]
    assert states[0]["step"] == 4
    assert_same(*states)
    assert rows_of(stopped)[0]["miou"] == rows_of(straight)[0]["miou"] and len(rows_of(stopped)) == 1


def test_ctrl_c_in_the_last_validation_loses_nothing(data, tmp_path, monkeypatch) -> None:
    press_ctrl_c_at(monkeypatch, "evaluate", 1)
    result = command(data, tmp_path / "out", steps=1)
    assert result.exit_code == 130 and "stopped at step 1;" in result.output
    assert [row["step"] for row in rows_of(tmp_path / "out")] == ["1"]
    assert (tmp_path / "out" / "camvid.safetensors").exists()


def test_ctrl_c_between_steps(data, tmp_path, monkeypatch) -> None:
    def interrupt(run: Run) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "advance", interrupt)
    result = command(data, tmp_path / "out")
    assert result.exit_code == 130 and "stopped at step 0;" in result.output
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 0


def test_ctrl_c_is_held_back_only_inside() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ZeroDivisionError), uninterrupted():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("name, value, words", [("seed", 1, "seed 0"), ("width", 8, "width 4")])
def test_a_run_does_not_go_on_with_another_recipe(name, value, words, data, tmp_path) -> None:
    assert command(data, tmp_path / "run").exit_code == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    result = command(data, tmp_path / "run", steps=6, **{name: value})
    assert result.exit_code == 1 and f"is of a run with {words}" in result.output
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_a_learning_curve_is_drawn(data, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    command(data, tmp_path / "run", every=2)
    picture = tmp_path / "curve.png"
    result = CliRunner().invoke(curve.main, [str(tmp_path / "run" / "log.csv"), str(picture)])
    assert result.exit_code == 0, result.output
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(2**20)}
    assert (0x1B, 0x6C, 0xA8) in colours


def test_bad_data_is_one_sentence(data, tmp_path) -> None:
    mask = data / "val" / "labels" / "frame5.png"
    Image.new("L", (48, 40), 77).save(mask)
    result = command(data, tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {mask} holds the index 77,") and result.output.count("\n") == 1
    mask.unlink()
    result = command(data, tmp_path / "out")
    assert result.exit_code == 1 and f"{mask} is missing" in result.output
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "name, value, range_",
    [("steps", 0, "x>=1"), ("batch", 1, "x>=2"), ("every", 0, "x>=1"), ("crop", "32 31", "x>=32")],
)
def test_options_out_of_range(name: str, value: object, range_: str, data, tmp_path) -> None:
    result = command(data, tmp_path / "out", **{name: value})
    assert result.exit_code == 2
    assert (
        f"Invalid value for '--{name}': {str(value).split()[-1]} is not in the range {range_}"
        in result.output
    )
