"""Writing files so that an interrupted run leaves no half of one."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp", re.DOTALL)


@contextmanager
def replacing(path: str | os.PathLike[str], *, lasting: bool = False) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it becomes `path` on success and is deleted on failure.

    The file may be read and written by whom the folder and the umask allow, whatever wrote it: safetensors
    makes files that only their owner can read.

    Args:
        path: the file.
        lasting: whether a power cut afterwards leaves the new file whole too; it takes as long as the disk.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: it cannot be written, such as on a full disk; one sentence, also where safetensors or torch
            found it out.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: {target.parent} is not a folder")
    # Of its own for every writer, and short: a name may have 255 bytes.
    temporary = target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        if lasting:
            _to_disk(temporary, os.O_RDWR)
        temporary.replace(target)
        if lasting:
            # Not every system and file system can.
            with suppress(OSError):
                _to_disk(target.parent, os.O_RDONLY)
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = _cause(error, temporary)
        if cause is None:
            raise
        raise unwritable(target, cause) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what writers that were killed left in a folder that nobody writes to."""
    for path in folder.glob(".*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _to_disk(path: Path, mode: int) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, mode)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def unwritable(path: Path, error: Exception) -> OSError:
    """The error to raise where `error` kept a file from being written: of its kind, if it is the system's."""
    if isinstance(error, OSError) and error.errno is not None:
        return type(OSError(error.errno, ""))(f"{path} cannot be written: {error.strerror}")
    return OSError(f"{path} cannot be written: {str(error).splitlines()[0]}")


def _cause(error: BaseException | None, temporary: Path) -> Exception | None:
    """What kept the temporary file from being written; None where the error is about something else."""
    if isinstance(error, OSError):
        ours = error.filename in (None, temporary, str(temporary))
        return error if ours and error.errno is not None else None
    if isinstance(error, SafetensorError):
        return error
    # torch's writer notices that bytes are missing; the system's error is what it was raised in.
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return _cause(error.__context__, temporary) or OSError("the disk may be full")
    return None
