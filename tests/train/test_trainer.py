"""`shelfkern train`: files, stopping and going on, several stages, several processes, bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from stages import RECIPE, SMALLEST, tiny

from shelfkern.cli import commands, main
from shelfkern.data.camvid import CLASSES, PALETTE
from shelfkern.evaluate import evaluate
from shelfkern.nn import from_weights, save_weights, shelfnet18_lw
from shelfkern.nn.weights import read_safetensors
from shelfkern.train import curve, trainer
from shelfkern.train.loader import Keys
from shelfkern.train.logs import Table
from shelfkern.train.losses import PARTS
from shelfkern.train.run import Run

LOSSES = ("step", "epoch", "lr", "loss", *PARTS)


def arguments(recipe: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def command(recipe: Path, data: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(commands, arguments(recipe, data, out, "--log-every", "1", *more))


def rows(out: Path, name: str = "train/train.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def losses(out: Path) -> list[dict[str, str]]:
    """What a resumed run repeats: all but the speed."""
    return [{name: row[name] for name in LOSSES} for row in rows(out)]


def assert_same_weights(one: Path, other: Path, stage: str = "train") -> None:
    states = [torch.load(out / stage / "checkpoint.pt", weights_only=True) for out in (one, other)]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


def test_what_a_run_leaves(recipe, data, tmp_path) -> None:
    out = tmp_path / "a" / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / f".checkpoint.pt.{'0' * 32}.tmp").touch()
    result = command(recipe, data, out, "--every", "4")
    assert result.exit_code == 0, result.output
    assert result.output.count("validation mIoU") == 2 and "images/s" in result.output
    found = rows(out)
    assert [row["step"] for row in found] == ["1", "2", "3", "4", "5", "6"]
    assert [float(row["epoch"]) for row in found] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    for row in found:
        assert float(row["loss"]) == pytest.approx(sum(float(row[part]) for part in PARTS))
        assert float(row["images_per_second"]) > 0 and float(row["peak_memory_mib"]) > 50
    validations = rows(out, "train/validation.csv")
    assert [row["step"] for row in validations] == ["4", "6"]
    for row in validations:
        ious = [float(row[f"iou:{name}"]) for name in CLASSES]
        assert float(row["miou"]) == pytest.approx(np.nanmean(ious), abs=2e-4)
    names = {path.name for path in (out / "train").iterdir() if not path.name.startswith("events.")}
    assert names == {"best.safetensors", "last.safetensors", "checkpoint.pt", "train.csv", "validation.csv"}
    assert list((out / "train").glob("events.out.tfevents.*"))


def test_the_weights_know_their_classes_and_the_best_is_kept(recipe, data, tmp_path) -> None:
    assert command(recipe, data, tmp_path / "out", "--every", "1").exit_code == 0
    validations = rows(tmp_path / "out", "train/validation.csv")
    best = max(validations, key=lambda row: float(row["miou"]))
    for name, row in (("best", best), ("last", validations[-1])):
        path = tmp_path / "out" / "train" / f"{name}.safetensors"
        model, metadata = from_weights(path), read_safetensors(path)[1]
        assert (model.classes, model.palette) == (CLASSES, PALETTE)
        assert metadata["validation_miou"] == f"{float(row['miou']):.4f}"
        assert json.loads(metadata["config"])["backbone_width"] == SMALLEST["backbone_width"]
        assert (metadata["dataset"], metadata["stage"]) == ("camvid", "train")
    assert read_safetensors(path)[1]["steps"] == "6"


def test_a_longer_run_goes_on_from_the_end(recipe, data, tmp_path) -> None:
    assert command(recipe, data, tmp_path / "out").exit_code == 0
    again = command(recipe, data, tmp_path / "out")
    assert again.exit_code == 0 and again.output == ""
    longer = command(recipe, data, tmp_path / "out", "--set", "steps=8")
    assert longer.exit_code == 0 and longer.output.startswith("train: going on from step 6\n")
    assert [row["step"] for row in rows(tmp_path / "out")] == [str(step) for step in range(1, 9)]


def test_a_resumed_run_keeps_what_was_better(recipe, data, tmp_path) -> None:
    assert command(recipe, data, tmp_path / "out").exit_code == 0
    folder = tmp_path / "out" / "train"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"best": (0.9, 5)}, folder / "checkpoint.pt")
    before = (folder / "best.safetensors").read_bytes()
    result = command(recipe, data, tmp_path / "out", "--set", "steps=7")
    assert result.exit_code == 0 and "best 90.00 % at step 5" in result.output
    assert (folder / "best.safetensors").read_bytes() == before
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["best"] == (0.9, 5)


def test_classes_may_be_called_as_columns(recipe, data, tmp_path) -> None:
    names = ["step", "miou", "pixel_accuracy", *map(str, range(9))]
    (data / "labels.json").write_text(json.dumps({"classes": [{"name": name} for name in names]}))
    for split in ("train", "val"):
        (data / split / "labels").rename(data / split / "masks")
    more = ("--set", "data.dataset=folder", "--every", "2")
    assert command(recipe, data, tmp_path / "out", *more, "--set", "steps=2").exit_code == 0
    assert command(recipe, data, tmp_path / "out", *more, "--set", "steps=4").exit_code == 0
    validations = rows(tmp_path / "out", "train/validation.csv")
    assert [row["step"] for row in validations] == ["2", "4"]
    model = read_safetensors(tmp_path / "out" / "train" / "last.safetensors")[1]
    assert float(validations[-1]["miou"]) == pytest.approx(float(model["validation_miou"]))


def test_a_log_of_an_earlier_version_goes_on(tmp_path) -> None:
    """Whose columns were called as the classes: their order is the same."""
    path = tmp_path / "validation.csv"
    path.write_text("step,miou,sky\n1,0.5,0.25\n2,0.5,0.25\n")
    Table(path, 1).append({"step": 2, "miou": 0.75, "iou:sky": 0.5})
    assert path.read_text().split() == ["step,miou,sky", "1,0.5,0.25", "2,0.75,0.5"]


def test_the_curves_of_tensorboard_have_every_step_once(recipe, data, tmp_path) -> None:
    """Also those that were trained again, from an earlier checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "out" / "train"
    assert command(recipe, data, tmp_path / "out", "--set", "steps=2").exit_code == 0
    early = (folder / "checkpoint.pt").read_bytes()
    for _ in range(2):
        (folder / "checkpoint.pt").write_bytes(early)
        assert command(recipe, data, tmp_path / "out", "--set", "steps=4").exit_code == 0
    events = accumulator.EventAccumulator(str(folder)).Reload()
    found = {name: [event.step for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["train/loss"] == found["train/lr"] == [1, 2, 3, 4]
    assert found["validation/miou"] == [2, 4]
    last = float(rows(tmp_path / "out")[-1]["loss"])
    assert events.Scalars("train/loss")[-1].value == pytest.approx(last, rel=1e-6)


def press_ctrl_c_at(monkeypatch, owner: object, name: str, call: int) -> None:
    """A Ctrl-C in the middle of the `call`-th call of a function."""
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)


def test_ctrl_c_in_a_step_and_going_on(recipe, data, tmp_path, monkeypatch) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert command(recipe, data, straight).exit_code == 0
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, trainer.Run, "advance", 2)
        result = command(recipe, data, stopped)
    assert result.exit_code == 1 and "stopped at step 2; the same command goes on from here" in result.output
    assert torch.load(stopped / "train" / "checkpoint.pt", weights_only=True)["step"] == 2
    result = command(recipe, data, stopped)
    assert result.exit_code == 0 and result.output.startswith("train: going on from step 2\n")
    assert_same_weights(straight, stopped)
    assert losses(stopped) == losses(straight)
    assert rows(stopped, "train/validation.csv") == rows(straight, "train/validation.csv")


def test_ctrl_c_in_the_last_validation_loses_nothing(recipe, data, tmp_path, monkeypatch) -> None:
    press_ctrl_c_at(monkeypatch, trainer, "evaluate", 1)
    result = command(recipe, data, tmp_path / "out")
    assert result.exit_code == 1 and "stopped at step 6;" in result.output
    assert [row["step"] for row in rows(tmp_path / "out", "train/validation.csv")] == ["6"]
    assert (tmp_path / "out" / "train" / "best.safetensors").exists()


def assert_goes_on_to(straight: Path, stopped: Path, recipe: Path, data: Path, step: int, *more: str) -> None:
    assert torch.load(stopped / "train" / "checkpoint.pt", weights_only=True)["step"] == step
    result = command(recipe, data, stopped, *more)
    assert result.exit_code == 0 and result.output.startswith(f"train: going on from step {step}\n")
    assert command(recipe, data, straight, *more).exit_code == 0
    assert_same_weights(straight, stopped)
    assert losses(stopped) == losses(straight)
    assert rows(stopped, "train/validation.csv") == rows(straight, "train/validation.csv")


def test_an_error_between_steps_loses_none(recipe, data, tmp_path) -> None:
    """A mask of the second step that is read there first, since classes weigh alike."""
    more = ("--set", "loss.class_margin=0")
    (keys,) = Keys(tiny(), 4, range(1, 2))
    mask = data / "train" / "labels" / f"frame{keys[0].index}.png"
    good = mask.read_bytes()
    Image.new("L", (48, 40), 77).save(mask)
    result = command(recipe, data, tmp_path / "stopped", *more)
    assert result.exit_code == 1 and "stopped at step 1; the same command goes on" in result.output
    mask.write_bytes(good)
    assert_goes_on_to(tmp_path / "straight", tmp_path / "stopped", recipe, data, 1, *more)


def test_half_a_step_is_not_kept(recipe, data, tmp_path, monkeypatch) -> None:
    function = Run._backward

    def failing(run: Run, *args):
        if run.step == 3:
            function(run, *args)
            raise RuntimeError("out of memory")
        return function(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_backward", failing)
        result = command(recipe, data, tmp_path / "stopped", "--every", "2")
    assert result.exit_code == 1 and result.output.endswith("Error: out of memory\n")
    assert_goes_on_to(tmp_path / "straight", tmp_path / "stopped", recipe, data, 2, "--every", "2")


@pytest.mark.parametrize("every", [3, 6])
def test_an_error_in_a_validation_loses_nothing(every: int, recipe, data, tmp_path, monkeypatch) -> None:
    """The validation comes when the run goes on, at the last step too."""
    folder, steps = data / "val" / "labels", []
    masks = {path: path.read_bytes() for path in folder.iterdir()}
    for path in masks:
        path.write_bytes(b"none")

    def seen(*args, **kwargs):
        path = tmp_path / "stopped" / "train" / "checkpoint.pt"
        steps.append(torch.load(path, weights_only=True)["step"])
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", seen)
        result = command(recipe, data, tmp_path / "stopped", "--every", str(every))
    # Also a SIGKILL there would have lost nothing.
    assert steps == [every]
    assert result.exit_code == 1 and f"stopped at step {every};" in result.output
    assert "none of the 2 images can be read" in result.output
    for path, content in masks.items():
        path.write_bytes(content)
    assert_goes_on_to(tmp_path / "straight", tmp_path / "stopped", recipe, data, every, "--every", str(every))


def test_a_killed_run_repeats_itself(recipe, data, tmp_path) -> None:
    """SIGKILL at whatever it is doing after the fourth row, then once more from its last checkpoint."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    many = ("--every", "3", "--set", "steps=30")
    process = subprocess.Popen(
        [sys.executable, "-m", "shelfkern", *arguments(recipe, data, killed, "--log-every", "1", *many)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the run it is compared with
    )
    log, deadline = killed / "train" / "train.csv", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert command(recipe, data, killed, *many).output.startswith("train: going on from step ")
    assert command(recipe, data, straight, *many).exit_code == 0
    assert_same_weights(straight, killed)
    assert losses(killed) == losses(straight) and len(losses(killed)) == 30
    assert rows(killed, "train/validation.csv") == rows(straight, "train/validation.csv")


def test_a_second_stage_begins_with_the_first_ones_average(data, tmp_path) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(RECIPE + '[[stages]]\nname = "one"\n[[stages]]\nname = "two"\nsteps = 2\n')
    result = command(recipe, data, tmp_path / "out", "--set", "two:optimizer.lr=1e-30")
    assert result.exit_code == 0, result.output
    first, second = (
        torch.load(tmp_path / "out" / name / "checkpoint.pt", weights_only=True) for name in ("one", "two")
    )
    assert (first["step"], second["step"]) == (6, 2)
    for name, value in first["average"].items():
        if value.ndim == 4:
            assert torch.allclose(second["model"][name], value, rtol=1e-5), name
    assert [row["step"] for row in rows(tmp_path / "out", "two/train.csv")] == ["1", "2"]


def test_a_stage_may_begin_with_weights_of_its_own(data, tmp_path) -> None:
    first = shelfnet18_lw(11, **SMALLEST)
    save_weights(first, tmp_path / "first.safetensors", dtype=torch.float32)
    recipe = tmp_path / "two.toml"
    own = f'model = {{start = "{tmp_path / "first.safetensors"}"}}\n'
    recipe.write_text(
        RECIPE + '[[stages]]\nname = "one"\nsteps = 1\n[[stages]]\nname = "two"\nsteps = 1\n' + own
    )
    result = command(recipe, data, tmp_path / "out", "--set", "two:optimizer.lr=1e-30")
    assert result.exit_code == 0, result.output
    second = torch.load(tmp_path / "out" / "two" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in first.state_dict().items():
        if value.ndim == 4:
            assert torch.allclose(second[name], value, rtol=1e-5), name


def test_finished_stages_are_passed_over_without_their_data(data, tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "two.toml"
    recipe.write_text(RECIPE + '[[stages]]\nname = "one"\n[[stages]]\nname = "two"\nsteps = 2\n')
    options = ("--set", "one:steps=0", "--set", "one:epochs=3")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert command(recipe, data, straight, *options, "--set", "two:steps=4").exit_code == 0
    with monkeypatch.context() as patch:
        press_ctrl_c_at(patch, trainer.Run, "advance", 7)
        assert command(recipe, data, stopped, *options, "--set", "two:steps=4").exit_code == 1
    opened = []
    open_split = trainer.open_split
    monkeypatch.setattr(trainer, "open_split", lambda *of: opened.append(of[-1]) or open_split(*of))
    result = command(recipe, data, stopped, *options, "--set", "two:steps=4")
    assert result.exit_code == 0 and result.output.startswith("two: going on from step 1\n")
    assert opened == ["train", "val"]
    for name in ("one", "two"):
        assert_same_weights(straight, stopped, name)
    again = command(recipe, data, stopped, *options, "--set", "two:steps=4")
    assert again.exit_code == 0 and again.output == "" and opened == ["train", "val"]


def test_a_damaged_checkpoint_finishes_no_stage(data, tmp_path) -> None:
    recipe, out = tmp_path / "two.toml", tmp_path / "out"
    recipe.write_text(RECIPE + '[[stages]]\nname = "one"\n[[stages]]\nname = "two"\nsteps = 2\n')
    path = out / "one" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    for content in (b"", b"of something else", b"PK\x03\x04"):
        path.write_bytes(content)
        result = command(recipe, data, out)
        assert result.exit_code == 1 and "checkpoint.pt is cut short, damaged" in result.output
        assert path.read_bytes() == content and not (out / "two").exists()


def test_two_processes_have_the_losses_of_one(recipe, data, tmp_path) -> None:
    """Their batch norms see the whole batch, and their means weigh by labelled pixels."""
    # In float32 the batch norms of so small a network make rounding visible within three steps.
    values = ("batch=4", "model.changes.dropout=0", "precision=float64", "steps=12")
    changes = ("--log-every", "1", *(part for value in values for part in ("--set", value)))
    one = CliRunner().invoke(commands, arguments(recipe, data, tmp_path / "one", *changes))
    assert one.exit_code == 0, one.output
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launched = subprocess.run(
        [*launcher, "-m", "shelfkern", *arguments(recipe, data, tmp_path / "two", *changes)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("step 12/12") == 1
    one_rows, two_rows = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(two_rows) == 12
    for alone, shared in zip(one_rows, two_rows, strict=True):
        assert float(shared["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-9)
    validations = [rows(tmp_path / name, "train/validation.csv")[-1] for name in ("one", "two")]
    assert float(validations[1]["miou"]) == pytest.approx(float(validations[0]["miou"]), abs=0.01)


def started_together(rank: int, port: int, given: list[str]) -> subprocess.Popen[bytes]:
    """One of two processes, as torchrun starts them."""
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    return subprocess.Popen(
        [sys.executable, "-m", "shelfkern", *given],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
    )


def test_two_killed_processes_repeat_themselves(recipe, data, tmp_path) -> None:
    """Without the auxiliary heads, so that parameters have no gradient."""

    killed, straight = tmp_path / "killed", tmp_path / "straight"

    def started(out: Path) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = ("batch=4", "loss.auxiliary=0", "steps=5", "data.validation=''")
        more = ("--every", "2", "--log-every", "1", *(part for value in values for part in ("--set", value)))
        return [started_together(rank, port, arguments(recipe, data, out, *more)) for rank in range(2)]

    one, other = started(killed), started(straight)
    log, deadline = killed / "train" / "train.csv", time.monotonic() + 200
    while one[0].poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.01)
    for process in one:
        process.kill()
    assert [process.wait() for process in one] == [-signal.SIGKILL] * 2
    assert torch.load(killed / "train" / "checkpoint.pt", weights_only=True)["step"] in (2, 4)
    again = started(killed)
    assert [process.wait(timeout=200) for process in (*again, *other)] == [0] * 4
    assert_same_weights(straight, killed)
    assert losses(killed) == losses(straight) and len(losses(killed)) == 5


def test_no_validation_split(recipe, data, tmp_path) -> None:
    result = command(recipe, data, tmp_path / "out", "--set", "data.validation=''")
    assert result.exit_code == 0, result.output
    names = {path.suffix for path in (tmp_path / "out" / "train").iterdir()}
    assert ".safetensors" in names and not (tmp_path / "out" / "train" / "best.safetensors").exists()
    assert not (tmp_path / "out" / "train" / "validation.csv").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (("--set", "seed=-1"), "seed is -1, it may be any integer from 0"),
        (("--set", "data.dataset=kitti"), "dataset is 'kitti', it may be "),
        (("--set", "data.train=dev"), "split is 'dev'"),
        (("--set", "loss.presence=0.2"), "presence is above 0, the model has no SE head"),
        (("--set", "model.start=nowhere"), "weights 'nowhere' is neither a file"),
    ],
)
def test_bad_recipes_are_one_sentence(more: tuple[str, ...], words: str, recipe, data, tmp_path) -> None:
    result = command(recipe, data, tmp_path / "out", *more)
    assert result.exit_code == 1, result.output
    assert words in result.output and result.output.startswith("Error: ") and result.output.count("\n") == 1


def test_a_changed_recipe_does_not_go_on(recipe, data, tmp_path) -> None:
    assert command(recipe, data, tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "train" / "checkpoint.pt").read_bytes()
    result = command(recipe, data, tmp_path / "out", "--set", "steps=8", "--set", "optimizer.lr=0.5")
    assert result.exit_code == 1
    assert "is of a run with optimizer.lr 0.001, it cannot go on with 0.5" in result.output
    assert (tmp_path / "out" / "train" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_file_is_one_sentence_from_a_worker_too(workers: str, recipe, data, tmp_path) -> None:
    image = data / "train" / "images" / "frame2.jpg"
    image.write_bytes(image.read_bytes()[:300])
    more = ("--set", "loss.class_margin=0", "--set", "data.validation=''", "--workers", workers)
    result = command(recipe, data, tmp_path / "out", *more)
    assert result.exit_code == 1 and "Traceback" not in result.output
    last = result.output.splitlines()[-1]
    assert last.startswith(f"Error: {image} cannot be decoded, it may be damaged: ")


def test_bad_data_is_one_sentence(recipe, data, tmp_path) -> None:
    mask = data / "train" / "labels" / "frame2.png"
    Image.new("L", (48, 40), 77).save(mask)
    result = command(recipe, data, tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and str(mask) in result.output and "77" in result.output
    missing = command(recipe, tmp_path / "nowhere", tmp_path / "out")
    assert missing.exit_code == 2 and "nowhere' is not a folder" in missing.output
    unnamed = CliRunner().invoke(
        commands, ["train", str(recipe), "--data", f"voc={data}", "--out", str(tmp_path / "out")]
    )
    assert unnamed.exit_code == 1 and "data names no folder of camvid" in unnamed.output


@pytest.mark.parametrize("split, name", [("train", "train"), ("val", "validation")])
@pytest.mark.parametrize("more", [(), ("--check",)])
def test_data_without_masks_is_refused(split: str, name: str, more, recipe, data, tmp_path) -> None:
    (data / "labels.json").write_text(json.dumps({"classes": [{"name": str(index)} for index in range(12)]}))
    for part in ("train", "val"):
        if part != split:
            (data / part / "labels").rename(data / part / "masks")
    result = command(recipe, data, tmp_path / "out", "--set", "data.dataset=folder", *more)
    assert result.exit_code == 1
    sentence = f"data.{name} is '{split}', which has no masks: {data / split / 'masks'} is missing"
    assert result.output.endswith(f"Error: {sentence}\n")
    assert not list((tmp_path / "out").glob("*/checkpoint.pt"))


def test_bad_validation_data_is_reported_and_skipped(recipe, data, tmp_path) -> None:
    mask = data / "val" / "labels" / "frame5.png"
    Image.new("L", (48, 40), 77).save(mask)
    result = command(recipe, data, tmp_path / "out", "--every", "3")
    assert result.exit_code == 1
    assert result.output.count(f"frame5 is skipped: {mask} holds the value 77") == 1
    assert result.output.count("%, without 1 skipped, best") == 2
    assert from_weights(tmp_path / "out" / "train" / "best.safetensors").classes == CLASSES
    assert [row["step"] for row in rows(tmp_path / "out", "train/validation.csv")] == ["3", "6"]


@pytest.mark.parametrize("name", ["", "camvid="])
def test_a_folder_may_have_an_equals_sign(name: str, recipe, data, tmp_path) -> None:
    folder = data.rename(tmp_path / "a=b")
    result = CliRunner().invoke(
        commands, ["train", str(recipe), "--data", f"{name}{folder}", "--out", "x", "--check"]
    )
    assert result.exit_code == 0, result.output


def test_data_can_be_checked_first(recipe, data, tmp_path, monkeypatch) -> None:
    result = command(recipe, data, tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    assert (
        result.output == "camvid train: 4 samples, 0 of them unfit\ncamvid val: 2 samples, 0 of them unfit\n"
    )
    mask, image = data / "train" / "labels" / "frame2.png", data / "val" / "images" / "frame4.jpg"
    Image.new("L", (48, 40), 77).save(mask)
    image.write_bytes(image.read_bytes()[:300])
    result = command(recipe, data, tmp_path / "out", "--check")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "train: 4 samples, 1 of them unfit" in result.output
    assert str(mask) in result.output and str(image) in result.output
    monkeypatch.setattr(sys, "argv", ["shelfkern", *arguments(recipe, data, tmp_path / "out", "--check")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1


def test_a_learning_curve_is_drawn(recipe, data, tmp_path) -> None:
    command(recipe, data, tmp_path / "out", "--every", "2")
    both = tmp_path / "both.csv"
    both.write_text("step,loss,miou\n5,2.0,0.1\n10,1.5,0.2\n")
    picture = tmp_path / "curve.png"
    result = CliRunner().invoke(curve.main, [str(both), str(tmp_path / "out" / "train"), str(picture)])
    assert result.exit_code == 0, result.output
    colours = {colour for _, colour in Image.open(picture).convert("RGB").getcolors(2**20)}
    assert (0x1B, 0x6C, 0xA8) in colours
    loss, miou = curve.joined((both, tmp_path / "out" / "train"))
    assert [step for step, _ in loss] == [5, 10, 11, 12, 13, 14, 15, 16]
    assert [step for step, _ in miou] == [5, 10, 12, 14, 16]
