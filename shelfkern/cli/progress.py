"""How far commands are that go through images, and how many there were."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Show(Protocol):
    """Shows how far it is, of how much; and images a second, where `images` is not what is counted."""

    def __call__(self, done: int, total: int, images: int | None = None) -> None: ...


def counted_images(count: int) -> str:
    """Such as "1 image" and "2 images"."""
    return f"{count} image{'' if count == 1 else 's'}"


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Show]:
    """A bar on stderr, gone when done."""
    began = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(name, total=None, rate="")

        def show(done: int, total: int, images: int | None = None) -> None:
            rate = (done if images is None else images) / (time.monotonic() - began)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} images/s")

        yield show
