"""Capability tags: the coarse kinds of what an operation may do.

Not to be confused with the engine's *capabilities*, which are the registered operations themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

import yaml

__all__ = ["Capability", "CapabilityDescriptor", "list_ids", "load_capabilities"]

_DEFAULT: Final = Path(__file__).with_name("capabilities.yaml")


class Capability(str, Enum):  # noqa: UP042 - the frozen contract is (str, Enum): str() of a member names the member
    """The closed set of tags."""

    READ = "read"
    """Reads data."""
    WRITE = "write"
    """Changes data."""
    EXTERNAL_RUNTIME = "external_runtime"
    """Runs outside the platform's processes."""
    KNOWLEDGE_CALL = "knowledge_call"
    """Asks a knowledge source."""
    GOVERNANCE_EMIT = "governance_emit"
    """Records a decision."""


@dataclass(frozen=True)
class CapabilityDescriptor:
    """A tag with the words to show for it."""

    id: Capability
    description: str
    category: str


def load_capabilities(path: Path | str | None = None) -> dict[Capability, CapabilityDescriptor]:
    """The tags of a file, by default the shipped one, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no list of tags, or holds an unknown tag or one tag twice; the message names it.
    """
    source = Path(path) if path is not None else _DEFAULT
    found: dict[Capability, CapabilityDescriptor] = {}
    for entry in _entries(source):
        try:
            capability = Capability(entry.get("id"))
        except ValueError:
            raise ValueError(f"{source}: unknown capability id {entry.get('id')!r}; known: {_known()}") from None
        if capability in found:
            raise ValueError(f"{source}: capability id {capability.value!r} appears twice; keep one")
        found[capability] = CapabilityDescriptor(
            id=capability,
            description=str(entry.get("description") or ""),
            category=str(entry.get("category") or ""),
        )
    return found


def list_ids(path: Path | str | None = None) -> list[Capability]:
    """The tags of a file in its order; raises as ``load_capabilities`` does."""
    return list(load_capabilities(path))


def _entries(source: Path) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not YAML ({error})") from error
    entries = document.get("capabilities") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{source}: 'capabilities' must be a list of mappings with id, description and category")
    return entries


def _known() -> str:
    return ", ".join(member.value for member in Capability)
