"""Where in a file an entry stands, for messages that lead to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml


def place_of(text: str, location: Sequence[int | str]) -> str:
    """`:line:column` of the entry, or of the nearest thing around it that the text has."""
    node = _composed(text)
    if node is None:
        return ""
    mark = node.start_mark
    for part in location:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            mark = node.start_mark
        elif isinstance(node, yaml.MappingNode):
            # A union adds the name of its kind to the location, which stands nowhere in the text.
            for key, value in node.value:
                if key.value == str(part):
                    node, mark = value, key.start_mark
                    break
    return f":{mark.line + 1}:{mark.column + 1}"


def place_in(path: Path, location: Sequence[int | str]) -> str:
    """`path:line:column` of an entry of a file that was read; the path alone where it cannot be read any more."""
    try:
        return f"{path}{place_of(path.read_text(encoding='utf-8'), location)}"
    except (OSError, UnicodeDecodeError):
        return str(path)


def entries_in(path: Path) -> Callable[[str], str]:
    """Finds `path:line:column` of entries as messages name them: `rules.night.when`, `tiers.part.read`.

    An element of a list goes by its `id`, its `name`, its place or its text. What the file does not have is where the
    nearest thing around it is; the path alone where the file cannot be read any more.
    """
    try:
        document = _composed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        document = None
    if document is None:
        return lambda _: str(path)

    def find(entry: str) -> str:
        node, mark, rest = document, document.start_mark, entry
        while rest:
            found = max(_within(node, rest), key=lambda each: len(each[0]), default=None)
            if found is None:
                break
            name, node, mark = found
            rest = rest[len(name) + 1 :]
        return f"{path}:{mark.line + 1}:{mark.column + 1}"

    return find


def _within(node: yaml.Node, entry: str) -> Iterator[tuple[str, yaml.Node, yaml.Mark]]:
    """What `entry` may start with in this node, and where that is."""
    if isinstance(node, yaml.MappingNode):
        named = [(str(key.value), value, key.start_mark) for key, value in node.value]
        inner = [found for _, value, _ in named if isinstance(value, yaml.SequenceNode) for found in _elements(value)]
        # A table that is written the other way round lists its names under what they are given.
        named += [found for found in inner if found[0] == entry]
    else:
        named = list(_elements(node)) if isinstance(node, yaml.SequenceNode) else []
    return (found for found in named if f"{entry}.".startswith(f"{found[0]}."))


def _elements(node: yaml.SequenceNode) -> Iterator[tuple[str, yaml.Node, yaml.Mark]]:
    for place, each in enumerate(node.value):
        names = [str(place)]
        if isinstance(each, yaml.ScalarNode):
            names = [str(each.value)]
        elif isinstance(each, yaml.MappingNode):
            names += [str(value.value) for key, value in each.value if key.value in ("id", "name")]
        yield from ((name, each, each.start_mark) for name in names)


def _composed(text: str) -> yaml.Node | None:
    try:
        # JSON may be indented with tabs, which YAML refuses; a blank in their place keeps every column.
        return yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None
