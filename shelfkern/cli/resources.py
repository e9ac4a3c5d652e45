"""`shelfkern resources`: registers, shared memory and occupancy of every GPU kernel, without a GPU."""

from __future__ import annotations

import dataclasses
import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import resources as found
from ..ops import NAMES


def table_of(rows: list[found.Row]) -> Table:
    """One line per kernel, configuration and architecture."""
    numbers = ("registers", "spilled", "shared", "blocks an SM")
    table = Table("op", "kernel", "variant", "arch", *numbers, "tensor cores")
    for row in rows:
        spilled = f"[red]{row.local}[/]" if row.local else "0"
        shared = "at launch" if row.shared is None else str(row.shared)
        blocks = "" if row.blocks is None else str(row.blocks)
        names = (row.op, row.kernel, escape(row.variant), f"sm_{row.arch}")
        table.add_row(*names, str(row.registers), spilled, shared, blocks, row.tensor_cores)
    return table


@click.command(short_help="Compile every GPU kernel and report its resources.")
@click.option("--arch", "archs", type=click.Choice(list(map(str, found.ARCHS))), multiple=True,
              help="Compute capability, times ten; may be repeated (default: all).")  # fmt: skip
@click.option("--op", type=click.Choice(NAMES), help="Only this op (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def resources(archs: tuple[str, ...], op: str | None, as_json: bool) -> None:
    """Compiles the GPU kernels, without a GPU, and reports registers, shared memory and occupancy.

    The exit status is 1 if one spills registers or does not fit.
    """
    chosen = [int(arch) for arch in archs] or list(found.ARCHS)
    try:
        rows = found.triton_rows(chosen, op) + found.cuda_rows(chosen, op)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(
            f"Triton's cache cannot be written: {error}; set TRITON_CACHE_DIR"
        ) from None
    if as_json:
        for row in rows:
            click.echo(json.dumps(dataclasses.asdict(row)))
    else:
        Console().print(table_of(rows))
    if found.cuda_reason() is not None:
        click.echo(f"Nothing of the CUDA C++ kernels: {found.cuda_reason()}", err=True)
    faults = [f"{row.kernel} ({row.variant}, sm_{row.arch}): {row.fault}" for row in rows if row.fault]
    if faults:
        raise click.ClickException("; ".join(faults))
