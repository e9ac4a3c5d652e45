"""`import shelfkern`: what it brings in, what it leaves alone, and what the package promises."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from importlib import resources

import pytest
import torch

import shelfkern

OPTIONAL = ("click", "rich", "av", "matplotlib", "PIL", *(() if torch.version.cuda else ("triton",)))
LAZY = ("checkpoints", "data", "evaluate", "train", "visualise")

# Runs in a process of its own: audit events of the import alone, torch's own excluded, then one use.
PROBE = """
import json, os, sys
import torch
before, events, wanted = set(sys.modules), [], []

def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")):
        events.append(event)
    if event in ("os.mkdir", "os.remove", "os.rename"):
        events.append(f"{event} {args[0]}")
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        events.append(f"open {args[0]}")

class Finder:
    def find_spec(self, name, path=None, target=None):
        wanted.append(name.split(".")[0])

sys.addaudithook(watch)
sys.meta_path.insert(0, Finder())
import shelfkern
facts = {"events": list(events), "wanted": list(wanted), "new": sorted(set(sys.modules) - before)}
facts["listed"] = [name for name in dir(shelfkern) if f"shelfkern.{name}" not in sys.modules]
facts["threads"] = [torch.get_num_threads(), torch.initial_seed()]
config = shelfkern.nn.ShelfNetConfig(backbone="resnet18", backbone_width=4, widths=(4, 8, 12))
model = shelfkern.nn.ShelfNet(config).eval()
labels = shelfkern.accelerate(model).predict(torch.zeros(1, 40, 64, 3, dtype=torch.uint8))
facts |= {"labels": list(labels.shape), "version": shelfkern.__version__, "later": events}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """What a fresh process with no GPU and a read-only home tells of its import."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o500)
    unset = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "TRITON_CACHE_DIR", "TRITON_INTERPRET")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr, "home": sorted(p.name for p in home.iterdir())}


def test_it_works_without_a_gpu_and_with_a_read_only_home(probe) -> None:
    assert probe["labels"] == [1, 40, 64]
    assert probe["home"] == [] and probe["stderr"] == ""


def test_optional_packages_are_not_even_looked_for(probe) -> None:
    assert "shelfkern" in probe["wanted"]
    assert not set(OPTIONAL) & set(probe["wanted"])


def test_the_command_line_and_training_are_not_imported(probe) -> None:
    ours = {name.split(".")[1] for name in probe["new"] if name.startswith("shelfkern.")}
    assert {"nn", "ops", "engine"} <= ours
    assert not ours & {"cli", *LAZY}


def test_submodules_are_there_when_asked_for(probe) -> None:
    assert set(LAZY) <= set(probe["listed"])
    found = "; ".join(f"print(shelfkern.{name}.__name__)" for name in LAZY)
    command = [sys.executable, "-c", f"import shelfkern; {found}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [f"shelfkern.{name}" for name in LAZY], done.stderr


def test_other_attributes_are_no_submodules() -> None:
    with pytest.raises(AttributeError, match=r"^module 'shelfkern' has no attribute 'nosuch'$"):
        shelfkern.nosuch  # noqa: B018


def test_no_network_no_processes_no_files(probe) -> None:
    assert probe["events"] == []


def test_use_builds_nothing_either(probe) -> None:
    assert probe["later"] == []


def test_the_version_is_the_packages(probe) -> None:
    assert probe["version"] == importlib.metadata.version("shelfkern")


def test_types_are_declared() -> None:
    assert resources.files("shelfkern").joinpath("py.typed").is_file()


def modules_with_all() -> list[str]:
    folder = resources.files("shelfkern")
    names = [
        "shelfkern",
        *(f"shelfkern.{f.name}" for f in folder.iterdir() if f.joinpath("__init__.py").is_file()),
    ]
    return sorted(name for name in names if hasattr(importlib.import_module(name), "__all__"))


@pytest.mark.parametrize("name", modules_with_all())
def test_every_exported_name_exists(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__ and len(set(module.__all__)) == len(module.__all__)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


@pytest.mark.parametrize("name", ["shelfkern", "shelfkern.nn", "shelfkern.ops"])
def test_the_public_packages_say_what_they_export(name: str) -> None:
    assert name in modules_with_all()


def written_doc(thing: object) -> str | None:
    """A docstring that somebody wrote: dataclasses and named tuples make one up, subclasses inherit one."""
    if not inspect.isclass(thing):
        return thing.__doc__
    doc = vars(thing).get("__doc__")
    return None if doc and doc.startswith(f"{thing.__name__}(") else doc


@pytest.mark.parametrize("name", ["shelfkern", "shelfkern.nn", "shelfkern.ops"])
def test_everything_exported_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    things = {each: getattr(module, each) for each in module.__all__}
    lacking = [
        each for each, thing in things.items() if callable(thing) and not (written_doc(thing) or "").strip()
    ]
    assert lacking == [] and (module.__doc__ or "").strip()


def test_the_docstring_test_sees_through_made_up_ones() -> None:
    import dataclasses

    made_up = dataclasses.make_dataclass("MadeUp", ["a"])
    assert made_up.__doc__ and written_doc(made_up) is None
    assert written_doc(type("Child", (shelfkern.nn.ShelfNet,), {})) is None
    assert written_doc(shelfkern.nn.ShelfNetConfig).startswith("What a ShelfNet is made of")
