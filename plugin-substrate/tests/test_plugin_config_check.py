"""A configuration is checked in full before anything is started, whatever its schema tries."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_substrate import PluginConfigError
from plugin_substrate.config_check import DIALECT, checker_of, effective_config

SCHEMA: dict[str, Any] = {
    "$schema": DIALECT,
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {"enum": ["small", "large"]},
        "threshold": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
        "names": {"type": "array", "items": {"$ref": "#/$defs/name"}, "uniqueItems": True},
        "server": {
            "type": "object",
            "properties": {"port": {"type": "integer", "default": 80}, "token": {"type": "string", "writeOnly": True}},
            "required": ["host"],
        },
    },
    "$defs": {"name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5}},
}


def wrong(config: dict[str, Any], schema: dict[str, Any] = SCHEMA) -> PluginConfigError:
    with pytest.raises(PluginConfigError) as caught:
        effective_config("reader", schema, config)
    return caught.value


def test_defaults_stand_where_the_configuration_is_silent_also_below() -> None:
    assert effective_config("reader", SCHEMA, {"model": "small", "server": {"host": "x"}}) == {
        "model": "small",
        "threshold": 0.5,
        "server": {"host": "x", "port": 80},
    }


def test_every_violation_is_named_by_its_place() -> None:
    error = wrong({"threshold": 2, "names": ["ok", "Ü", "toolong", "ok"], "server": {"port": True}, "colour": 1})
    assert set(error.fields_invalid) == {
        "model",
        "threshold",
        "names",
        "names[1]",
        "names[2]",
        "server.host",
        "server.port",
        "colour",
    }
    assert "plugin 'reader' is wrong" in str(error)
    assert "server.host: is missing" in str(error)
    assert "colour: is no setting; there are: model, names, server, threshold" in str(error)


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({"model": "medium"}, ("model",)),
        ({"model": "small", "threshold": "0.5"}, ("threshold",)),
        ({"model": "small", "threshold": True}, ("threshold",)),
        ({"model": "small", "names": "x"}, ("names",)),
        ({"model": "small", "names": [1, 1.0]}, ("names", "names[0]", "names[1]")),
    ],
)
def test_types_ranges_choices_and_patterns_are_all_checked(config: dict[str, Any], places: tuple[str, ...]) -> None:
    assert tuple(sorted(set(wrong(config).fields_invalid))) == places


def test_a_value_that_is_not_for_showing_is_not_shown() -> None:
    error = wrong({"model": "small", "server": {"host": "x", "token": 12345678}})
    assert error.fields_invalid == ("server.token",)
    assert "12345678" not in str(error)


def test_unknown_keys_are_dropped_with_a_warning_when_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = effective_config("reader", SCHEMA, {"model": "small", "colour": 1}, strict=False)
    assert config == {"model": "small", "threshold": 0.5}
    assert "colour" in caplog.text
    with pytest.raises(PluginConfigError, match="threshold"):
        effective_config("reader", SCHEMA, {"model": "small", "threshold": 7}, strict=False)


def test_a_schema_that_says_what_else_may_stand_there_is_believed() -> None:
    open_schema = {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}}
    assert effective_config("reader", open_schema, {"b": 1}) == {"b": 1}
    assert wrong({"b": "x"}, open_schema).fields_invalid == ("b",)
    closed = {"properties": {"a": {}}, "patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False}
    assert wrong({"x-one": 1, "y": 1}, closed).fields_invalid == ("x-one", "y")
    assert effective_config("reader", closed, {"x-one": "1", "y": 1}, strict=False) == {"x-one": "1"}
    by_pattern = {"properties": {"a": {}}, "patternProperties": {"^x-": {"type": "string"}}}
    assert effective_config("reader", by_pattern, {"x-one": "1"}) == {"x-one": "1"}


def test_without_a_schema_any_json_object_is_a_configuration_and_nothing_else() -> None:
    assert effective_config("reader", {}, {"a": (1, 2)}) == {"a": [1, 2]}
    for value in (float("nan"), {1}, b"x"):
        assert "not JSON" in str(wrong({"a": value}, {}))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "number?"}, "'number?'"),
        ({"properties": []}, "properties"),
        ({"$ref": "https://example.org/schema.json"}, "leads to 'https://example.org/schema.json'"),
        ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "file:///etc/passwd"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "only https://json-schema.org/draft/2020-12"),
        ({"properties": {"a": {"pattern": "("}}}, "wrong pattern"),
        ({"patternProperties": {"x" * 2000: True}}, "2000 characters"),
        ({"unevaluatedProperties": False, "patternProperties": {"x": True}}, "cannot be used beside"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_its_reason(schema: dict[str, Any], reason: str) -> None:
    error = wrong({}, schema)
    assert "config_schema of plugin 'reader' cannot be used" in str(error)
    assert reason in str(error)


def doubling(levels: int) -> dict[str, Any]:
    """A schema of which each level is checked twice as often as the one above it."""
    both = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$schema": DIALECT, "$ref": "#/$defs/d0", "$defs": {**both, f"d{levels}": {"$schema": DIALECT}}}


@pytest.mark.parametrize(
    ("schema", "config", "reason"),
    [
        ({"properties": {"a": {"pattern": "^(a|a)*$"}}}, {"a": "a" * 5000 + "!"}, "takes longer than"),
        ({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 5000 + "!"}, "takes longer than"),
        ({"patternProperties": {"^(a|a)*$": False}}, {"a" * 5000 + "!": 1}, "takes longer than"),
        ({"properties": {"b": {}}, "patternProperties": {"^(a|a)*$": {}}}, {"a" * 5000 + "!": 1}, "takes longer than"),
        (
            {"properties": {"a": {"items": {"allOf": [{"pattern": f"^(a?){{{n}}}a*b|"} for n in range(90)]}}}},
            {"a": ["a" * 400] * 400},
            " longer than ",
        ),
        ({"$ref": "#"}, {}, "without end"),
        ({"$schema": DIALECT, "$ref": "#"}, {}, "without end"),
        ({"$ref": "#/$defs/nothing"}, {}, "refers to what it does not have"),
        (doubling(40), {}, "too involved"),
    ],
    ids=[
        "alternation",
        "nesting",
        "keys",
        "unknown keys",
        "many slow ones",
        "loop",
        "loop by dialect",
        "dangling",
        "doubling",
    ],
)
def test_a_schema_that_would_never_end_ends(schema: dict[str, Any], config: dict[str, Any], reason: str) -> None:
    assert reason in str(wrong(config, schema))


def test_a_list_of_many_objects_is_checked_for_repetitions_in_one_pass() -> None:
    schema = {"properties": {"a": {"uniqueItems": True}}}
    many = [{"n": number} for number in range(20_000)]
    effective_config("reader", schema, {"a": many})  # compared pair by pair, this runs into the test's time limit
    assert wrong({"a": [*many, {"n": 7.0}]}, schema).fields_invalid == ("a",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
keywords = st.sampled_from([
    "type", "properties", "items", "pattern", "enum", "default", "$ref", "$defs", "allOf", "minimum", "required",
    "patternProperties", "additionalProperties", "uniqueItems", "$schema", "$id", "unevaluatedProperties", "if", "not",
])  # fmt: skip
schemas = st.recursive(
    json_values, lambda inner: st.dictionaries(keywords, inner | json_values, max_size=5), max_leaves=12
)


@given(st.dictionaries(keywords, schemas, max_size=5), st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_any_schema_and_any_configuration_give_a_configuration_or_the_typed_error(
    schema: dict[str, Any], config: dict[str, Any]
) -> None:
    try:
        effective_config("reader", schema, config)
    except PluginConfigError:
        return


def test_a_schema_is_prepared_once() -> None:
    assert checker_of("reader", SCHEMA) is checker_of("other", dict(reversed(SCHEMA.items())))
