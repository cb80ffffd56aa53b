"""Names that others rely on stay, or are taken away on purpose."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("kept_names.txt")
MOVING = Path(__file__).parents[1] / "docs" / "moving.md"
LINES = [line for line in LIST.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def has(owner: object, name: str) -> bool:
    if isinstance(owner, type) and is_dataclass(owner) and name in {field.name for field in fields(owner)}:
        return True
    return hasattr(owner, name)


@pytest.mark.parametrize("line", LINES)
def test_a_kept_name_is_there(line: str) -> None:
    module, name = line.split()
    owner: object = importlib.import_module(f"plugin_substrate.{module}")
    for part in name.split("."):
        assert has(owner, part), f"plugin_substrate.{module} has no {name}; docs/moving.md must say what replaces it"
        owner = getattr(owner, part, None)


def test_the_list_names_each_name_once() -> None:
    assert len(set(LINES)) == len(LINES)


def test_the_page_names_only_what_is_there() -> None:
    """What stands in the right-hand column between backticks and looks like a class of ours is one."""
    package = importlib.import_module("plugin_substrate")
    named = set(re.findall(r"`(Plugin\w+Error|Worker\w+Error|Wire\w+Error|StoreError)`", MOVING.read_text("utf-8")))
    assert named
    assert [name for name in named if not hasattr(package, name)] == []
