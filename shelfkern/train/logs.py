"""What a run writes while it trains: CSV files, TensorBoard's events, lines or a bar on the terminal."""

from __future__ import annotations

import contextlib
import csv
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import replacing, unwritable


class Table:
    """A CSV file that rows are appended to, each with its step.

    Args:
        path: the file.
        step: rows of later steps are dropped: of a run that was killed and goes on from before them.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        if not rows:
            self.path.unlink()
            return
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def append(self, row: Mapping[str, object]) -> None:
        """Appends a row; the first brings the header.

        Raises:
            OSError: it cannot be written; the rows before stay.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if not size:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            # Half a row would be read as one.
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise unwritable(self.path, error) from error


class Events:
    """TensorBoard's event files, where tensorboard is installed and a folder given; nothing otherwise."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Adds points to the curves `group`/name."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        if self.writer is not None:
            self.writer.close()


class Terminal:
    """A progress bar on a terminal, plain lines elsewhere; silent on all processes but the first."""

    def __init__(self, total: int, done: int, speaks: bool = True) -> None:
        self.console = Console(quiet=not speaks, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        shown = speaks and self.console.is_terminal
        self.progress = Progress(*columns, console=self.console, disable=not shown)
        self.task = self.progress.add_task("", total=total, completed=done)

    def __enter__(self) -> Terminal:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self, step: int) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=step)

    def report(self, step: int, total: int, text: str) -> None:
        """Says how it goes, beside the bar or on a line of its own."""
        self.progress.update(self.task, description=text)
        if self.progress.disable:
            self.console.print(f"step {step}/{total}  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process used at most, on its GPU or as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
