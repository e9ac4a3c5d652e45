"""Writing files so that an interrupted run leaves no half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it becomes `path` on success and is deleted on failure.

    The file may be read and written by whom the folder and the umask allow, whatever wrote it: safetensors
    makes files that only their owner can read.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
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
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
