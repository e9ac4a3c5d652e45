"""`shelfkern doctor`: what runs on this machine, and what does not and why."""

from __future__ import annotations

import importlib.metadata
import platform

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from .. import native
from ..engine.cpu.library import onednn_reason
from ..engine.tuning import default_path, environment_of, shipped_path
from ..ops import selftest
from ..timing import cpu_name
from ..version import __version__


def version_of(package: str) -> str:
    """A package's installed version, or that it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> list[tuple[str, str]]:
    """Versions and hardware, by name."""
    module = native.module
    cuda_build = module.cuda_archs if module else ""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    return [
        ("shelfkern", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", version_of("triton")),
        ("av (videos)", version_of("av")),
        ("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads for torch"),
        ("instruction sets", ", ".join(module.isas()) + f" ({module.isa()} in use)" if module else "-"),
        ("threads", native.thread_runtime if module else "-"),
        ("gpu", gpu),
        (
            "cuda kernels",
            f"compiled for {cuda_build}" if cuda_build else "not compiled: no nvcc when installed",
        ),
        ("layers timed on the cpu", tuning_file("cpu")),
        ("layers timed on the gpu", tuning_file("cuda")),
        ("native kernels", f"compiled by {module.compiler}" if module else str(native.why_not)),
        ("library convolutions", onednn_reason() or "oneDNN with fused epilogues"),
    ]


def tuning_file(device: str) -> str:
    """Where the tuner keeps what it measured on a device, and what chooses where it has not."""
    if device == "cuda" and not torch.cuda.is_available():
        return "-"
    environment = environment_of(torch.device(device))
    path, shipped = default_path(environment), shipped_path(environment)
    kept = (
        "nowhere: there is no home folder"
        if path is None
        else f"{path}{'' if path.exists() else ' (none yet)'}"
    )
    chooses = f"the bundled {shipped.name}" if shipped.exists() else "a cost model"
    return f"{kept}; {chooses} chooses until tune=True has measured"


def kernels_table(results: list[selftest.Result]) -> Table:
    """Every kernel of every op: right, wrong, or why it cannot run."""
    table = Table(Column("kernel", no_wrap=True), "state", "error")
    for result in results:
        state = "[red]wrong, switched off[/]" if result.failed else "[green]right[/]"
        if result.error is None:
            state = f"[yellow]{escape(result.reason or '')}[/]"
        error = "" if result.error is None else f"{result.error:.1e}"
        table.add_row(result.name, state, error)
    return table


@click.command(short_help="Report what runs here, and test every kernel.")
def doctor() -> None:
    """Reports versions and hardware, and tests every kernel on this machine.

    The exit status is 1 if a kernel gives wrong results.
    """
    console = Console()
    table = Table(show_header=False)
    for name, value in facts():
        table.add_row(name, escape(value))
    console.print(table)
    results = selftest.run_all()
    console.print(kernels_table(results))
    wrong = [result.name for result in results if result.failed]
    if native.module is None:
        console.print(
            "To get the native kernels: install a C++ compiler (g++ or clang++), then reinstall shelfkern."
        )
    if wrong:
        console.print(f"Switched off for being wrong here: {', '.join(wrong)}.")
        raise SystemExit(1)
