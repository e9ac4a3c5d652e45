"""Replacing files in one step."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from shelfkern import files
from shelfkern.files import remove_leftovers, replacing


@pytest.fixture(params=[str, Path])
def target(request, tmp_path):
    return request.param(tmp_path / "file.bin")


def only(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_file(target, tmp_path) -> None:
    with replacing(target) as temporary:
        assert temporary.parent == tmp_path and temporary != Path(target)
        temporary.write_bytes(b"new")
        assert not Path(target).exists()
    assert only(tmp_path) == {"file.bin": b"new"}


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
def test_readable_by_whom_the_umask_allows(target, tmp_path) -> None:
    with (tmp_path / "plain").open("w"):
        pass
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
        temporary.chmod(0o600)
    assert Path(target).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_nobody_wrote_replaces_nothing(target, tmp_path) -> None:
    Path(target).write_bytes(b"old")
    with pytest.raises(FileNotFoundError), replacing(target):
        pass
    assert only(tmp_path) == {"file.bin": b"old"}


def test_the_old_file_is_whole_until_the_end(target, tmp_path) -> None:
    Path(target).write_bytes(b"old")
    with replacing(target) as temporary:
        temporary.write_bytes(b"n")
        assert Path(target).read_bytes() == b"old"
        temporary.write_bytes(b"new")
        assert Path(target).read_bytes() == b"old"
    assert only(tmp_path) == {"file.bin": b"new"}


def test_readers_of_the_old_file_keep_it(tmp_path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    with (tmp_path / "file.bin").open("rb") as reader:
        with replacing(tmp_path / "file.bin") as temporary:
            temporary.write_bytes(b"new")
        assert reader.read() == b"old"


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt, SystemExit])
def test_exceptions_leave_the_old_file(error: type[BaseException], target, tmp_path) -> None:
    Path(target).write_bytes(b"old")
    with pytest.raises(error), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert only(tmp_path) == {"file.bin": b"old"}


def test_exceptions_leave_no_new_file(target, tmp_path) -> None:
    with pytest.raises(ValueError), replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    with pytest.raises(ValueError), replacing(target):
        raise ValueError
    assert only(tmp_path) == {}


def test_a_target_that_cannot_be_replaced(tmp_path) -> None:
    (tmp_path / "file.bin").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "file.bin") as temporary:
        temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_no_such_folder(tmp_path) -> None:
    target = tmp_path / "nosuch" / "file.bin"
    sentence = f"{target} cannot be written: {target.parent} is not a folder"
    with pytest.raises(FileNotFoundError) as info, replacing(target):
        pytest.fail("it was entered")
    assert str(info.value) == sentence and not target.parent.exists()


def test_a_name_in_the_present_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing("file.bin") as temporary:
        temporary.write_bytes(b"new")
    assert only(tmp_path) == {"file.bin": b"new"}


def test_the_longest_name_that_a_folder_takes(tmp_path) -> None:
    target = tmp_path / ("n" * 255)
    with replacing(target) as temporary:
        temporary.write_bytes(b"new")
    assert only(tmp_path) == {target.name: b"new"}


def test_two_writers_do_not_meet(tmp_path) -> None:
    with replacing(tmp_path / "file.bin") as outer:
        outer.write_bytes(b"outer")
        with replacing(tmp_path / "file.bin") as inner:
            inner.write_bytes(b"inner")
        assert only(tmp_path)["file.bin"] == b"inner"
    assert only(tmp_path) == {"file.bin": b"outer"}


def test_a_lasting_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch) -> None:
    """And its name before anything that comes later."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def syncing(number: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", lambda *paths: calls.append("name") or replace(*paths))
    for lasting, expected in ((False, ["name"]), (True, ["file", "name", "folder"])):
        calls.clear()
        with replacing(tmp_path / "file.bin", lasting=lasting) as temporary:
            temporary.write_bytes(b"new")
        assert calls == expected and only(tmp_path) == {"file.bin": b"new"}


FULL = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from shelfkern.files import replacing
from shelfkern.train.logs import Table

def by_torch(path):
    torch.save({"a": torch.zeros(9000)}, path)

def by_torch_in_a_file(path):
    with path.open("wb") as file:
        torch.save({"a": torch.zeros(9000)}, file)

def by_safetensors(path):
    save_file({"a": torch.zeros(9000)}, path)

def by_python(path):
    path.write_bytes(bytes(9000))

folder = Path(sys.argv[1])
table = Table(folder / "table.csv", 0)
table.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for write in (by_torch, by_torch_in_a_file, by_safetensors, by_python):
    try:
        with replacing(folder / "file.bin") as temporary:
            write(temporary)
    except OSError as error:
        print(error)
try:
    table.append({"step": "2" * 9000})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_files(tmp_path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    run = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    ours, causes = tmp_path / "file.bin", ["the disk may be full", *["File too large"] * 4]
    causes[2] = "Error while serializing: I/O error: File too large (os error 27)"
    paths = [ours] * 4 + [tmp_path / "table.csv"]
    expected = [f"{path} cannot be written: {cause}" for path, cause in zip(paths, causes, strict=True)]
    assert run.stdout.splitlines() == expected
    left = {name: content.split() for name, content in only(tmp_path).items()}
    assert left == {"file.bin": [b"old"], "table.csv": [b"step", b"1"]}


def test_errors_about_other_files_are_theirs(tmp_path) -> None:
    def failing() -> None:
        with replacing(tmp_path / "file.bin"):
            (tmp_path / "nosuch").read_bytes()

    with pytest.raises(FileNotFoundError) as info:
        failing()
    assert "cannot be written" not in str(info.value) and info.value.filename == str(tmp_path / "nosuch")


def test_a_folder_that_takes_no_files() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(OSError, match=r"^/proc/file\.bin cannot be written: "), replacing("/proc/file.bin"):
        pytest.fail("it was entered")


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.replacing(sys.argv[2]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path) -> None:
    (tmp_path / "file.bin").write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, files.__file__, tmp_path / "file.bin"]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / "file.bin").read_bytes() == b"old"
    # What is left is hidden, and is no obstacle to the next writer.
    left = [path.name for path in tmp_path.iterdir() if path.name != "file.bin"]
    assert len(left) == 1 and left[0].startswith(".") and left[0].endswith(".tmp")
    with replacing(tmp_path / "file.bin") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "file.bin").read_bytes() == b"new"
    (tmp_path / ".mine.tmp").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "file.bin"]
