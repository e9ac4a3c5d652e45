"""What `--help` says: of every command a line, of every option something, and what is bundled."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from shelfkern.cli import commands
from shelfkern.nn import shipped_weights
from shelfkern.train import recipe

NAMES = sorted(commands.commands)


def shown(*words: str) -> str:
    result = CliRunner().invoke(commands, [*words, "--help"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_no_commands_line_is_cut_short() -> None:
    text = shown().partition("Commands:")[2]
    assert "..." not in text and all(f"  {name} " in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_help(name: str) -> None:
    options = [one for one in commands.commands[name].params if isinstance(one, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert shown(name)


def test_what_is_bundled_is_named() -> None:
    flat = " ".join(shown("train").split())
    assert f"Bundled recipes: {', '.join(recipe.shipped())}." in flat and "camvid" in recipe.shipped()
    for name in ("segment", "export", "bench"):
        assert f"Bundled weights ({', '.join(shipped_weights())})" in " ".join(shown(name).split())
