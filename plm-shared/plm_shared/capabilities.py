"""Capability tags: the coarse kinds of what an operation may do.

Not to be confused with the engine's *capabilities*, which are the registered operations themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from plm_shared.yaml_entries import read_entries

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
        ValueError: the file is no list of tags, or holds an unknown tag or one tag twice; the message names it and
            its line.
    """
    source = Path(path) if path is not None else _DEFAULT
    _, entries = read_entries(source, "capabilities")
    found: dict[Capability, CapabilityDescriptor] = {}
    for line, entry in entries:
        at = f"{source}, line {line}"
        try:
            capability = Capability(entry.get("id"))
        except ValueError:
            raise ValueError(f"{at}: unknown capability id {entry.get('id')!r}; known: {_known()}") from None
        if capability in found:
            raise ValueError(f"{at}: capability id {capability.value!r} appears twice; keep one")
        found[capability] = CapabilityDescriptor(
            id=capability, description=entry.get("description", ""), category=entry.get("category", "")
        )
    return found


def list_ids(path: Path | str | None = None) -> list[Capability]:
    """The tags of a file in its order; raises as ``load_capabilities`` does."""
    return list(load_capabilities(path))


def _known() -> str:
    return ", ".join(member.value for member in Capability)
