"""YAML read as the values that JSON has, which is all that a digest, a database and an API can keep.

What readers of YAML do not agree on, or what is not what it looks like, is refused with its place: `no` that is a
truth value, `22:00` that is a number, merge keys, tags, and references that go in a circle or multiply without end.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import yaml
from plm_shared.canonical_json import encodable

MOST_VALUES = 1_000_000
"""How many values a document may stand for, what it refers to counted each time."""

_TAG = "tag:yaml.org,2002:"
_TRUTH = {"true": True, "false": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FRACTION = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_QUOTE = "put it in quotes if it is a text"


class RefusedValue(yaml.constructor.ConstructorError):
    """It is YAML, and no value that we read."""

    def __init__(self, problem: str, node: yaml.Node) -> None:
        super().__init__(None, None, problem, node.start_mark)
        self.place = f"{node.start_mark.line + 1}:{node.start_mark.column + 1}"


class JsonValues(yaml.SafeLoader):
    """A loader for `yaml.load` that makes nothing but what JSON has, and no mapping with the same key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as its base has it
        first: [(tag, found) for tag, found in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}  # filled below

    def get_single_node(self) -> yaml.Node | None:
        """The document, once it is known to have an end."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of texts; YAML forbids doubled keys, and its parser would keep the last one silently."""
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in found:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found {key!r} twice", key_node.start_mark
                )
            found[key] = self.construct_object(value_node, deep=deep)
        return found

    def _key(self, node: yaml.Node) -> str:
        if node.tag == f"{_TAG}merge":
            raise RefusedValue("merge keys (<<) are not read; write the entries out", node)
        if not isinstance(node, yaml.ScalarNode):
            raise RefusedValue("found a key that is a list or a mapping; keys are texts", node)
        if node.tag not in (f"{_TAG}str", f"{_TAG}value"):
            raise RefusedValue(f"found the key {_shown(node)}, which is no text; put it in quotes", node)
        return self.text(node)

    def text(self, node: yaml.ScalarNode) -> str:
        """A text that can be written down again."""
        text: str = self.construct_scalar(node)
        if "\0" in text or not encodable(text):
            raise RefusedValue("found NUL or half a surrogate pair, which cannot be stored", node)
        return text

    def truth(self, node: yaml.ScalarNode) -> bool:
        """True or false, spelled so."""
        text = str(self.construct_scalar(node)).lower()
        if text not in _TRUTH:
            raise RefusedValue(f"{_shown(node)} is a truth value to some; write true or false, or {_QUOTE}", node)
        return _TRUTH[text]

    def integer(self, node: yaml.ScalarNode) -> int:
        """A whole number in the one notation that everybody reads alike."""
        text = str(self.construct_scalar(node))
        if not _INTEGER.fullmatch(text):
            raise RefusedValue(f"{_shown(node)} is not a number to everybody; write its digits only, or {_QUOTE}", node)
        try:
            return int(text)
        except ValueError:
            raise RefusedValue(f"found a number of {len(text)} digits, which cannot be kept", node) from None

    def fraction(self, node: yaml.ScalarNode) -> float:
        """A finite number."""
        text = str(self.construct_scalar(node))
        if not _FRACTION.fullmatch(text) or not math.isfinite(float(text)):
            raise RefusedValue(f"{_shown(node)} is no number that can be kept; write a finite one, or {_QUOTE}", node)
        return float(text)

    def other(self, node: yaml.Node) -> Any:
        """What has a tag of its own."""
        name = node.tag.replace(_TAG, "!!")
        raise RefusedValue(
            f"the tag {name} is not read; write a text, number, true, false, null, list or mapping", node
        )


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise RefusedValue("this refers to itself; write it out", node)
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    count = 1 + sum(_count(part, known) for part in parts)
    if count > MOST_VALUES:
        raise RefusedValue(f"this stands for more than {MOST_VALUES} values; split it, or refer less to itself", node)
    known[id(node)] = count
    return count


def _shown(node: yaml.ScalarNode) -> str:
    text = str(node.value)
    return repr(text if len(text) <= 40 else f"{text[:40]} …")


for _name, _make in {
    "null": yaml.SafeLoader.construct_yaml_null,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
    "str": JsonValues.text,
    "value": JsonValues.text,
    "bool": JsonValues.truth,
    "int": JsonValues.integer,
    "float": JsonValues.fraction,
}.items():
    JsonValues.add_constructor(f"{_TAG}{_name}", _make)
JsonValues.add_constructor(None, JsonValues.other)
