"""Evaluation of a data set against image-by-image counting, in one process and in two."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from numpy.testing import assert_allclose, assert_array_equal
from rich.console import Console
from scenes import CLASSES, Scenes, tiny

import shelfkern
from shelfkern.evaluate import BoundaryF1, ConfusionMatrix, Evaluation, Labeller, Protocol, evaluate
from shelfkern.evaluate.evaluation import _read

pytest.importorskip("scipy")


def counted(dataset: Scenes, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Confusion counts and boundary scores of all images that can be read."""
    matrix, boundary = ConfusionMatrix(len(CLASSES)), BoundaryF1(len(CLASSES), protocol.tolerance)
    for index in range(len(dataset)):
        if index not in dataset.broken:
            sample = dataset[index]
            labels = Labeller(tiny(), protocol)(np.asarray(sample.image))
            matrix.update(np.asarray(sample.mask), labels)
            boundary.update(np.asarray(sample.mask), labels)
    return matrix.counts, boundary.f1()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "protocol",
    [Protocol(), Protocol((0.75, 1.0), True, boundary=True), Protocol((1.0,), False, 64, 64)],
    ids=str,
)
def test_images_of_several_sizes(protocol: Protocol, workers: int) -> None:
    counts, boundary = counted(Scenes(), protocol)
    found = evaluate(tiny(), Scenes(), protocol, workers=workers)
    assert_array_equal(found.matrix.counts, counts)
    assert counts.trace() < counts.sum() and found.matrix.counts.dtype == np.int64
    assert (found.classes, found.images, found.skipped) == (CLASSES, 5, ())
    assert found.protocol == protocol and found.seconds > 0
    if protocol.boundary:
        assert found.boundary is not None
        assert_allclose(found.boundary.f1(), boundary)
    else:
        assert found.boundary is None


def test_an_accelerated_model() -> None:
    fast = shelfkern.accelerate(tiny())
    found, expected = (evaluate(model, Scenes()).matrix.counts for model in (fast, tiny()))
    # Labels may differ where two classes are within rounding of each other.
    assert np.abs(found - expected).sum() <= 1e-3 * expected.sum()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "batch, seen",
    [(1, [1] * 9), (2, [2, 1, 1, 1, 2, 1, 1]), (3, [3, 1, 1, 3, 1]), (16, [3, 1, 1, 3, 1])],
)
def test_a_batch_gives_what_its_images_do(batch: int, seen: list[int], workers: int) -> None:
    """In float64, where no two classes are within rounding of each other."""
    dataset, protocol = Scenes(11, broken=(4, 10), alike=3), Protocol(boundary=True)
    model, sizes = tiny(torch.float64), []
    model.backbone.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    saved: dict[str, np.ndarray] = {}
    told: list[tuple[int, int]] = []
    found = evaluate(
        model, dataset, protocol, batch=batch, workers=workers, save=saved.__setitem__,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    assert sizes == seen
    one = Labeller(tiny(torch.float64), Protocol())
    assert list(saved) == [name for index, name in enumerate(dataset.names) if index not in dataset.broken]
    for name, labels in saved.items():
        assert_array_equal(labels, one(np.asarray(dataset[dataset.names.index(name)].image)))
    alone = evaluate(tiny(torch.float64), dataset, protocol)
    assert_array_equal(found.matrix.counts, alone.matrix.counts)
    assert found.boundary is not None and alone.boundary is not None
    assert_array_equal(found.boundary.f1(), alone.boundary.f1())
    assert (found.images, found.skipped) == (alone.images, alone.skipped) == (9, found.skipped)
    assert told[-1] == (11, 11) and [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_batch_of_an_accelerated_model() -> None:
    fast, dataset = shelfkern.accelerate(tiny()), Scenes(4, alike=3)
    found, expected = (evaluate(fast, dataset, batch=batch).matrix.counts for batch in (3, 1))
    assert found.sum() == expected.sum() and np.abs(found - expected).sum() <= 1e-3 * expected.sum()


def test_what_is_saved_and_told() -> None:
    saved: dict[str, np.ndarray] = {}
    told: list[tuple[int, int]] = []
    evaluate(tiny(), Scenes(3, broken=(1,)), save=saved.__setitem__, progress=lambda *now: told.append(now))
    assert list(saved) == ["town/scene_0", "town/scene_2"]
    assert told == [(1, 3), (2, 3), (3, 3)]
    for name, index in (("town/scene_0", 0), ("town/scene_2", 2)):
        expected = Labeller(tiny(), Protocol())(np.asarray(Scenes()[index].image))
        assert saved[name].dtype == np.uint8
        assert_array_equal(saved[name], expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_are_skipped(workers: int) -> None:
    dataset = Scenes(4, broken=(0, 2))
    found = evaluate(tiny(), dataset, workers=workers)
    assert_array_equal(found.matrix.counts, counted(dataset, Protocol())[0])
    said = "cannot be decoded"
    assert found.skipped == (("town/scene_0", f"scene_0.png {said}"), ("town/scene_2", f"scene_2.png {said}"))
    assert found.images == 2 and "2 images, 2 skipped in " in found.summary()


def test_nothing_that_can_be_read() -> None:
    with pytest.raises(
        RuntimeError, match=r"^none of the 2 images can be read: town/scene_0: scene_0.png cannot"
    ):
        evaluate(tiny(), Scenes(2, broken=(0, 1)))


def test_test_data_without_masks() -> None:
    saved: list[str] = []
    found = evaluate(tiny(), Scenes(2, labelled=False), save=lambda name, labels: saved.append(name))
    assert len(saved) == found.images == 2 and found.matrix.counts.sum() == 0
    assert found.summary().startswith("no labelled pixels; 2 images in ")
    assert Evaluation.from_json(found.to_json()).matrix.counts.sum() == 0


def test_every_module_keeps_its_mode() -> None:
    model = tiny().train()
    model.backbone.eval()
    before = [module.training for module in model.modules()]
    modes: list[bool] = []
    evaluate(
        model, Scenes(1), save=lambda *_: modes.append(any(module.training for module in model.modules()))
    )
    assert modes == [False]
    assert [module.training for module in model.modules()] == before and model.training

    def fail(*_: object) -> None:
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        evaluate(model, Scenes(1), save=fail)
    assert [module.training for module in model.modules()] == before


def test_train_mode_changes_nothing() -> None:
    model = tiny().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = evaluate(tiny(), Scenes()).matrix.counts
    assert_array_equal(evaluate(model, Scenes()).matrix.counts, expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_go_on_as_if_nothing_had_been(workers: int) -> None:
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    evaluate(model, Scenes(2), workers=workers)
    assert torch.equal(torch.rand(4), expected)


def test_a_share_may_be_empty() -> None:
    assert list(_read(Scenes(), range(5, 5, 6), 0)) == []


def test_without_scipy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    found = evaluate(tiny(), Scenes(1))
    Evaluation.from_json(found.to_json())
    with pytest.raises(RuntimeError, match="needs scipy"):
        evaluate(
            tiny(), Scenes(1), Protocol(boundary=True), save=lambda *_: pytest.fail("after the first image")
        )


def test_an_accelerated_model_stays_where_it_is() -> None:
    fast = shelfkern.accelerate(tiny())
    evaluate(fast, Scenes(1), device="cpu")
    with pytest.raises(ValueError, match=r"^device is 'cuda:1', the accelerated model is on 'cpu'$"):
        evaluate(fast, Scenes(1), device="cuda:1")


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^model has 7 classes, dataset has 5$"):
        evaluate(tiny(num_classes=7), Scenes())
    with pytest.raises(ValueError, match=r"^dataset has no images, it must have at least 1$"):
        evaluate(tiny(), Scenes(0))
    with pytest.raises(ValueError, match=r"^workers is -1, it may be any integer from 0$"):
        evaluate(tiny(), Scenes(), workers=-1)
    with pytest.raises(ValueError, match=r"^batch is 0, it may be any integer from 1$"):
        evaluate(tiny(), Scenes(), batch=0)
    for protocol in (Protocol((0.5,)), Protocol(mirror=True), Protocol(base_size=64, crop_size=64)):
        with pytest.raises(ValueError, match=r"^batch is 2, it must be 1 with other scales"):
            evaluate(tiny(), Scenes(), protocol, batch=2)


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(scenes.evaluate_share, (str(tmp_path), 2), nprocs=2)
    alone = evaluate(tiny(), Scenes(7, broken=(2, 3)), Protocol(boundary=True))
    saved = [set(tmp_path.joinpath(f"{rank}.txt").read_text().split()) for rank in (0, 1)]
    assert saved == [{f"town/scene_{index}" for index in part} for part in ((0, 4, 6), (1, 5))]
    for rank in (0, 1):
        found = Evaluation.from_json((tmp_path / f"{rank}.json").read_text())
        assert_array_equal(found.matrix.counts, alone.matrix.counts)
        assert found.boundary is not None and alone.boundary is not None
        assert_allclose(found.boundary.sums, alone.boundary.sums, rtol=1e-12)
        assert_array_equal(found.boundary.images, alone.boundary.images)
        assert (found.images, found.skipped) == (5, alone.skipped)


# --- what is made of it


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(tiny(), Scenes(4, broken=(1,)), Protocol((0.75, 1.0), True, boundary=True))


def test_json_and_back(evaluation: Evaluation) -> None:
    text = evaluation.to_json()
    again = Evaluation.from_json(text)
    assert again.to_json() == text
    assert_array_equal(again.matrix.counts, evaluation.matrix.counts)
    assert again.protocol == evaluation.protocol and again.skipped == evaluation.skipped
    read = json.loads(text)
    assert read["figures"]["mean_iou"] == evaluation.matrix.mean_iou()
    assert read["by_class"]["recall"] == evaluation.matrix.recall().tolist()


def test_json_has_no_nan() -> None:
    matrix = ConfusionMatrix.of([[3, 0], [0, 0]])
    text = Evaluation(matrix, None, ("a", "b")).to_json()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse)["by_class"]["iou"] == [1, None]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocol": {"scales": []}}', "nonsense"])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"^text is no evaluation in JSON: "):
        Evaluation.from_json(text)


def shown(evaluation: Evaluation) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(evaluation.table())
    return console.export_text()


def test_the_table(evaluation: Evaluation) -> None:
    text = shown(evaluation)
    assert "3 images, scales 0.75, 1, mirrored too" in text
    for name, iou in zip(CLASSES, evaluation.matrix.iou(), strict=True):
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert f" {100 * iou:.2f} " in line
    (line,) = [line for line in text.splitlines() if " mean " in line]
    assert f" {100 * evaluation.matrix.mean_iou():.2f} " in line
    assert evaluation.boundary is not None
    assert "boundary F1 %" in text and f" {100 * evaluation.boundary.mean():.2f} " in line
    without = dataclasses.replace(evaluation, boundary=None)
    assert "boundary" not in shown(without)


def test_the_summary() -> None:
    matrix = ConfusionMatrix.of([[6, 2], [1, 1]])
    found = Evaluation(matrix, None, ("a", "b"), images=3, seconds=1.25)
    # IoU 6/9 and 1/4; 7 of 10 pixels; weighted by 8 and 2 pixels.
    said = "mIoU 45.83 %, pixel accuracy 70.00 %, frequency-weighted IoU 58.33 %; 3 images in 1.2 s"
    assert found.summary() == said
