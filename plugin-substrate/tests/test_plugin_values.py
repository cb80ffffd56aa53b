from __future__ import annotations

import json
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import InputFile, OutputFile, PluginFatalError, PluginInputError, ProtocolError, WireValueError
from plugin_substrate.worker.failures import describe_error, restore_error
from plugin_substrate.worker.frames import FrameDecoder, encode_frame
from plugin_substrate.worker.values import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    decode_value,
    encode_value,
    pack_value,
    unpack_value,
)

fixed_offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
file_names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=20)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**64, max_value=2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.none() | fixed_offsets)
    | st.dates()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.uuids()
    | st.lists(file_names, min_size=1, max_size=3).map(lambda parts: Path(*parts))
    | st.builds(OutputFile, file_names, st.just("text/html"), st.binary())
    | st.builds(InputFile, file_names, st.just("application/json"), st.binary())
)
keys = st.text() | st.sampled_from(["$", "$bytes", "items", "segment", "text"])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=15,
)


def through_a_frame(value: Any) -> Any:
    (frame,) = FrameDecoder().feed(b"".join(encode_frame({}, pack_value(value, "value"))))
    return unpack_value(frame.segments)


def same(left: Any, right: Any) -> bool:
    """Equality that also tells 1 from True, 1.0 from 1 and a list from a tuple."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, Decimal | float):
        return repr(left) == repr(right)
    return bool(left == right)


@given(values)
def test_every_allowed_value_arrives_as_the_same_value_of_the_same_type(value: Any) -> None:
    assert same(through_a_frame(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {"$": "bytes", "segment": 0},
        {"$": "dict", "items": {"$": {"$": 1}}},
        {"a": {"$": None}},
        ({"$": "tuple", "items": []},),
    ],
)
def test_an_object_that_looks_like_a_tag_survives(value: Any) -> None:
    assert through_a_frame(value) == value


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"rows": [1, 2, 3, {"weight": float("nan")}]}, "value.rows[3].weight"),
        ([float("inf")], "value[0]"),
        ({"a b": ({"c": {1, 2}},)}, "value['a b'][0].c"),
        ({"total": Decimal("NaN")}, "value.total"),
        ({"x": {1: "one"}}, "value.x"),
        ([Colour.RED], "value[0]"),
        (OrderedDict(a=1), "value"),
        ([object()], "value[0]"),
        ([bytearray(b"x")], "value[0]"),
        ([timedelta(1)], "value[0]"),
        ([10**5000], "value[0]"),
    ],
)
def test_what_cannot_cross_is_an_error_that_names_its_place(value: Any, path: str) -> None:
    with pytest.raises(WireValueError) as caught:
        encode_value(value, "value", [])
    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_value_nested_too_deep_or_in_itself_is_refused_not_a_crash() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(WireValueError, match=f"deeper than {MAX_DEPTH}"):
        encode_value(circle, "result", [])


def test_a_value_over_the_limit_is_refused_on_both_sides_bytes_are_not() -> None:
    with pytest.raises(WireValueError, match="use bytes or files"):
        pack_value("x" * MAX_JSON_BYTES, "result")
    with pytest.raises(ProtocolError):
        unpack_value([b" " * MAX_JSON_BYTES + b"1"])
    assert through_a_frame(b"x" * MAX_JSON_BYTES) == b"x" * MAX_JSON_BYTES


@pytest.mark.parametrize("segments", [[], [b""], [b"{"], [b"\xff"], [b"1", b"unused"], [b"NaN"], [b"1e999"]])
def test_segments_that_hold_no_value_are_a_protocol_error(segments: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        unpack_value(segments)


def test_a_value_at_the_deepest_allowed_level_arrives() -> None:
    value: Any = "bottom"
    for _ in range(MAX_DEPTH):
        value = [value]
    assert through_a_frame([value][0]) == value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("$"), inner, max_size=3),
)
tags = st.sampled_from(
    ["bytes", "tuple", "dict", "path", "datetime", "date", "decimal", "uuid", "input_file", "output_file", "array"]
)
forged = st.fixed_dictionaries(
    {"$": tags | json_values},
    optional=dict.fromkeys(("segment", "items", "text", "name", "mime_type", "dtype", "shape"), json_values),
)


@given(forged | json_values, st.lists(st.binary(), max_size=2))
def test_a_forged_value_is_decoded_or_refused_as_a_protocol_error(value: Any, segments: list[bytes]) -> None:
    try:
        decode_value(value, segments)
    except ProtocolError:
        return


def test_known_leaves_look_as_documented() -> None:
    segments: list[bytes] = []
    moment = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)
    value = [moment, date(2024, 2, 29), UUID(int=1), Path("a/b"), Decimal("1.50"), (b"raw",)]
    assert json.loads(json.dumps(encode_value(value, "value", segments))) == [
        {"$": "datetime", "text": "2024-02-29T12:00:00+00:00"},
        {"$": "date", "text": "2024-02-29"},
        {"$": "uuid", "text": "00000000-0000-0000-0000-000000000001"},
        {"$": "path", "text": "a/b"},
        {"$": "decimal", "text": "1.50"},
        {"$": "tuple", "items": [{"$": "bytes", "segment": 0}]},
    ]
    assert segments == [b"raw"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\0", "line\nbreak", "x" * 256])
def test_a_file_name_that_is_a_path_or_a_trick_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"OutputFile\.name"):
        OutputFile(name, "text/plain", b"")


def test_a_plugins_own_subclass_of_an_error_arrives_as_its_nearest_known_class() -> None:
    class TooManyRowsError(PluginInputError):
        pass

    restored = restore_error(describe_error(TooManyRowsError("9 rows", fields_invalid=["rows"])))
    assert type(restored) is PluginInputError
    assert (str(restored), restored.fields_invalid, restored.retriable) == ("9 rows", ("rows",), True)


@given(
    st.dictionaries(st.sampled_from(["class", "message", "fields", "repr", "traceback"]), json_values)
    | st.fixed_dictionaries(
        {
            "class": st.sampled_from(
                ["PluginInputError", "PluginTimeoutError", "PluginResourceError", "WorkerDiedError"]
            ),
            "message": st.text(),
            "fields": st.dictionaries(
                st.sampled_from(
                    ["retriable", "fields_invalid", "resource_shortfall", "timeout_seconds", "outcome_known"]
                ),
                json_values,
            ),
        }
    )
)
def test_a_forged_error_still_becomes_a_typed_one_and_never_more_than_a_plugin_may_say(data: dict[str, Any]) -> None:
    restored = restore_error(data)
    assert restored.outcome_known
    assert type(restored).__name__ != "WorkerDiedError"


def test_an_unknown_error_class_becomes_fatal() -> None:
    assert type(restore_error({"class": "KeyboardInterrupt", "message": "x"})) is PluginFatalError
