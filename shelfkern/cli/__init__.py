"""The command line: one file per command."""

from __future__ import annotations

import signal

import click

from ..version import __version__
from .average import average
from .bench import bench
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .quantize import quantize
from .resources import resources
from .segment import segment
from .train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shelfkern")
def commands() -> None:
    """ShelfNet for fast semantic segmentation."""


commands.add_command(segment)
commands.add_command(evaluate)
commands.add_command(bench)
commands.add_command(train)
commands.add_command(average)
commands.add_command(quantize)
commands.add_command(doctor)
commands.add_command(export)
commands.add_command(resources)


def main() -> None:
    """Runs a command. Ctrl-C exits with status 130, as shells do, and one line."""
    try:
        commands.main(standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
