"""Recipes: TOML files that state a training run whole. `load` reads one; docs/training.md lists the fields.

A recipe has one or more stages, run in turn, each beginning with the weights of the one before. What
stands outside `[[stages]]` holds for every stage that does not state it anew, but for the weights to begin
with, which are the first stage's.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..data.transforms import Augmentation

# Fields of `Model` that name the weights a stage begins with.
BEGINNINGS = ("start", "backbone")

Name = Literal["shelfnet18_lw", "shelfnet34_lw", "shelfnet50", "shelfnet101"]


def _check(owner: object, name: str, fits: bool, may: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {getattr(owner, name)!r}, it may be {may}")


@dataclasses.dataclass(frozen=True)
class Model:
    """The network: a published one, and what differs from it.

    Without `start` and `backbone` a stage begins with the weights of the one before.

    Attributes:
        name: the published model.
        changes: fields of `ShelfNetConfig` that differ; the number of classes is the data's.
        start: weights to begin with, a shipped name or a file of ours; a head of other classes is left out.
        backbone: torchvision's weights of the ResNet to begin with.
    """

    name: Name
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    start: str = ""
    backbone: str = ""

    def __post_init__(self) -> None:
        _check(self, "backbone", not (self.start and self.backbone), "given only where start is not")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on: a name of `shelfkern.data.open_dataset`, and its splits; "" for no validation."""

    dataset: str
    train: str = "train"
    validation: str = "val"


@dataclasses.dataclass(frozen=True)
class Loss:
    """The sum of the heads' losses.

    Attributes:
        kind: "cross_entropy", or "ohem": of the hardest pixels, those below `threshold` in the true class's
            probability and at least `min_kept` of all, on each process by itself.
        auxiliary: weight of every auxiliary head.
        presence: weight of the SE head's binary cross-entropy.
        label_smoothing: as torch's.
        class_margin: classes weigh 1 / log(margin + frequency); 0 for all alike.
        lovasz: weight of the Lovasz-softmax loss of the main head.
        lovasz_stride: it sees every so many-th row and column, from a random one.
    """

    kind: Literal["cross_entropy", "ohem"] = "cross_entropy"
    auxiliary: float = 1.0
    presence: float = 0.0
    label_smoothing: float = 0.0
    class_margin: float = 0.0
    threshold: float = 0.7
    min_kept: float = 1 / 16
    lovasz: float = 0.0
    lovasz_stride: int = 3

    def __post_init__(self) -> None:
        for name in ("auxiliary", "presence", "lovasz"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "any number from 0")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1")
        margin = self.class_margin
        _check(self, "class_margin", margin == 0 or 1 < margin < math.inf, "0 or any number above 1")
        _check(self, "threshold", 0 < self.threshold < 1, "between 0 and 1")
        _check(self, "min_kept", 0 <= self.min_kept <= 1, "from 0 to 1")
        _check(self, "lovasz_stride", self.lovasz_stride >= 1, "any integer from 1")
        ohem = self.kind == "ohem"
        _check(self, "class_margin", not (ohem and margin), "0 with ohem, which weighs pixels by their loss")
        smooth = self.label_smoothing
        _check(self, "label_smoothing", not (ohem and smooth), "0 with ohem, whose threshold is plain")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How weights follow gradients.

    Attributes:
        name: "sgd" or "adamw".
        lr: the backbone's highest rate.
        head_factor: the rate of everything but the backbone, in that of the backbone.
        momentum: of SGD; AdamW has torch's betas.
        weight_decay: of the weights of convolutions and linear layers.
        decay_norms: whether norms and biases decay too.
        clip: largest norm of the whole gradient; 0 for no limit.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    head_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norms: bool = True
    clip: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr", 0 < self.lr < math.inf, "any number above 0")
        _check(self, "head_factor", 0 < self.head_factor < math.inf, "any number above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "from 0 to below 1")
        _check(self, "weight_decay", 0 <= self.weight_decay < math.inf, "any number from 0")
        _check(self, "clip", 0 <= self.clip < math.inf, "any number from 0")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The rate over a stage: a warm-up, then lr * (1 - step / steps)^power, as published.

    Attributes:
        warmup: steps of the warm-up.
        warmup_shape: "linear", from 0, times the poly decay; or "exponential", from `warmup_from` times lr
            up to lr, after which the decay begins.
    """

    power: float = 0.9
    warmup: int = 0
    warmup_shape: Literal["linear", "exponential"] = "linear"
    warmup_from: float = 1e-3

    def __post_init__(self) -> None:
        _check(self, "power", 0 <= self.power < math.inf, "any number from 0")
        _check(self, "warmup", self.warmup >= 0, "any integer from 0")
        _check(self, "warmup_from", 0 < self.warmup_from <= 1, "above 0, to 1")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: all that its weights depend on, beside the files.

    Attributes:
        epochs, steps: the length, one of the two.
        batch: images of a step, of all processes and parts together.
        accumulate: parts that a step is cut into, one forward and backward pass each.
        precision: "float32", or what autocast computes in; or "float64" for all of it, to compare runs.
        average: decay of the moving average of the weights that is validated and kept; 0 for none.
        sync_norms: whether batch norms take their statistics over all processes.
        fused: whether the network trains on this library's fused ops.
        seed: of all random choices.
    """

    name: str
    model: Model
    data: Data
    augmentation: Augmentation
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    epochs: float = 0.0
    steps: int = 0
    batch: int = 16
    accumulate: int = 1
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    average: float = 0.0
    sync_norms: bool = True
    fused: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        named = self.name not in ("", ".", "..") and "/" not in self.name
        _check(self, "name", named, "any name of a folder")
        for name in ("batch", "accumulate"):
            _check(self, name, getattr(self, name) >= 1, "any integer from 1")
        _check(self, "accumulate", self.batch % self.accumulate == 0, f"a divisor of batch {self.batch}")
        _check(self, "average", 0 <= self.average < 1, "from 0 to below 1")
        _check(self, "seed", self.seed >= 0, "any integer from 0")
        _check(self, "steps", self.steps >= 0, "any integer from 0")
        _check(self, "epochs", 0 <= self.epochs < math.inf, "any number from 0")
        if bool(self.steps) == bool(self.epochs):
            raise ValueError(f"steps is {self.steps}, epochs is {self.epochs:g}, one of them must be given")

    def total_steps(self, images: int) -> int:
        """Steps of the stage on a split of so many images."""
        return self.steps or math.ceil(self.epochs * images / self.batch)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages, run in turn."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages has the names {names}, it must have one or more, all different")


def shipped() -> list[str]:
    """Names that `load` takes: the recipes inside the package."""
    folder = resources.files("shelfkern").joinpath("train/recipes")
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load(config: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a TOML file.

    Args:
        changes: "path.to.field=VALUE" in TOML's spelling, a bare word for a string; for every stage, or
            with "STAGE:path.to.field=VALUE" for one. `model.start` and `model.backbone` without a stage are
            the first one's.

    Raises:
        FileNotFoundError: neither a shipped name nor a file.
        ValueError: the file is no TOML, or a field is unknown, missing or out of range; one sentence.
        ImportError: pydantic, of the extra `train`, is not installed.
    """
    table = _parse(config, _text(config))
    stages = table.pop("stages", [{}])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{config}: stages must be tables, [[stages]]")
    later = _of_later_stages(table)
    merged = [
        merge({"name": "train"}, merge(later if index else table, stage))
        for index, stage in enumerate(stages)
    ]
    for change in changes:
        merged = _changed(merged, change)
    return _validated(config, {"stages": merged})


def _text(config: str) -> str:
    if config in shipped():
        return resources.files("shelfkern").joinpath(f"train/recipes/{config}.toml").read_text("utf-8")
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe {config!r} is neither a file nor a shipped name ({', '.join(shipped())})"
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config} is no TOML: it is not in UTF-8 ({error})") from error


def _parse(what: str, text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{what} is no TOML: {error}") from error


def merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of both, the other's values where both have one, table by table."""
    both = dict(base)
    for key, value in other.items():
        inner = both.get(key)
        both[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def _of_later_stages(table: dict[str, Any]) -> dict[str, Any]:
    """What holds for them of a table for all: they begin with the weights of the stage before."""
    model = table.get("model")
    if not isinstance(model, dict):
        return table
    return table | {"model": {name: value for name, value in model.items() if name not in BEGINNINGS}}


def _changed(stages: list[dict[str, Any]], change: str) -> list[dict[str, Any]]:
    key, equals, text = change.partition("=")
    stage, colon, path = key.rpartition(":")
    if not equals or not all(path.split(".")):
        raise ValueError(f"set {change!r} must be path.to.field=VALUE, or STAGE:path.to.field=VALUE")
    names = [one["name"] for one in stages]
    if colon and stage not in names:
        raise ValueError(f"set {change!r} names the stage {stage!r}, there are {', '.join(names)}")
    try:
        value = _parse("value", f"value = {text}")["value"]
    except ValueError:
        value = text
    table: dict[str, Any] = {}
    inner = table
    *outer, last = path.split(".")
    for name in outer:
        inner[name] = inner = {}
    inner[last] = value
    if colon:
        return [merge(one, table) if one["name"] == stage else one for one in stages]
    first, *others = stages
    return [merge(first, table), *(merge(one, _of_later_stages(table)) for one in others)]


def _validated(config: str, table: dict[str, Any]) -> Recipe:
    try:
        import pydantic
    except ImportError:
        raise ImportError("reading a recipe needs pydantic: pip install 'shelfkern[train]'") from None

    for stage in table["stages"]:
        _check_bools(Stage, stage, f"{config}: stage {stage['name']}")

    class Whole(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        recipe: Recipe

    try:
        return Whole(recipe=table).recipe  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        raise ValueError(f"{config}: {_sentence(error.errors()[0], table)}") from error


def _check_bools(owner: Any, table: Mapping[str, Any], where: str) -> None:
    """Refuses what pydantic would take for another: true for 1, and 1 or "yes" for true."""
    hints = get_type_hints(owner)
    for name, value in table.items():
        kind, place = hints.get(name), f"{where}.{name}"
        values = value if isinstance(value, list) else [value]
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            _check_bools(kind, value, place)
        elif kind is bool and not isinstance(value, bool):
            raise ValueError(f"{place} is {value!r}, it may be true or false")
        elif kind not in (None, bool) and any(isinstance(one, bool) for one in values):
            raise ValueError(f"{place} is {value!r}, it may not be true or false")


def _sentence(error: Any, table: Mapping[str, Any]) -> str:
    """The first of pydantic's errors, named by stage and field."""
    place = list(error["loc"][1:])
    if place[:1] == ["stages"] and len(place) > 1:
        place[:2] = [f"stage {table['stages'][place[1]]['name']}"]
    where = ".".join(str(part) for part in place)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "unexpected_keyword_argument":
        return f"{where} is no field of a recipe"
    if kind == "missing":
        return f"{where} is missing"
    if kind == "value_error":
        return f"{where}: {message}"
    return f"{where} is {error['input']!r}, {message[0].lower()}{message[1:]}"
