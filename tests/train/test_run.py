"""A stage's steps: exact resumption, rates, averages, parts, precision, beginnings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from numpy.testing import assert_allclose
from stages import SMALLEST, tiny
from torch import nn

from shelfkern import checkpoints
from shelfkern.data import Dataset, open_dataset
from shelfkern.data.transforms import Augmentation
from shelfkern.nn import backbone, fused, save_weights, shelfnet18_lw, shelfnet50
from shelfkern.train.distributed import Processes
from shelfkern.train.loader import batches
from shelfkern.train.recipe import Loss, Model, Optimizer, Stage
from shelfkern.train.run import Run, build_model, finished
from shelfkern.train.schedule import factor

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def source(data) -> Dataset:
    return open_dataset("camvid", data, "train")


def advanced(run: Run, steps: int) -> list[list[float]]:
    """The terms of the loss of each step."""
    losses = []
    for batch in batches(run.source, run.stage, range(run.step, run.step + steps)):
        run.advance(batch)
        losses.append(run.take_terms().tolist())
    return losses


def assert_same(one: object, other: object, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16", "loss": Loss(lovasz=0.5, class_margin=1.1)},
        {"precision": "float16", "optimizer": Optimizer("sgd", momentum=0.9, clip=1.0), "accumulate": 2},
        {"loss": Loss("ohem"), "average": 0.0, "fused": False},
        {"augmentation": Augmentation((32, 48), mix=0.5)},
        {"model": Model("shelfnet18_lw", SMALLEST | {"input_scale": 2.0})},
    ],
)
def test_a_resumed_run_equals_one_never_stopped(changes, source, tmp_path) -> None:
    stage = tiny(batch=4, **changes)
    straight, first = Run(stage, source, ALONE), Run(stage, source, ALONE)
    losses = advanced(straight, 5)
    resumed = advanced(first, 2)
    first.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(1234)
    second = Run(stage, source, ALONE)
    second.resume(tmp_path / "checkpoint.pt")
    resumed += advanced(second, 3)
    assert resumed == losses and len(set(map(tuple, losses))) == 5
    for run, name in ((straight, "a"), (second, "b")):
        run.save(tmp_path / name)
    assert_same(*(torch.load(tmp_path / name, weights_only=True) for name in "ab"))
    assert sorted(path.name for path in tmp_path.glob("*")) == ["a", "b", "checkpoint.pt", "data"]


def test_pending_losses_survive_a_stop(source, tmp_path) -> None:
    straight, first = Run(tiny(), source, ALONE), Run(tiny(), source, ALONE)
    for run, steps in ((straight, 4), (first, 3)):
        for batch in batches(source, tiny(), range(steps)):
            run.advance(batch)
    first.save(tmp_path / "checkpoint.pt")
    second = Run(tiny(), source, ALONE)
    second.resume(tmp_path / "checkpoint.pt")
    for batch in batches(source, tiny(), range(3, 4)):
        second.advance(batch)
    assert second.take_terms().tolist() == straight.take_terms().tolist()


def test_the_seed_decides(source) -> None:
    one, other = Run(tiny(), source, ALONE), Run(tiny(seed=1), source, ALONE)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


def test_any_seed_does(source, tmp_path) -> None:
    stage = tiny(seed=10**30)
    straight, first, second = (Run(stage, source, ALONE) for _ in range(3))
    losses = advanced(straight, 2)
    assert advanced(first, 1) == losses[:1]
    first.save(tmp_path / "checkpoint.pt")
    second.resume(tmp_path / "checkpoint.pt")
    assert advanced(second, 1) == losses[1:]


def test_the_loss_falls(source) -> None:
    stage = tiny(steps=40, batch=4, optimizer=Optimizer("adamw", lr=1e-2), average=0.0)
    losses = [sum(terms) for terms in advanced(Run(stage, source, ALONE), 30)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


@pytest.mark.parametrize("is_fused, kind", [(True, fused.FusedResNet), (False, backbone.ResNet)])
def test_the_model_is_fused_where_the_recipe_says_so(is_fused: bool, kind: type, source) -> None:
    run = Run(tiny(fused=is_fused), source, ALONE)
    assert type(run.model.backbone) is type(run.average.model.backbone) is kind


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "float64"])
def test_the_network_computes_in_the_precision(precision: str, source) -> None:
    run, seen = Run(tiny(precision=precision), source, ALONE), []
    run.model.head.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    advanced(run, 1)
    assert seen == [getattr(torch, precision)]
    kinds = {parameter.dtype for parameter in run.model.parameters()}
    assert kinds == {torch.float64 if precision == "float64" else torch.float32}


def test_a_step_has_the_rates_of_the_schedule(source) -> None:
    stage = tiny(optimizer=Optimizer("sgd", lr=0.1, head_factor=10.0))
    run = Run(stage, source, ALONE)
    for step in range(3):
        advanced(run, 1)
        expected = 0.1 * factor(step, 6, stage.schedule)
        rates = sorted({group["lr"] for group in run.optimizer.param_groups})
        assert rates == pytest.approx([expected, 10 * expected])


@pytest.mark.parametrize("decay_norms", [False, True])
def test_groups(decay_norms: bool, source) -> None:
    recipe = Optimizer("sgd", head_factor=10.0, weight_decay=0.01, decay_norms=decay_norms)
    run = Run(tiny(optimizer=recipe), source, ALONE)
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    seen = []
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["factor"] == (1.0 if name.startswith("backbone.") else 10.0), name
            decays = decay_norms or parameter.ndim > 1
            assert group["weight_decay"] == (0.01 if decays else 0.0), name
    assert sorted(seen) == sorted(names.values())


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_the_optimiser_has_the_momentum(momentum: float, source) -> None:
    run = Run(tiny(optimizer=Optimizer("sgd", momentum=momentum)), source, ALONE)
    assert {group["momentum"] for group in run.optimizer.param_groups} == {momentum}


def test_the_average_by_hand(source) -> None:
    run = Run(tiny(average=0.25), source, ALONE)
    expected = {name: value.double() for name, value in run.average.model.state_dict().items()}
    for step in (1, 2, 3, 4):
        advanced(run, 1)
        decay = min(0.25, step / (step + 9))
        for name, value in run.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in run.average.model.state_dict().items():
        if value.is_floating_point():
            assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
    assert run.average.model.backbone.bn1.num_batches_tracked == 4 and not run.average.model.training


def frozen_norms(run: Run) -> Run:
    """Batch norms that do not see how a batch is cut."""
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
            module.training = False
    return run


def test_parts_give_the_gradient_of_the_whole_batch(source) -> None:
    """Though their labelled pixels differ in number and class."""
    model = Model("shelfnet18_lw", {**SMALLEST, "dropout": 0.0})
    runs = []
    for accumulate in (1, 2, 4):
        stage = tiny(model=model, batch=8, accumulate=accumulate, loss=Loss(class_margin=1.1), fused=False)
        run = frozen_norms(Run(stage, source, ALONE))
        (batch,) = batches(source, stage, range(1))
        batch[0][1][0, :20] = 255
        run.advance(batch)
        runs.append((run.take_terms(), [p.grad for p in run.model.parameters()]))
    for terms, gradients in runs[1:]:
        assert_allclose(terms, runs[0][0], rtol=1e-5)
        for found, expected in zip(gradients, runs[0][1], strict=True):
            assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_clipped(source) -> None:
    run = Run(tiny(optimizer=Optimizer("sgd", lr=1e-3, clip=0.01)), source, ALONE)
    advanced(run, 1)
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert_allclose(norm, 0.01, rtol=1e-3)


@pytest.mark.parametrize("scale", [4.0, 256.0])
def test_the_clipped_gradient_is_that_of_the_loss_as_it_is(scale: float, source) -> None:
    """Not of the one times the scale."""
    run = Run(tiny(precision="float16", optimizer=Optimizer("sgd", lr=1e-3, clip=0.01)), source, ALONE)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    advanced(run, 1)
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert_allclose(norm, 0.01, rtol=1e-3)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_overflows_halves_the_scale_alone(clip: float, source) -> None:
    run = Run(tiny(precision="float16", optimizer=Optimizer("adamw", clip=clip)), source, ALONE)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [parameter.clone() for parameter in run.model.parameters()]
    advanced(run, 1)
    assert run.scaler.get_scale() == 2.0**39 and run.step == 1
    assert all(map(torch.equal, before, run.model.parameters()))


def test_a_batch_that_cannot_be_shared(source) -> None:
    with pytest.raises(ValueError, match="batch is 2, it must be a multiple of 3"):
        Run(tiny(), source, Processes(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("changes", [{"batch": 1}, {"batch": 2, "accumulate": 2}])
def test_norms_of_gates_need_two_images(changes, source) -> None:
    with pytest.raises(ValueError, match=r"batch is \d, each part of a shelfnet18_lw's must have two images"):
        Run(tiny(**changes), source, ALONE)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": 1}, "seed 0, it cannot go on with 1"),
        ({"optimizer": Optimizer("adamw", lr=2e-3)}, "optimizer.lr 0.001, it cannot go on with 0.002"),
        ({"batch": 4}, "batch 2, it cannot go on with 4"),
        (
            {"model": Model("shelfnet18_lw", SMALLEST | {"dropout": 0.5})},
            "model.changes.dropout None, it cannot go on with 0.5",
        ),
        (
            {"model": Model("shelfnet18_lw", {"backbone_width": 8, "widths": [4, 8, 16]})},
            "model.changes.head_width 4, it cannot go on with None",
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_recipe(changes, words, source, tmp_path) -> None:
    Run(tiny(), source, ALONE).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=words):
        Run(tiny(**changes), source, ALONE).resume(tmp_path / "checkpoint.pt")
    Run(tiny(steps=9), source, ALONE).resume(tmp_path / "checkpoint.pt")


def test_damaged_checkpoints(source, tmp_path) -> None:
    run, path = Run(tiny(), source, ALONE), tmp_path / "checkpoint.pt"
    run.save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(RuntimeError, match=r"checkpoint\.pt is cut short"):
        run.resume(path)
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(RuntimeError, match=r"checkpoint\.pt is no checkpoint of a training run"):
        run.resume(path)


@pytest.mark.parametrize("length", [{"steps": 2, "epochs": 0}, {"steps": 0, "epochs": 1}])
def test_a_stage_is_finished_by_its_checkpoint_alone(length, source, tmp_path) -> None:
    stage, path = tiny(**length), tmp_path / "checkpoint.pt"
    run = Run(stage, source, ALONE)
    assert finished(path, stage) is None
    for step in (1, 2):
        advanced(run, 1)
        run.save(path)
        found = finished(path, stage)
        assert (found is None) == (step < 2)
    assert found is not None and found.keys() == run.average.model.state_dict().keys()
    assert all(torch.equal(value, run.average.model.state_dict()[name]) for name, value in found.items())
    longer = {name: 2 * value for name, value in length.items()}
    assert finished(path, tiny(**longer)) is None
    with pytest.raises(ValueError, match="seed 0, it cannot go on with 1"):
        finished(path, tiny(**length, seed=1))


@pytest.mark.parametrize("part, value", [("step", "6"), ("step", None), ("average", []), ("stage", "train")])
def test_a_strange_file_finishes_nothing(part, value, source, tmp_path) -> None:
    stage, path = tiny(steps=1), tmp_path / "checkpoint.pt"
    run = Run(stage, source, ALONE)
    advanced(run, 1)
    run.save(path)
    state = torch.load(path, weights_only=True)
    torch.save(state | {part: value}, path)
    with pytest.raises(RuntimeError, match=r"checkpoint\.pt is no checkpoint of a training run"):
        finished(path, stage)
    del state["images"]
    torch.save(state, path)
    assert finished(path, stage) is None
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(RuntimeError, match=r"checkpoint\.pt is cut short"):
        finished(path, stage)


def stage_from(model: Model) -> Stage:
    return dataclasses.replace(tiny(), model=model)


def test_beginning_with_weights_of_other_classes(source, tmp_path) -> None:
    first = shelfnet18_lw(5, **SMALLEST)
    save_weights(first, tmp_path / "five.safetensors", dtype=torch.float32)
    model = build_model(Model("shelfnet18_lw", SMALLEST, start=str(tmp_path / "five.safetensors")), source)
    assert model.config.num_classes == 11 and model.classes == source.classes
    for name, value in first.state_dict().items():
        same = torch.equal(model.state_dict()[name], value) if ".classify." not in name else True
        assert same, name


def test_beginning_with_an_authors_checkpoint(source, tmp_path) -> None:
    first = shelfnet18_lw()
    checkpoints.save_published(first, tmp_path / "authors.pth")
    model = build_model(Model("shelfnet18_lw", start=str(tmp_path / "authors.pth")), source)
    assert torch.equal(model.backbone.conv1.weight, first.backbone.conv1.weight)


def test_beginning_with_a_backbone(source, tmp_path) -> None:
    first = shelfnet50(backbone_width=8)
    checkpoints.save(first.backbone, tmp_path / "resnet.pth")
    changes = {"backbone_width": 8, "widths": [8, 16, 32, 64]}
    model = build_model(Model("shelfnet50", changes, backbone=str(tmp_path / "resnet.pth")), source)
    assert torch.equal(model.backbone.conv1.weight, first.backbone.conv1.weight)


@pytest.mark.parametrize(
    "model, words",
    [
        (Model("shelfnet18_lw", {"depth": 3}), r"model.changes is {'depth': 3}, it may hold fields of"),
        (Model("shelfnet18_lw", start="nowhere"), "weights 'nowhere' is neither a file nor a shipped name"),
        (
            Model("shelfnet18_lw", start="camvid"),
            r"model.start camvid has .* of \(48.*, the model needs it of \(64",
        ),
    ],
)
def test_beginnings_that_do_not_fit(model: Model, words: str, source) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        Run(stage_from(model), source, ALONE)
