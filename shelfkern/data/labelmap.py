"""What the masks of one's own data hold: a TOML or JSON file.

`labels.toml`, or `labels.json` of the same structure:

    ignore = [0]                  # values that count for nothing, beside 255; none by default

    [[classes]]
    name = "road"
    colour = [128, 64, 128]       # to draw with; chosen where it is left out
    values = [1, 2]               # what masks hold; by default the class's place in this list, from 0

Values are numbers for masks of indices (grey or palette images of 8 bits) and colours for RGB masks,
`[[128, 64, 128]]`; both may stand together. In RGB masks a class's `colour` means it too, and colours may
be ignored as well.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..visualise import default_palette
from .dataset import IGNORE, Colour

MAPS = ("labels.toml", "labels.json")


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """What masks hold.

    Attributes:
        path: the file that says so.
        classes, palette: as in `Dataset`.
        values: class index or `IGNORE` of each number in masks of indices.
        colours: the same of each colour in RGB masks.
    """

    path: Path
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    values: Mapping[int, int]
    colours: Mapping[Colour, int]


def find_map(folder: Path) -> Path:
    """The label map of a folder.

    Raises:
        FileNotFoundError: it has none.
    """
    for name in MAPS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {' or '.join(MAPS)}, which says what the masks mean")


def read_label_map(path: Path) -> LabelMap:
    """A TOML or JSON file of classes.

    Raises:
        ValueError: it is not as described above.
    """
    content = _parsed(path)
    _only(content, ("classes", "ignore"), "it", path)
    entries = content.get("classes")
    if not isinstance(entries, list) or not 1 <= len(entries) <= IGNORE:
        raise ValueError(f"{path}: classes must be a list of 1 to {IGNORE} tables")
    values: dict[int, int] = {}
    colours: dict[Colour, int] = {}
    names: list[str] = []
    palette: list[Colour] = []
    for index, (entry, default) in enumerate(zip(entries, default_palette(len(entries)), strict=True)):
        _only(entry, ("name", "colour", "values"), f"class {index}", path)
        name = entry.get("name")
        if not isinstance(name, str) or name in names:
            raise ValueError(f"{path}: class {index} must have a name of its own, it has {name!r}")
        own = [entry["colour"]] if "colour" in entry else []
        names.append(name)
        palette.append(_colour(own[0], path) if own else default)
        for value in _list(entry, "values", [index], path) + own:
            _assign(value, index, values, colours, path)
    for value in _list(content, "ignore", [], path):
        _assign(value, IGNORE, values, colours, path)
    return LabelMap(path, tuple(names), tuple(palette), values, colours)


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError("labels.toml needs tomli: pip install 'shelfkern[train]'") from None
    return tomllib.loads(text)


def _only(table: Any, keys: Sequence[str], what: str, path: Path) -> None:
    """Refuses what is no table, and misspelt keys, which would do nothing."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {what} is {table!r}, it must be a table of {', '.join(keys)}")
    for key in table:
        if key not in keys:
            raise ValueError(f"{path}: {what} has the key {key!r}, it may have {', '.join(keys)}")


def _list(table: Mapping[str, Any], key: str, default: list[Any], path: Path) -> list[Any]:
    value = table.get(key, default)
    if not isinstance(value, list):
        raise ValueError(f"{path}: {key} is {value!r}, it must be a list")
    return value


def _colour(value: Any, path: Path) -> Colour:
    if isinstance(value, list) and len(value) == 3 and all(_is_byte(one) for one in value):
        return (value[0], value[1], value[2])
    raise ValueError(f"{path}: the colour {value!r} must be three numbers from 0 to 255")


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _assign(value: Any, label: int, values: dict[int, int], colours: dict[Colour, int], path: Path) -> None:
    """Notes what a number or a colour means; not two things."""
    if _is_byte(value):
        before = values.setdefault(value, label)
    elif isinstance(value, list):
        before = colours.setdefault(_colour(value, path), label)
    else:
        raise ValueError(f"{path}: the value {value!r} must be a number from 0 to 255, or a colour")
    if before != label:
        raise ValueError(f"{path}: the value {value} means both {_called(before)} and {_called(label)}")


def _called(label: int) -> str:
    return "nothing" if label == IGNORE else f"class {label}"


def labels_of_colours(pixels: np.ndarray, labels: LabelMap, path: Path) -> np.ndarray:
    """Class indices (H, W) uint8 of an RGB mask (H, W, 3).

    Raises:
        ValueError: it holds a colour that means nothing.
    """
    if not labels.colours:
        raise ValueError(f"{path} is an RGB mask: give {labels.path} the colours of its classes")
    numbers = _number(pixels.astype(np.int32).transpose(2, 0, 1))
    known = np.array(sorted((_number(colour), label) for colour, label in labels.colours.items()))
    place = np.searchsorted(known[:, 0], numbers).clip(max=len(known) - 1)
    strange = known[place, 0] != numbers
    if strange.any():
        colour = pixels[strange][0].tolist()
        count = np.count_nonzero((pixels == colour).all(-1))
        raise ValueError(
            f"{path} holds the colour {colour} in {count} pixels, which is no class: "
            f"add it to {labels.path}, or save the mask without smoothing"
        )
    return known[place, 1].astype(np.uint8)


def _number(colour: Any) -> Any:
    """A colour, or three planes, as one number."""
    return colour[0] << 16 | colour[1] << 8 | colour[2]
