"""Recipes: reading, merging, refusing; and the shipped ones against the published numbers."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path

import pytest

from shelfkern.data import open_dataset
from shelfkern.train import recipe as recipes
from shelfkern.train.recipe import Augmentation, Data, Loss, Model, Optimizer, Recipe, Schedule, Stage, load
from shelfkern.train.schedule import factor

MINIMAL = """
steps = 4
[model]
name = "shelfnet18_lw"
[data]
dataset = "camvid"
[augmentation]
crop = [32, 32]
"""


def written(folder: Path, text: str) -> str:
    (folder / "recipe.toml").write_text(text, "utf-8")
    return str(folder / "recipe.toml")


def test_the_defaults(tmp_path) -> None:
    (stage,) = load(written(tmp_path, MINIMAL)).stages
    expected = Stage("train", Model("shelfnet18_lw"), Data("camvid"), Augmentation((32, 32)), steps=4)
    assert stage == expected
    assert (stage.loss, stage.optimizer, stage.schedule) == (Loss(), Optimizer(), Schedule())


def test_stages_inherit_and_state_anew(tmp_path) -> None:
    text = MINIMAL + (
        '[optimizer]\nlr = 0.5\nclip = 3.0\n[[stages]]\nname = "a"\n'
        '[[stages]]\nname = "b"\nbatch = 8\n[stages.optimizer]\nlr = 0.25\n[stages.data]\ndataset = "voc"\n'
    )
    first, second = load(written(tmp_path, text)).stages
    assert (first.name, first.optimizer, first.batch) == ("a", Optimizer(lr=0.5, clip=3.0), 16)
    assert (second.name, second.optimizer, second.batch) == ("b", Optimizer(lr=0.25, clip=3.0), 8)
    assert (first.data, second.data) == (Data("camvid"), Data("voc"))


def test_changes(tmp_path) -> None:
    text = MINIMAL + '[[stages]]\nname = "a"\n[[stages]]\nname = "b"\n'
    changes = ["optimizer.lr=0.125", "model.name=shelfnet50", "b:augmentation.crop=[64, 96]", "a:fused=false"]
    first, second = load(written(tmp_path, text), changes).stages
    assert first.optimizer.lr == second.optimizer.lr == 0.125
    assert first.model.name == second.model.name == "shelfnet50"
    assert (first.augmentation.crop, second.augmentation.crop) == ((32, 32), (64, 96))
    assert (first.fused, second.fused) == (False, True)


def test_weights_to_begin_with_are_those_of_a_stage(tmp_path) -> None:
    """Given for all they are the first stage's: the others begin with the stage before."""
    text = MINIMAL.replace("[model]", '[model]\nstart = "x"')
    stages = "".join(f'[[stages]]\nname = "{name}"\n' for name in "abc")
    own = 'model = {start = "y"}\n'
    models = [stage.model for stage in load(written(tmp_path, text + stages + own)).stages]
    assert [model.start for model in models] == ["x", "", "y"]
    changes = ["model.backbone=r", "c:model.backbone=s"]
    models = [stage.model for stage in load(written(tmp_path, MINIMAL + stages), changes).stages]
    assert [model.backbone for model in models] == ["r", "", "s"]
    assert {model.name for model in models} == {"shelfnet18_lw"}


@pytest.mark.parametrize(
    "change, words",
    [
        ("optimizer.lr", "set 'optimizer.lr' must be path.to.field=VALUE"),
        ("=3", "set '=3' must be path.to.field=VALUE"),
        ("c:batch=3", "set 'c:batch=3' names the stage 'c', there are train"),
        ("optimizer.rate=3", "stage train.optimizer.rate is no field of a recipe"),
        ("optimizer.lr=fast", "stage train.optimizer.lr is 'fast', input should be a valid number"),
        ("optimizer.lr=0", "stage train.optimizer: lr is 0.0, it may be any number above 0"),
        ("optimizer.momentum=1", "stage train.optimizer: momentum is 1.0, it may be from 0 to below 1"),
        ("model.name=unet", "stage train.model.name is 'unet', input should be 'shelfnet18_lw'"),
        ("loss.kind=focal", "stage train.loss.kind is 'focal', input should be 'cross_entropy' or 'ohem'"),
        ("loss.class_margin=1", "stage train.loss: class_margin is 1.0, it may be 0 or any number above 1"),
        ("loss.threshold=1", "stage train.loss: threshold is 1.0, it may be between 0 and 1"),
        ("batch=0", "stage train: batch is 0, it may be any integer from 1"),
        ("accumulate=3", "stage train: accumulate is 3, it may be a divisor of batch 16"),
        ("epochs=2", "stage train: steps is 4, epochs is 2, one of them must be given"),
        ("steps=0", "stage train: steps is 0, epochs is 0, one of them must be given"),
        ("average=1", "stage train: average is 1.0, it may be from 0 to below 1"),
        ("schedule.warmup_from=0", "stage train.schedule: warmup_from is 0.0, it may be above 0, to 1"),
        ("augmentation.mix=2", "stage train.augmentation: mix is 2.0, a probability is 0 to 1"),
        ("augmentation.crop=[32]", "stage train.augmentation.crop.1 is missing"),
        ("name=a/b", "stage a/b: name is 'a/b', it may be any name of a folder"),
        ("name='..'", "stage ..: name is '..', it may be any name of a folder"),
        ("name='.'", "stage .: name is '.', it may be any name of a folder"),
        ("epochs=inf", "stage train: epochs is inf, it may be any number from 0"),
        ("augmentation.scale_range=[0.5, inf]", "scales are (0.5, inf), they must be numbers above 0"),
        ("augmentation.scales=[nan]", "scales are (nan,), they must be numbers above 0"),
        ("augmentation.light=inf", "light is inf, it must be a number from 0"),
        ("optimizer.weight_decay=inf", "weight_decay is inf, it may be any number from 0"),
        ("optimizer.lr=true", "stage train.optimizer.lr is True, it may not be true or false"),
        ("augmentation.scales=[true]", "augmentation.scales is [True], it may not be true or false"),
        ("fused=1", "stage train.fused is 1, it may be true or false"),
    ],
)
def test_what_is_refused(change: str, words: str, tmp_path) -> None:
    path = written(tmp_path, MINIMAL)
    with pytest.raises(ValueError) as error:
        load(path, [change])
    text = str(error.value)
    assert words in text and "\n" not in text
    assert change.split("=")[0] in text or text.startswith(f"{path}: ")


def test_ohem_takes_no_weights_and_no_smoothing(tmp_path) -> None:
    for field in ("class_margin=1.1", "label_smoothing=0.1"):
        with pytest.raises(ValueError, match=f"{field.split('=')[0]} is .* 0 with ohem"):
            load(written(tmp_path, MINIMAL), ["loss.kind=ohem", f"loss.{field}"])


def test_changes_of_the_model_may_be_true(tmp_path) -> None:
    (stage,) = load(written(tmp_path, MINIMAL), ["model.changes.presence=true", "fused=false"]).stages
    assert stage.model.changes == {"presence": True} and not stage.fused


def test_two_beginnings_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="backbone is 'b', it may be given only where start is not"):
        load(written(tmp_path, MINIMAL), ["model.start=a", "model.backbone=b"])


def test_files_that_are_no_recipes(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe 'nowhere' is neither a file nor a shipped name"):
        load("nowhere")
    with pytest.raises(ValueError, match=r"recipe\.toml is no TOML: "):
        load(written(tmp_path, "steps = = 3"))
    (tmp_path / "recipe.toml").write_bytes("name = 'größer'".encode("latin-1"))
    with pytest.raises(ValueError, match=r"recipe\.toml is no TOML: it is not in UTF-8 \("):
        load(str(tmp_path / "recipe.toml"))
    with pytest.raises(ValueError, match="stages must be tables"):
        load(written(tmp_path, "stages = 3"))
    with pytest.raises(ValueError, match=r"stage train\.model is missing"):
        load(written(tmp_path, "steps = 3"))
    with pytest.raises(ValueError, match=r"stages has the names \['a', 'a'\]"):
        load(written(tmp_path, MINIMAL + '[[stages]]\nname = "a"\n[[stages]]\nname = "a"\n'))


def test_without_pydantic_the_extra_is_named(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest):
        if name == "pydantic":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'shelfkern\[train\]'"):
        load(written(tmp_path, MINIMAL))


def test_a_length_in_epochs() -> None:
    stage = Stage("a", Model("shelfnet50"), Data("voc"), Augmentation((32, 32)), epochs=2.5, batch=12)
    assert stage.total_steps(100) == 21


def test_every_shipped_recipe_loads() -> None:
    names = recipes.shipped()
    assert names == ["camvid", "cityscapes", "cityscapes_lw", "context", "voc"]
    assert all(isinstance(load(name), Recipe) for name in names)


def test_the_shipped_recipes_name_splits_that_there_are(tmp_path) -> None:
    for stage in (stage for name in recipes.shipped() for stage in load(name).stages):
        for split in (stage.data.train, stage.data.validation):
            # A ValueError would say that there is no such data set or split.
            with pytest.raises(FileNotFoundError):
                open_dataset(stage.data.dataset, tmp_path, split)


def assert_as_published_for_50(stage: Stage) -> None:
    """What all stages of ShelfNet50 and 101 share."""
    assert stage.loss == Loss(auxiliary=0.5, presence=0.2)
    recipe, lr = stage.optimizer, stage.optimizer.lr
    assert recipe == Optimizer("sgd", lr, head_factor=10.0, momentum=0.9, weight_decay=1e-4)
    assert stage.schedule == Schedule(0.9)
    augmentation = stage.augmentation
    assert (augmentation.scale_range, augmentation.mirror) == ((0.5, 2.0), 0.5)
    assert (augmentation.rotation, augmentation.blur) == (10.0, 0.5)
    assert augmentation.jitter == (0, 0, 0) and not augmentation.light and not augmentation.mix
    assert stage.model == Model("shelfnet50")


def test_voc_as_published() -> None:
    stages = load("voc").stages
    facts = [(s.data.dataset, s.epochs, s.optimizer.lr, s.batch, s.augmentation.crop) for s in stages]
    size = (512, 512)
    assert facts == [
        ("coco", 30, 0.01, 12, size),
        ("voc_aug", 50, 0.01, 12, size),
        ("voc", 50, 0.001, 12, size),
    ]
    for stage in stages:
        assert_as_published_for_50(stage)


def test_context_as_published() -> None:
    (stage,) = load("context").stages
    assert (stage.data.dataset, stage.epochs, stage.optimizer.lr, stage.batch) == ("context", 80, 0.001, 12)
    assert stage.augmentation.crop == (512, 512)
    assert_as_published_for_50(stage)


def test_cityscapes_as_published() -> None:
    coarse, fine = load("cityscapes").stages
    assert (coarse.data, coarse.epochs, coarse.optimizer.lr, coarse.batch) == (
        Data("cityscapes_coarse", "train_extra"), 30, 0.01, 6,
    )  # fmt: skip
    assert (fine.data, fine.epochs, fine.optimizer.lr) == (Data("cityscapes"), 500, 0.005)
    for stage in (coarse, fine):
        assert stage.augmentation.crop == (768, 768)
        assert_as_published_for_50(stage)


def test_cityscapes_lw_as_published() -> None:
    (stage,) = load("cityscapes_lw").stages
    assert (stage.model, stage.data) == (Model("shelfnet18_lw"), Data("cityscapes"))
    assert (stage.steps, stage.batch, stage.augmentation.crop) == (80_000, 16, (1024, 1024))
    assert stage.loss == Loss("ohem", threshold=0.7, min_kept=1 / 16)
    assert stage.optimizer == Optimizer("sgd", 0.01, 10.0, 0.9, 5e-4, decay_norms=False)
    assert [factor(step, 80_000, stage.schedule) * 0.01 for step in (0, 500, 1000)] == pytest.approx(
        [1e-5, 10**-3.5, 1e-2]
    )
    assert stage.augmentation.scales == (0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    assert (stage.augmentation.mirror, stage.augmentation.jitter) == (0.5, (0.5, 0.5, 0.5))


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    groups = {"model": Model, "data": Data, "loss": Loss, "optimizer": Optimizer, "schedule": Schedule}
    names = [f"{group}.{field.name}" for group, kind in groups.items() for field in dataclasses.fields(kind)]
    names += [field.name for field in dataclasses.fields(Augmentation)]
    names += [field.name for field in dataclasses.fields(Stage) if field.name not in groups]
    missing = [name for name in names if f"`{name}" not in page and name not in ("name", "augmentation")]
    assert not missing
