"""Checkpoint files in and out."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.testing import assert_close

from shelfkern import checkpoints
from shelfkern.nn import save_weights, shelfnet18_lw, shelfnet50, shipped_weights
from shelfkern.nn.backbone import ResNet

NARROW_LW = dict(backbone_width=4, widths=(4, 8, 12), head_width=4)
NARROW_50 = dict(backbone_width=4, widths=(4, 8, 12, 16))


@pytest.fixture(params=[".safetensors", ".pth", ".pt"])
def path(request, tmp_path):
    return tmp_path / f"model{request.param}"


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_save_and_load(path) -> None:
    model = shelfnet18_lw(5, **NARROW_LW).to(memory_format=torch.channels_last)
    checkpoints.save(model, path)
    assert_same(checkpoints.load(path), model.state_dict())
    checkpoints.save(model.state_dict(), path)
    assert_same(checkpoints.load(str(path)), model.state_dict())
    assert list(path.parent.iterdir()) == [path]


def test_tensors_that_share_memory(path) -> None:
    weight = torch.arange(6.0)
    checkpoints.save({"a": weight, "b": weight[:3]}, path)
    assert_same(checkpoints.load(path), {"a": weight, "b": weight[:3]})


def test_wrappers_are_taken_off(tmp_path) -> None:
    torch.save({"state_dict": {"module.a": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pth.tar")
    assert_same(checkpoints.load(tmp_path / "a.pth.tar"), {"a": torch.ones(2)})


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_checkpoints_of_training_scripts(key: str, tmp_path) -> None:
    model, path = shelfnet18_lw(5, **NARROW_LW), tmp_path / "a.pth"
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, key: model.state_dict()}, path)
    assert_same(checkpoints.load(path), model.state_dict())
    narrow = ResNet("resnet18", 4)
    checkpoints.load_resnet(narrow, {key: torchvision_state("resnet18")})
    assert narrow.bn1.weight[0] == 2


def test_a_tensor_of_such_a_name_is_no_state_dict(tmp_path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "a.pth")
    assert_same(checkpoints.load(tmp_path / "a.pth"), {"model": torch.ones(2)})


def test_the_old_format_of_torch_save(tmp_path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert_same(checkpoints.load(tmp_path / "a.pth"), {"a": torch.ones(2)})


@pytest.mark.parametrize("keep", [0, 1, 20, 1000, -1, -200])
def test_files_cut_short_are_named(path, keep: int) -> None:
    checkpoints.save(shelfnet18_lw(5, **NARROW_LW), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match="is cut short") as info:
        checkpoints.load(path)
    assert str(info.value).startswith(str(path)) and "\n" not in str(info.value)


@pytest.mark.parametrize("keep", [0, 10, 100, -1])
def test_old_files_cut_short_are_named(tmp_path, keep: int) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match="is cut short") as info:
        checkpoints.load(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"PK\x03\x04" + bytes(100), bytes(200)])
def test_files_of_another_kind_are_named(path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match="is cut short") as info:
        checkpoints.load(path)
    assert str(info.value).startswith(str(path)) and "\n" not in str(info.value)


class _Payload:
    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped: bool) -> None:
    path, victim = tmp_path / "a.pth", tmp_path / "victim"
    torch.save({"a": _Payload(str(victim))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError, match=f"holds {os.mkdir.__module__}.mkdir beside weights") as info:
        checkpoints.load(path)
    assert not victim.exists() and "\n" not in str(info.value)
    path.write_bytes(pickle.dumps(_Payload(str(victim)), protocol=2))
    with pytest.raises(RuntimeError):
        checkpoints.load(path)
    assert not victim.exists()


def test_files_without_a_mapping_are_named(tmp_path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"a\.pth holds no state dict"):
        checkpoints.load(tmp_path / "a.pth")


def test_no_such_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nosuch\.pth is not a file"):
        checkpoints.load(tmp_path / "nosuch.pth")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        checkpoints.save({}, tmp_path / "nosuch" / "a.pth")


def test_safetensors_hold_tensors_only(tmp_path) -> None:
    with pytest.raises(ValueError, match="state has epoch of type int"):
        checkpoints.save({"epoch": 3}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def torchvision_state(name: str, width: int = 4) -> dict[str, torch.Tensor]:
    state = {n: v + 1 for n, v in ResNet(name, width).state_dict().items()}
    return {**state, "fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_torchvisions_resnets(name: str, path) -> None:
    state = torchvision_state(name)
    checkpoints.save(state, path)
    for source in (path, state, {"state_dict": {f"module.{n}": v for n, v in state.items()}}):
        backbone = ResNet(name, 4)
        checkpoints.load_resnet(backbone, source)
        assert_same(backbone.state_dict(), {n: v for n, v in state.items() if not n.startswith("fc.")})


def test_torchvisions_first_files_have_no_batch_counts() -> None:
    state = {n: v for n, v in torchvision_state("resnet18").items() if not n.endswith("num_batches_tracked")}
    backbone = ResNet("resnet18", 4)
    checkpoints.load_resnet(backbone, state)
    assert backbone.bn1.num_batches_tracked == 0


@pytest.mark.parametrize(
    "state, sentence",
    [
        (torchvision_state("resnet34"), "state_dict is a resnet34's, the backbone is a resnet18"),
        (torchvision_state("resnet50"), "state_dict is a resnet50's, the backbone is a resnet18"),
        (torchvision_state("resnet18", 8), "state_dict has .* tensors of the wrong shape: conv1.weight is "),
        ({"conv1.weight": torch.zeros(4, 3, 7, 7)}, "state_dict lacks "),
    ],
)
def test_other_resnets_are_refused(state: dict, sentence: str) -> None:
    backbone = ResNet("resnet18", 4)
    before = {n: v.clone() for n, v in backbone.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        checkpoints.load_resnet(backbone, state)
    assert_same(backbone.state_dict(), before)


@pytest.mark.parametrize("build, narrow", [(shelfnet18_lw, NARROW_LW), (shelfnet50, NARROW_50)])
@torch.no_grad()
def test_the_authors_files(build, narrow: dict, tmp_path) -> None:
    model, path = build(5, **narrow).eval(), tmp_path / "authors.pth"
    checkpoints.save_published(model, path)
    assert ("state_dict" in torch.load(path, weights_only=True)) == (build is shelfnet50)
    again = build(5, **narrow).eval()
    again.load_state_dict(checkpoints.load(path))
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    assert_close(again(image), expected, rtol=0, atol=1e-4 * expected.std().item())


@torch.no_grad()
def test_a_model_from_the_authors_file_alone(tmp_path) -> None:
    model, path = shelfnet18_lw(7).eval(), tmp_path / "authors.pth"
    checkpoints.save_published(model, path)
    again = checkpoints.from_published(path)
    assert again.config == model.config and not again.training
    image = torch.randn(1, 3, 32, 32)
    expected = model(image)
    assert_close(again(image), expected, rtol=0, atol=1e-4 * expected.std().item())


def test_a_state_dict_that_does_not_tell_its_model(path) -> None:
    state = shelfnet18_lw(5, **NARROW_LW).state_dict()
    checkpoints.save(state, path)
    cure = "load it into one with load_state_dict, or save it with shelfkern.nn.save_weights$"
    with pytest.raises(
        checkpoints.UnknownModelError, match=f"^{path}: state_dict is none of .* belongs to: {cure}"
    ):
        checkpoints.open_model(str(path))
    with pytest.raises(checkpoints.UnknownModelError, match=f"^state_dict is none of .* belongs to: {cure}"):
        checkpoints.from_published(state)


def test_which_weights_name_their_model(path, tmp_path) -> None:
    model = shelfnet18_lw(5, **NARROW_LW)
    checkpoints.save(model, path)
    assert not checkpoints.names_its_model(str(path))
    save_weights(model, tmp_path / "own.safetensors")
    assert checkpoints.names_its_model(str(tmp_path / "own.safetensors"))
    assert all(map(checkpoints.names_its_model, shipped_weights()))
    assert not checkpoints.names_its_model(str(tmp_path / "nosuch.safetensors"))
