"""Mappings in a snapshot: as written, and then never changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, TypeVar

from pydantic import AfterValidator, PlainSerializer

Key = TypeVar("Key")
Value = TypeVar("Value")
Table = Annotated[
    Mapping[Key, Value], AfterValidator(lambda table: MappingProxyType(dict(table))), PlainSerializer(dict)
]
"""A mapping that nobody can change afterwards."""
