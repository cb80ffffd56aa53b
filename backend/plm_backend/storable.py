"""Which request values the books can hold: refused at the door, with the place named, instead of deep inside."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from plm_shared.canonical_json import storable_json
from pydantic import AfterValidator, ValidationInfo

Value = TypeVar("Value", str, dict[str, Any])


def _storable(value: Value, info: ValidationInfo) -> Value:
    storable_json(value, root=info.field_name or "value")
    return value


StorableText = Annotated[str, AfterValidator(_storable)]
"""Text without NUL and without halves of surrogate pairs: PostgreSQL keeps neither (RFC 8259, section 8.2)."""

StorableObject = Annotated[dict[str, Any], AfterValidator(_storable)]
"""A JSON object of storable texts and finite numbers, of bounded depth."""
