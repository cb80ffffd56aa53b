"""JSON text that means the same in every process: for hashing, and for storing.

Both refuse what has no stable text (NaN, sets, arbitrary objects, keys that are not text) and say where it was found.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

from pydantic_core import to_json

__all__ = ["JsonRefused", "canonical_json", "check_storable", "compact_json", "encodable", "storable_json"]

_DEEPEST: Final = 200
_WIDEST_INTEGER: Final = 14_000  # bits; Python refuses to print, and others to read, integers of more than 4 300 digits
_SMALL: Final = 2**63
_FINEST: Final = 1e-4  # floats from here to the next are written without an exponent, and so in one way
_COARSEST: Final = 1e16
_STABLE_TEXT: Final = (datetime, date, time, uuid.UUID, Decimal, PurePath)


class JsonRefused(ValueError):
    """A value has no place in the JSON text; ``path`` leads to it, as in ``payload.items[3].price``."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


def encodable(text: str) -> bool:
    """Whether UTF-8 can express the text: half a surrogate pair it cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _prepared(encoder: json.JSONEncoder) -> Callable[[Any], str]:
    """Its `encode`, for values without circles: that makes its parts anew for each value, here they are made once."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # a Python without it
        return encoder.encode
    separators = encoder.key_separator, encoder.item_separator
    flags = encoder.sort_keys, encoder.skipkeys, encoder.allow_nan
    parts = make(None, encoder.default, json.encoder.encode_basestring, None, *separators, *flags)
    return lambda value: "".join(parts(value, 0))


compact_json: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_sorted_json: Final = _prepared(
    json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
)
_ESCAPED_NUL: Final = "\\u0000"  # how U+0000 is written; also within an escaped backslash, which is harmless


def canonical_json(value: Any, *, root: str = "payload") -> str:
    """Sorted keys, no blanks, non-ASCII kept as is; dates, UUIDs, decimals, paths and text enums as their ``str()``.

    Raises:
        JsonRefused: a value's text would differ between processes.
    """
    if _plainly_json(value, 0):
        text = _sorted_json(value)
        if text.isascii() or encodable(text):
            return text
    _check(value, root, 0, _hashable_leaf)
    return _sorted_json(value)


def storable_json(value: Any, *, root: str = "payload") -> str:
    """The text for a jsonb column: plain JSON values only.

    Raises:
        JsonRefused: a value is no JSON (a datetime, a NaN), or text that PostgreSQL cannot store (U+0000).
    """
    if _plainly_json(value, 0):
        try:
            text = to_json(value).decode()  # the text of `compact_json`, in a third of the time
        except ValueError:  # half a surrogate pair: the check says where
            text = _ESCAPED_NUL
        if _ESCAPED_NUL not in text:
            return text
    check_storable(value, root=root)
    return compact_json(value)


def check_storable(value: Any, *, root: str = "payload") -> None:
    """Only the checks of ``storable_json``."""
    _check(value, root, 0, _storable_leaf)


def _plainly_json(value: Any, depth: int) -> bool:
    """Whether the value has nothing but what JSON has, texts aside: those are looked at once they are one.

    One that has may still be fine: so are numbers of which each writer of JSON makes another text. This is run for
    every value of every booking, so each leaf is judged in place.
    """
    kind = type(value)
    items: Iterable[Any] = (value,)
    if kind is dict:
        items = value.values()
        for key in value:
            if type(key) is not str:
                return False
    elif kind is list:
        items = value
    if depth >= _DEEPEST:
        return False
    for item in items:
        kind = type(item)
        if kind is str or item is None or kind is bool:
            continue
        if kind is dict or kind is list:
            if item and not _plainly_json(item, depth + 1):
                return False
        elif kind is int:
            if not -_SMALL < item < _SMALL:
                return False
        elif kind is not float or not (_FINEST <= abs(item) < _COARSEST or item == 0):
            return False
    return True


def _check(value: Any, path: str, depth: int, leaf: Callable[[Any, str], None]) -> None:
    if depth > _DEEPEST:
        raise JsonRefused(path, f"is nested deeper than {_DEEPEST} levels, or contains itself")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise JsonRefused(path, f"has the key {key!r}; use text keys")
            leaf(key, f"{path}.{key}")
            _check(item, f"{path}.{key}", depth + 1, leaf)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth + 1, leaf)
    else:
        leaf(value, path)


def _plain_leaf(value: Any, path: str) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        raise JsonRefused(path, f"is {value}, which JSON does not have; use null or text")
    if isinstance(value, int) and value.bit_length() > _WIDEST_INTEGER:
        raise JsonRefused(path, f"is an integer of more than {_WIDEST_INTEGER} bits; write it as text")
    if isinstance(value, str) and not encodable(value):
        shown = path.encode(errors="backslashreplace").decode()  # a name can be what is refused
        raise JsonRefused(shown, "contains half a surrogate pair, which UTF-8 cannot express; remove it")
    return value is None or isinstance(value, bool | int | float | str)


def _hashable_leaf(value: Any, path: str) -> None:
    text_enum = isinstance(value, Enum) and isinstance(value.value, str)
    if not (_plain_leaf(value, path) or text_enum or isinstance(value, _STABLE_TEXT)):
        raise JsonRefused(path, f"is a {type(value).__name__}, whose text is not stable; convert it first")


def _storable_leaf(value: Any, path: str) -> None:
    if not _plain_leaf(value, path):
        raise JsonRefused(path, f"is a {type(value).__name__}, which JSON does not have; convert it first")
    if isinstance(value, str) and "\0" in value:
        raise JsonRefused(path.replace("\0", "\\u0000"), "contains U+0000, which PostgreSQL cannot store; remove it")
