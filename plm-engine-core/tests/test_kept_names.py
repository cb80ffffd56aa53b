"""Names that others rely on stay, and the page for those who move names only what is there."""

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
    if isinstance(owner, type):
        if is_dataclass(owner) and name in {field.name for field in fields(owner)}:
            return True
        if name in getattr(owner, "model_fields", {}):
            return True
    return hasattr(owner, name)


def follow(module: str, name: str) -> bool:
    """Whether a dotted name is in a module."""
    owner: object = importlib.import_module(module)
    for part in name.split("."):
        if not has(owner, part):
            return False
        owner = getattr(owner, part, None)
    return True


def is_there(dotted: str) -> bool:
    """Whether a module has this path below the package, or something in one has."""
    try:
        importlib.import_module(f"plm_engine_core.{dotted}")
    except ModuleNotFoundError:
        module, _, name = dotted.rpartition(".")
        return bool(module) and follow(f"plm_engine_core.{module}", name)
    return True


@pytest.mark.parametrize("line", LINES)
def test_a_kept_name_is_there(line: str) -> None:
    module, name = line.split()
    assert follow(f"plm_engine_core.{module}", name), "docs/moving.md must say what replaces it"


def test_the_list_names_each_name_once() -> None:
    assert len(set(LINES)) == len(LINES)


def test_the_page_names_only_what_is_there() -> None:
    named = re.findall(r"`((?:control_plane|agent_runtime)[\w.]*)`", MOVING.read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [dotted for dotted in named if not is_there(dotted)] == []


@pytest.mark.parametrize("face", ["ControlPlane", "SyncControlPlane"])
def test_the_acts_that_the_page_names_are_those_of_both_faces(face: str) -> None:
    text = MOVING.read_text(encoding="utf-8")
    acts = set(re.findall(r"`ControlPlane\.(\w+)`", text))
    assert len(acts) > 5
    assert [act for act in acts if not follow("plm_engine_core.control_plane", f"{face}.{act}")] == []
