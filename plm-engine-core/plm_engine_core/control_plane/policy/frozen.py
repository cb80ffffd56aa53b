"""Mappings in a snapshot: as written, and then never changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, PlainSerializer

Key = TypeVar("Key")
Value = TypeVar("Value")
Table = Annotated[
    Mapping[Key, Value], AfterValidator(lambda table: MappingProxyType(dict(table))), PlainSerializer(dict)
]
"""A mapping that nobody can change afterwards."""

_DEEPEST = 100


def thawed(value: Any) -> Any:
    """A copy of frozen JSON values as dicts and lists, which their holder may change."""
    if isinstance(value, Mapping):
        return {key: thawed(each) for key, each in value.items()}
    return [thawed(each) for each in value] if isinstance(value, tuple) else value


def _frozen(value: Any, depth: int = 1) -> Any:
    if depth > _DEEPEST:
        raise ValueError(f"it is more than {_DEEPEST} deep; flatten it")
    if isinstance(value, Mapping):
        return MappingProxyType({key: _frozen(each, depth + 1) for key, each in value.items()})
    return tuple(_frozen(each, depth + 1) for each in value) if isinstance(value, list | tuple) else value


Document = Annotated[Mapping[str, Any], AfterValidator(_frozen), PlainSerializer(thawed)]
"""A mapping of JSON values that nobody can change afterwards, neither it nor what is in it."""
