"""How argument and result values cross the border: the same value arrives, or a typed error names where it stands.

A value is its frame's first segment, as JSON, and the segments after it, which the JSON refers to. JSON's own types
(text, whole numbers of any size up to 4000 digits, finite floats, true, false, null, lists, objects with text keys)
stand for themselves. Everything else is an object with the key ``$``:

    {"$": "bytes", "segment": 0}        raw, in the frame's binary segments, counted after the first
    {"$": "tuple", "items": [...]}      {"$": "path", "text": "a/b"}
    {"$": "datetime", "text": ISO}      {"$": "date", "text": ISO}      a time zone arrives as its fixed offset
    {"$": "decimal", "text": "1.50"}    {"$": "uuid", "text": "..."}
    {"$": "input_file" | "output_file", "name": ..., "mime_type": ..., "segment": 1}
    {"$": "dict", "items": {...}}       a user's own object that has the key "$"
    {"$": "array", "dtype": "<f8", "shape": [2, 3], "segment": 2}       a numpy array in C order, where numpy is there

numpy is never imported for this: whoever has an array has numpy too. Arrays of numbers, booleans and times cross, of
objects, records and text do not; a receiver without numpy refuses one, naming its place.

Types are exact: a subclass (an enum member, a numpy scalar) would arrive as something else, so it is refused, and the
error says what to convert.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from plugin_substrate.errors import ProtocolError, WireValueError
from plugin_substrate.interface import InputFile, OutputFile
from plugin_substrate.worker.arrays import array_from, array_parts, is_array
from plugin_substrate.worker.frames import parse_json, to_json
from plugin_substrate.worker.parked import Parked, Segment

if TYPE_CHECKING:  # each takes a supervisor's start a millisecond or two, and not every plugin uses them
    from datetime import date, datetime
    from decimal import Decimal
    from pathlib import Path
    from uuid import UUID

MAX_DEPTH = 64
#: More than this is not a value but data, and belongs into bytes or files: reading JSON holds up everything else.
MAX_JSON_BYTES = 8 << 20
_MAX_INTEGER = 10**4000  # the interpreter's own limit for turning text into a number is 4300 digits

_TAG = "$"

Encoder = Callable[[Any, list[bytes], int], Any]


def pack_value(value: Any, path: str) -> list[bytes]:
    """Return the segments that stand for ``value``; a `WireValueError` names what cannot cross, see `encode_value`."""
    segments: list[bytes] = []
    encoded = encode_value(value, path, segments)
    raw = to_json(encoded)
    if len(raw) > MAX_JSON_BYTES:
        reason = f"{len(raw)} bytes of JSON are over the limit of {MAX_JSON_BYTES}; use bytes or files for large data"
        raise WireValueError(f"{path}: {reason}", path=path)
    return [raw, *segments]


def unpack_value(segments: Sequence[Segment], path: str = "value") -> Any:
    """Return the value that `pack_value` was given; anything malformed is a `ProtocolError`.

    An array where numpy is not imported is a `WireValueError` that names its place.
    """
    if not segments or isinstance(segments[0], Parked) or len(segments[0]) > MAX_JSON_BYTES:
        raise ProtocolError("a frame has no value, or one over the limit")
    encoded = parse_json(segments[0])
    try:
        return decode_value(encoded, segments[1:])
    except ImportError as error:
        place = (path + (_place_of_array(encoded) or "")).removeprefix(".")
        raise WireValueError(f"{place}: an array has arrived, but {error}", path=place) from error


def encode_value(value: Any, path: str, segments: list[bytes]) -> Any:
    """Return ``value`` as JSON, appending its binary parts to ``segments``; a `WireValueError` names what cannot cross.

    ``path`` is what the value is called in errors: ``config`` or ``result``, empty for a dict that is only a wrapper.
    """
    try:
        return _encode(value, segments, 0)
    except _RefusedError as refused:
        path = (path + "".join(reversed(refused.steps))).removeprefix(".")
        raise WireValueError(f"{path}: {refused}", path=path) from None


def decode_value(value: Any, segments: Sequence[Segment]) -> Any:
    """Return the value that `encode_value` was given; a malformed one is a `ProtocolError`.

    Each segment is used exactly once, so a value is never larger than the frame it came in.
    """
    unused = dict(enumerate(segments))
    try:
        decoded = _decode(value, unused, 0)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ProtocolError(f"a value in a frame is malformed: {error!r:.200}") from error
    if unused:
        raise ProtocolError("a frame has a binary segment that its value does not use")
    return decoded


class _RefusedError(Exception):
    """Carries the reason up; each level adds its step, so that no path is built for values that are fine."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.steps: list[str] = []


def _encode(value: Any, segments: list[bytes], depth: int) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if depth > MAX_DEPTH:
        raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels")
    encoder = _ENCODERS.get(type(value)) or _RARE_ENCODERS.get(_rare_name(value))
    if encoder is not None:
        return encoder(value, segments, depth)
    if _is_a(value, "pathlib", "PurePath"):
        return {_TAG: "path", "text": str(value)}
    if is_array(value):
        return _array(value, segments)
    raise _type_refused(value)


def _rare_name(value: object) -> str:
    """Return the name of a type whose module nobody else may need; it can have a value only where that is imported."""
    cls = type(value)
    module = sys.modules.get(cls.__module__)
    known = cls.__module__ in _RARE_MODULES and getattr(module, cls.__name__, None) is cls
    return cls.__name__ if known else ""


def _is_a(value: object, module: str, name: str) -> bool:
    """Whether a value is of a type or derives from it; it can only where the type's module is imported."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _int(value: int, _segments: list[bytes], _depth: int) -> int:
    if -_MAX_INTEGER < value < _MAX_INTEGER:
        return value
    raise _RefusedError("a whole number of more than 4000 digits cannot cross")


def _float(value: float, _segments: list[bytes], _depth: int) -> float:
    if math.isfinite(value):
        return value
    raise _RefusedError(f"{value} is not a finite number; use None for a missing one")


def _items(values: Iterable[Any], segments: list[bytes], depth: int) -> list[Any]:
    items: list[Any] = []
    try:
        for value in values:
            items.append(_encode(value, segments, depth + 1))  # noqa: PERF401 - its length is the failing index
    except _RefusedError as refused:
        refused.steps.append(f"[{len(items)}]")
        raise
    return items


def _dict(value: dict[Any, Any], segments: list[bytes], depth: int) -> dict[str, Any]:
    items = {}
    for key, item in value.items():
        if type(key) is not str:
            raise _RefusedError(f"the key {key!r:.80} is of type {type(key).__name__}; keys must be text")
        try:
            items[key] = _encode(item, segments, depth + 1)
        except _RefusedError as refused:
            refused.steps.append(_step(key))
            raise
    return {_TAG: "dict", "items": items} if _TAG in items else items


def _step(key: str) -> str:
    return f".{key}" if key.isidentifier() else f"[{key!r:.80}]"


def _decimal(value: Decimal, _segments: list[bytes], _depth: int) -> dict[str, Any]:
    if value.is_finite():
        return {_TAG: "decimal", "text": str(value)}
    raise _RefusedError(f"Decimal({str(value)!r}) is not a finite number")


def _file(value: InputFile | OutputFile, segments: list[bytes], _depth: int) -> dict[str, Any]:
    tag = "input_file" if type(value) is InputFile else "output_file"
    return {_TAG: tag, "name": value.name, "mime_type": value.mime_type, "segment": _segment(value.data, segments)}


def _array(value: Any, segments: list[bytes]) -> dict[str, Any]:
    try:
        dtype, shape, data = array_parts(value)
    except ValueError as error:
        raise _RefusedError(str(error)) from error
    return {_TAG: "array", "dtype": dtype, "shape": shape, "segment": _segment(data, segments)}


def _segment(data: bytes, segments: list[bytes]) -> int:
    segments.append(data)
    return len(segments) - 1


def _type_refused(value: object) -> _RefusedError:
    cls = type(value)
    allowed = (str, int, float, bytes, list, tuple, dict)
    base = next((known.__name__ for known in allowed if isinstance(value, known)), "")
    rare = (("datetime", "datetime"), ("datetime", "date"), ("decimal", "Decimal"))
    base = base or next((name for module, name in rare if _is_a(value, module, name)), "")
    remedy = f"convert it, for example with {base}(value)" if base else "convert it to a value that can"
    return _RefusedError(f"{cls.__module__}.{cls.__qualname__} cannot cross the process border; {remedy}")


_ENCODERS: dict[type, Encoder] = {
    int: _int,
    float: _float,
    list: _items,
    dict: _dict,
    InputFile: _file,
    OutputFile: _file,
    tuple: lambda value, segments, depth: {_TAG: "tuple", "items": _items(value, segments, depth)},
    bytes: lambda value, segments, _: {_TAG: "bytes", "segment": _segment(value, segments)},
}
_RARE_MODULES = ("datetime", "decimal", "uuid")
_RARE_ENCODERS: dict[str, Encoder] = {
    "datetime": lambda value, _segments, _depth: {_TAG: "datetime", "text": value.isoformat()},
    "date": lambda value, _segments, _depth: {_TAG: "date", "text": value.isoformat()},
    "Decimal": _decimal,
    "UUID": lambda value, _segments, _depth: {_TAG: "uuid", "text": str(value)},
}


def _decode(value: Any, segments: dict[int, Segment], depth: int) -> Any:
    if depth > MAX_DEPTH + 1:  # a text may stand below the deepest list
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_decode(item, segments, depth + 1) for item in value]
    if not isinstance(value, dict):
        if type(value) is float and not math.isfinite(value):
            raise ValueError("a number beyond every float")  # which is what json makes of 1e999
        return value
    tag = value.get(_TAG)
    if _TAG not in value:
        return {key: _decode(item, segments, depth + 1) for key, item in value.items()}
    if tag == "dict" and isinstance(value["items"], dict):
        return {key: _decode(item, segments, depth + 1) for key, item in value["items"].items()}
    if tag == "tuple" and isinstance(value["items"], list):
        return tuple(_decode(item, segments, depth + 1) for item in value["items"])
    return _decode_leaf(tag, value, segments)


def _decode_leaf(tag: object, value: dict[str, Any], segments: dict[int, Segment]) -> Any:
    if tag in ("bytes", "input_file", "output_file", "array"):
        segment = segments.pop(value["segment"])
        data = segment.read() if isinstance(segment, Parked) else segment
        if tag == "bytes":
            return data
        if tag == "array":
            return array_from(value["dtype"], value["shape"], data)
        kind = InputFile if tag == "input_file" else OutputFile
        return kind(value["name"], value["mime_type"], data)
    text = value["text"]
    if isinstance(tag, str) and tag in _PARSERS and isinstance(text, str):
        return _PARSERS[tag](text)
    raise ValueError(f"unknown tag {tag!r:.80}")


def _place_of_array(encoded: Any) -> str | None:
    """Return the steps from an encoded value to the first array in it, None when it has none."""
    if isinstance(encoded, dict) and encoded.get(_TAG) in ("tuple", "dict"):
        encoded = encoded["items"]
    elif isinstance(encoded, dict) and encoded.get(_TAG) == "array":
        return ""
    steps: Iterable[tuple[str, Any]] = ()
    if isinstance(encoded, dict):
        steps = ((_step(key), item) for key, item in encoded.items())
    elif isinstance(encoded, list):
        steps = ((f"[{index}]", item) for index, item in enumerate(encoded))
    found = ((step, _place_of_array(item)) for step, item in steps)
    return next((step + rest for step, rest in found if rest is not None), None)


def _finite_decimal(text: str) -> Decimal:
    from decimal import Decimal

    value = Decimal(text)
    if not value.is_finite():
        raise ValueError(f"{value} is not a finite number")
    return value


def _datetime(text: str) -> datetime:
    from datetime import datetime

    return datetime.fromisoformat(text)


def _date(text: str) -> date:
    from datetime import date

    return date.fromisoformat(text)


def _path(text: str) -> Path:
    from pathlib import Path

    return Path(text)


def _uuid(text: str) -> UUID:
    from uuid import UUID

    return UUID(text)


_PARSERS: dict[str, Callable[[str], Any]] = {
    "path": _path,
    "datetime": _datetime,
    "date": _date,
    "decimal": _finite_decimal,
    "uuid": _uuid,
}
