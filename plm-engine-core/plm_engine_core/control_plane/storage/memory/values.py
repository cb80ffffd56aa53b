"""Values as PostgreSQL keeps them, so that both storages answer with the same texts, numbers and bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from plm_shared.canonical_json import JsonRefused, compact_json, encodable, storable_json

from plm_engine_core.control_plane.amounts import plain
from plm_engine_core.control_plane.errors import InvalidRequest

_PLACES = Decimal("0.00000001")
_TOO_LARGE = Decimal(10) ** 12
_TOO_LARGE_A_SUM = Decimal(10) ** 20


def kept_json(value: Any, *, root: str) -> Any:
    """A JSON value as jsonb keeps it: a copy in which a whole number is an integer, however it was written.

    Raises:
        InvalidRequest: the value holds what PostgreSQL could not store (NaN, U+0000); names the path, from `root`.
    """
    try:
        text = storable_json(value, root=root)
    except JsonRefused as error:
        raise InvalidRequest(str(error), field=error.path) from error
    return json.loads(text, parse_float=_kept_number)


def _kept_number(text: str) -> int | float:
    digits = format(Decimal(text), "f")
    return float(digits) + 0.0 if "." in digits else int(digits)  # numeric has no negative zero


def json_text(value: Any) -> str:
    """The text of a kept JSON value, byte for byte as jsonb writes it: shorter keys first, numbers without exponent."""
    match value:
        case dict():
            return "{" + ", ".join(f"{compact_json(key)}: {json_text(item)}" for key, item in _members(value)) + "}"
        case list():
            return "[" + ", ".join(map(json_text, value)) + "]"
        case float():
            return format(Decimal(repr(value)), "f")
        case _:
            return compact_json(value)


def _members(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(value.items(), key=lambda member: (len(key := member[0].encode()), key))


def text_at(value: Any, *path: str) -> str | None:
    """The text of what stands at a path of a kept JSON value, or None: the `#>>` operator."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if value is None or isinstance(value, str) else json_text(value)


def without_nulls(value: Any) -> Any:
    """A JSON value without the members that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def storable_text(value: str) -> str:
    """The same text.

    Raises:
        InvalidRequest: PostgreSQL could not store it.
    """
    if "\0" in value:
        raise InvalidRequest(
            "the database cannot hold a value of the request: PostgreSQL text fields cannot contain NUL (0x00) bytes"
        )
    if not encodable(value):
        raise InvalidRequest("a text of the request cannot be stored: surrogates not allowed")
    return value


def booked(amount: Decimal) -> Decimal:
    """An amount as numeric(20, 8) holds it.

    Raises:
        InvalidRequest: it is too large for the books.
    """
    return _booked(amount, _TOO_LARGE)


def booked_sum(amount: Decimal) -> Decimal:
    """What was spent as numeric(28, 8) holds it: more than any number of calls can cost.

    Raises:
        InvalidRequest: it is too large for the books.
    """
    return _booked(amount, _TOO_LARGE_A_SUM)


def _booked(amount: Decimal, too_large: Decimal) -> Decimal:
    if not amount.is_finite() or abs(amount) >= too_large:
        raise InvalidRequest("the database cannot hold a value of the request: numeric field overflow")
    return amount.quantize(_PLACES, rounding=ROUND_HALF_UP)


def amount_text(amount: Decimal) -> str:
    """All digits of an amount and no more."""
    return format(plain(amount), "f")


def json_time(at: datetime) -> str:
    """A time as it stands in JSON: `2030-01-31T12:00:00.5+00:00`."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S}{_fraction(at)}+00:00"


def text_time(at: datetime) -> str:
    """A time as it stands in a message: `2030-01-31 12:00:00.5+00`."""
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}{_fraction(at)}+00"


def _fraction(at: datetime) -> str:
    return f".{at.microsecond:06d}".rstrip("0").rstrip(".")


def fresh(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that its reader may change: its JSON values are copies, with their members in the order of jsonb."""
    return {key: _copy(value) for key, value in row.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in _members(value)}
    return [_copy(item) for item in value] if isinstance(value, list) else value
