"""The page on the terminal has every command of the whole installation, with what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plm_engine_core.cli import build_app
from typer.main import get_command

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from commands(each, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), " ".join(command.help.split("\n\n")[0].split())


def test_the_page_has_every_command_with_what_it_says_of_itself() -> None:
    rows = [f"| `{name}` | {says} |" for name, says in commands(get_command(build_app()))]
    assert [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")] == rows
