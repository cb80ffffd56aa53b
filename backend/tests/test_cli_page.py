"""The page on the terminal has every command of the whole installation, with what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plm_backend.settings import Settings
from plm_engine_core.cli import build_app
from plugin_substrate.cli import app as plugin_app
from typer.main import get_command
from typer.testing import CliRunner

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "cli.md"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from commands(each, (*path, name))
    if not hasattr(command, "commands"):
        yield " ".join(path), " ".join(command.help.split("\n\n")[0].split())


def test_the_page_has_every_command_with_what_it_says_of_itself() -> None:
    rows = [f"| `{name}` | {says} |" for name, says in commands(get_command(build_app()))]
    assert [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")] == rows


def paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in sorted(getattr(command, "commands", {}).items()):
        yield from paths(each, (*path, name))


@pytest.mark.parametrize("app", [build_app(), plugin_app], ids=["plm-cli", "cjm-ctl"])
def test_every_command_explains_itself_and_loses_nothing_of_what_it_says(app: Any) -> None:
    for path in paths(get_command(app)):
        asked = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "1000"})
        assert asked.exit_code == 0, path
        command = get_command(app)
        for name in path:
            command = command.commands[name]  # type: ignore[attr-defined]
        for parameter in command.params:
            assert " ".join((getattr(parameter, "help", None) or "").split()) in " ".join(asked.stdout.split()), path


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), *sorted(REPOSITORY.glob("*/README.md"))]
PACKAGES = ("plm-shared", "plm-engine-core", "plugin-substrate", "backend", "dev")
SOURCES = [*(path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py")), REPOSITORY / "Makefile"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_what_a_page_tells_to_type_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text) + "".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)).splitlines()
    programs = {"plm-cli": get_command(build_app()), "cjm-ctl": get_command(plugin_app)}
    for line in code:
        for program, rest in re.findall(r"\b(plm-cli|cjm-ctl)((?: [a-z][a-z-]*)*)", line):
            command = programs[program]
            for word in rest.split():
                if not (known := getattr(command, "commands", {})):
                    break
                assert word in known, f"{line!r}: {program} has no {word!r}"
                command = known[word]


def test_every_setting_that_a_page_names_is_read_somewhere() -> None:
    name = re.compile(r"\b(?:PLM|CJM)_[A-Z][A-Z_]+\b")
    read = {f"PLM_{field.upper()}" for field in Settings.model_fields}
    read.update(*(name.findall(path.read_text(encoding="utf-8")) for path in SOURCES))
    for page in PAGES:
        assert set(name.findall(page.read_text(encoding="utf-8"))) <= read, page.name
