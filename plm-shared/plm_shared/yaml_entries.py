"""A YAML file that holds one list of small mappings, read with the line of every entry.

Scalars stay text, so that a price keeps its digits. Every fault is a ``ValueError`` that names the file and the line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import yaml

__all__ = ["Entry", "read_entries"]

_LARGEST: Final = 4 * 1024 * 1024


class Entry(NamedTuple):
    """One mapping of the list."""

    line: int
    fields: dict[str, str]


def read_entries(source: Path, key: str) -> tuple[dict[str, str], list[Entry]]:
    """The text fields at the top of a file, and the entries of its list ``key``, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than 4 MiB, no UTF-8, no YAML, or not of this shape.
    """
    import yaml

    try:
        document = yaml.compose(_text(source), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source}: not YAML ({error})") from error
    top: dict[str, str] = {}
    entries: list[Entry] = []
    found = False
    for name, node in _pairs(source, document, f"the file must be a mapping with {key!r}, a list of mappings"):
        if name == key and isinstance(node, yaml.SequenceNode):
            found = True
            entries = [_entry(source, item, key) for item in node.value]
        elif name != key and isinstance(node, yaml.ScalarNode):
            top[name] = str(node.value)
        else:
            raise ValueError(f"{_at(source, node)}: {name!r} must be {'a list of mappings' if name == key else 'text'}")
    if not found:
        raise ValueError(f"{source}: {key!r} must be a list of mappings")
    return top, entries


def _text(source: Path) -> str:
    if source.stat().st_size > _LARGEST:
        raise ValueError(f"{source}: larger than {_LARGEST} bytes")
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 ({error})") from error


def _entry(source: Path, node: yaml.Node, key: str) -> Entry:
    import yaml

    fields: dict[str, str] = {}
    for name, value in _pairs(source, node, f"{key!r} must be a list of mappings"):
        if not isinstance(value, yaml.ScalarNode):
            raise ValueError(f"{_at(source, value)}: {name!r} must be text")  # noqa: TRY004 - the file is wrong, no type
        fields[name] = str(value.value)
    return Entry(node.start_mark.line + 1, fields)


def _pairs(source: Path, node: yaml.Node | None, problem: str) -> list[tuple[str, yaml.Node]]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{_at(source, node)}: {problem}")  # noqa: TRY004 - see _entry
    seen: set[str] = set()
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode) or name.value in seen:
            raise ValueError(f"{_at(source, name)}: a field has no plain name, or stands there twice")
        seen.add(name.value)
    return [(str(name.value), value) for name, value in node.value]


def _at(source: Path, node: yaml.Node | None) -> str:
    return str(source) if node is None else f"{source}, line {node.start_mark.line + 1}"
