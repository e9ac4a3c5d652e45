"""The mean of weights files, and the command that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from stages import SMALLEST
from torch.testing import assert_close

from shelfkern.cli import commands
from shelfkern.data import camvid, open_dataset
from shelfkern.nn import ShelfNet, from_weights, save_weights, shelfnet18_lw
from shelfkern.nn.weights import read_safetensors
from shelfkern.normalisation import Normalisation
from shelfkern.train.average import mean_of
from shelfkern.train.norms import estimate_norms
from shelfkern.train.recipe import Model
from shelfkern.train.run import build_model


def network(seed: int, num_classes: int = 11, **changes) -> ShelfNet:
    torch.manual_seed(seed)
    model = shelfnet18_lw(num_classes, **{**SMALLEST, **changes})
    for name, value in model.state_dict().items():
        if name.endswith(("running_mean", "running_var", "bias")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("num_batches_tracked"):
            value.fill_(10 + seed)
    return model


def written(folder: Path, name: str, model: ShelfNet, dtype: torch.dtype = torch.float32) -> str:
    path = folder / f"{name}.safetensors"
    save_weights(model, path, dtype=dtype)
    return str(path)


@pytest.fixture
def three(tmp_path) -> list[str]:
    """Weights files of one network."""
    return [written(tmp_path, f"net{seed}", network(seed)) for seed in range(3)]


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(commands, ["average", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_mean_by_hand(three) -> None:
    mean, states = mean_of(three).state_dict(), [network(seed).state_dict() for seed in range(3)]
    assert mean.keys() == states[0].keys()
    for name, value in mean.items():
        assert value.dtype == states[0][name].dtype
        exact = torch.stack([state[name].double() for state in states]).mean(0)
        assert_close(value.double(), exact, rtol=1e-7, atol=0)
    assert mean["backbone.bn1.num_batches_tracked"] == 11


def test_one_file_is_its_own_mean(three) -> None:
    assert_close(mean_of(three[:1]).state_dict(), network(0).state_dict(), rtol=0, atol=0)


def test_classes_palette_and_normalisation_stay(tmp_path) -> None:
    models = [network(seed) for seed in range(2)]
    for model in models:
        model.normalisation = Normalisation((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    # The names of classes need not be known to every file.
    models[0].classes, models[0].palette = camvid.CLASSES, camvid.PALETTE
    mean = mean_of([written(tmp_path, str(index), model) for index, model in enumerate(models)])
    assert (mean.classes, mean.palette) == (camvid.CLASSES, camvid.PALETTE)
    assert mean.normalisation == models[0].normalisation and not mean.training


def renamed(model: ShelfNet, *names: str) -> ShelfNet:
    model.classes = names
    return model


def normalised_otherwise(model: ShelfNet) -> ShelfNet:
    model.normalisation = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return model


@pytest.mark.parametrize(
    "first, second, words",
    [
        (network(0), network(1, num_classes=19), "num_classes 19, it must be {first}'s, 11"),
        (network(0), network(1, widths=[4, 8, 24]), r"widths \(4, 8, 24\), it must be .*\(4, 8, 16\)"),
        (renamed(network(0, 2), "a", "b"), renamed(network(1, 2), "b", "a"),
         r"classes \('b', 'a'\), it must be {first}'s, \('a', 'b'\)"),
        (network(0), normalised_otherwise(network(1)), r"normalisation \(\(0.5, 0.5, 0.5\), .*"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(first: ShelfNet, second: ShelfNet, words: str, tmp_path) -> None:
    one, other = written(tmp_path, "one", first), written(tmp_path, "other", second)
    with pytest.raises(ValueError, match=f"^{other} has the {words.format(first=one)}"):
        mean_of([one, other])
    result = run(one, other, "--out", tmp_path / "mean.safetensors")
    assert result.exit_code == 1 and result.stderr.startswith(f"Error: {other} has the ")
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "mean.safetensors").exists()


def told(paths: list[str]) -> str:
    """What a file says that it is the mean of: no folders of this machine."""
    return ", ".join(f"{Path(path).parent.name}/{Path(path).name}" for path in paths)


def test_the_command_writes_the_mean(three, tmp_path) -> None:
    out = tmp_path / "out" / "mean.safetensors"
    out.parent.mkdir()
    result = run(*three, "--out", out)
    assert result.exit_code == 0 and result.stdout == f"{out}: mean of {told(three)}\n"
    assert [path.name for path in out.parent.iterdir()] == ["mean.safetensors"]
    save_weights(mean_of(three), tmp_path / "expected.safetensors")
    assert_close(from_weights(out).state_dict(), from_weights(tmp_path / "expected.safetensors").state_dict(),
                 rtol=0, atol=0)  # fmt: skip
    assert read_safetensors(out)[1]["mean_of"] == told(three)


def test_norms_from_a_data_set(three, data, tmp_path) -> None:
    out = tmp_path / "mean.safetensors"
    result = run(*three[:2], "--out", out, "--norms-from", "camvid", "--data", data, "--batch", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: mean of {told(three[:2])}, norms from camvid train\n"
    expected = mean_of(three[:2])
    estimate_norms(expected, open_dataset("camvid", data, "train"), 2)
    found = from_weights(out)
    for (name, value), exact in zip(found.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(value, exact), name
    assert read_safetensors(out)[1]["norms_from"] == "camvid train"


def test_norms_of_a_single_file_from_another_split(three, data, tmp_path) -> None:
    out = tmp_path / "norms.safetensors"
    result = run(three[0], "--out", out, "--norms-from", "camvid", "--data", data, "--split", "val")
    assert result.exit_code == 0, result.output
    expected = network(0).eval()
    estimate_norms(expected, open_dataset("camvid", data, "val"))
    assert torch.equal(from_weights(out).backbone.bn1.running_var, expected.backbone.bn1.running_var)
    assert read_safetensors(out)[1]["norms_from"] == "camvid val"


def test_a_stage_begins_with_it(three, data, tmp_path) -> None:
    out = str(tmp_path / "mean.safetensors")
    assert run(*three, "--out", out).exit_code == 0
    stage = Model("shelfnet18_lw", SMALLEST, start=out)
    begun = build_model(stage, open_dataset("camvid", data, "train"))
    assert_close(begun.state_dict(), from_weights(out).state_dict(), rtol=0, atol=0)


def test_what_the_command_refuses(three, data, tmp_path, monkeypatch) -> None:
    out = tmp_path / "mean.safetensors"
    # What is there stays when something goes wrong.
    out.write_text("before")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(three[0]).read_bytes()[:-100])
    norms = ("--norms-from", "camvid")
    cases = [
        ((three[0],), f"WEIGHTS is {three[0]} alone: give two or more, or --norms-from"),
        ((*three, *norms), "--norms-from and --data belong together: give both or neither"),
        ((*three, "--data", data), "--norms-from and --data belong together: give both or neither"),
        ((three[0], "nowhere"), "weights 'nowhere' is neither a file nor a shipped name"),
        ((three[0], damaged), f"{damaged} is cut short"),
        ((*three, *norms, "--data", data, "--split", "best"), "split is 'best'"),
        ((*three, *norms, "--data", tmp_path), f"{tmp_path / 'train' / 'images'} is no folder"),
    ]
    for arguments, words in cases:
        result = run(*arguments, "--out", out)
        assert result.exit_code == 1 and result.stderr.startswith(f"Error: {words}"), result.stderr
        assert len(result.stderr.splitlines()) == 1 and out.read_text() == "before"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*three, "--out", out, "--device", "cuda")
    assert (
        result.exit_code == 1 and "device is 'cuda', and there is no GPU that torch can use" in result.stderr
    )
    result = run(*three, "--out", tmp_path / "mean.pt")
    assert result.exit_code == 1
    assert result.stderr == f"Error: out is {tmp_path / 'mean.pt'}, weights are read from .safetensors\n"
    result = run(*three, "--out", tmp_path / "nowhere" / "mean.safetensors")
    assert result.exit_code == 1 and f"{tmp_path / 'nowhere'} is not a folder" in result.stderr


def test_an_image_that_cannot_be_read_leaves_the_file(three, data, tmp_path) -> None:
    out = tmp_path / "mean.safetensors"
    (data / "train" / "images" / "frame2.jpg").write_bytes(b"no picture")
    result = run(*three, "--out", out, "--norms-from", "camvid", "--data", data)
    assert result.exit_code == 1 and "frame2.jpg cannot be decoded" in result.stderr
    assert not list(tmp_path.glob("*mean*"))
