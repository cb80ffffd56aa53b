"""Configurations as dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest
from plugin_substrate import PluginConfigError
from plugin_substrate.config_check import effective_config
from plugin_substrate.validation import (
    SCHEMA_DESC,
    SCHEMA_ENUM,
    SCHEMA_MAX,
    SCHEMA_MAX_LEN,
    SCHEMA_MIN,
    SCHEMA_MIN_LEN,
    SCHEMA_PATTERN,
    SCHEMA_TITLE,
    config_to_dict,
    dataclass_to_jsonschema,
    dict_to_config,
    extract_defaults,
    validate_config,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Server:
    host: str
    port: int = field(default=80, metadata={SCHEMA_MIN: 1})


@dataclass
class Settings:
    """What the reader reads with.

    And more.
    """

    model: str = field(default="small", metadata={SCHEMA_TITLE: "Model", SCHEMA_ENUM: ["small", "large"]})
    threshold: float = field(default=0.5, metadata={SCHEMA_MIN: 0, SCHEMA_MAX: 1, SCHEMA_DESC: "From 0 to 1"})
    name: str = field(default="ab", metadata={SCHEMA_PATTERN: "[a-z]+$", SCHEMA_MIN_LEN: 2, SCHEMA_MAX_LEN: 4})
    fast: bool = field(default=True, metadata={SCHEMA_MIN: 5})
    limit: int | None = None
    names: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    mode: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    server: Server = field(default_factory=lambda: Server("here"))
    others: list[Server] = field(default_factory=list)
    strange: bytes | None = None
    anything: Any = None


def test_a_dataclass_is_described_as_a_schema_that_its_own_defaults_keep() -> None:
    schema = dataclass_to_jsonschema(Settings)
    assert {key: schema[key] for key in ("name", "title", "description", "type")} == {
        "name": "Settings",
        "title": "Settings",
        "description": "What the reader reads with.",
        "type": "object",
    }
    properties = schema["properties"]
    assert properties["model"] == {"type": "string", "title": "Model", "enum": ["small", "large"], "default": "small"}
    assert properties["threshold"] == {
        "type": "number",
        "description": "From 0 to 1",
        "minimum": 0,
        "maximum": 1,
        "default": 0.5,
    }
    assert properties["limit"] == {"type": ["integer", "null"], "default": None}
    assert properties["names"] == {"type": "array", "items": {"type": "string"}, "default": []}
    assert properties["mode"] == {"enum": ["a", "b"], "default": "a"}
    assert properties["colour"] == {"enum": ["red", "blue"], "default": "red"}
    assert properties["server"]["properties"]["port"] == {"type": "integer", "minimum": 1, "default": 80}
    assert properties["strange"]["type"] == ["string", "null"]
    assert properties["anything"] == {"default": None}
    assert "required" not in schema
    assert effective_config("reader", schema, {}) == extract_defaults(Settings)


def test_defaults_are_json_values_without_what_has_none() -> None:
    assert extract_defaults(Server) == {"port": 80}
    assert extract_defaults(Settings)["server"] == {"host": "here", "port": 80}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "medium"}, "model: 'medium' is none of"),
        ({"threshold": 1.5}, "threshold: 1.5 is more than 1"),
        ({"threshold": -1}, "threshold: -1 is less than 0"),
        ({"name": "1ab"}, "name: '1ab' does not match"),
        ({"name": "a"}, "name: it has 1 characters, fewer than 2"),
        ({"name": "abcde"}, "name: it has 5 characters, more than 4"),
        ({"server": Server("x", 0)}, "server.port: 0 is less than 1"),
        ({"model": "medium", "threshold": 7}, "model: 'medium' is none of"),
    ],
)
def test_the_first_broken_rule_is_told(changes: dict[str, Any], message: str) -> None:
    valid, told = validate_config(Settings(**changes))
    assert not valid
    assert told.startswith(message)


def test_true_and_false_have_no_bounds_and_a_missing_value_no_rules() -> None:
    assert validate_config(Settings(fast=True, limit=None)) == (True, "")


def test_a_dict_becomes_an_instance_with_what_is_below_it() -> None:
    config = dict_to_config(
        Settings, {"server": {"host": "there"}, "others": [{"host": "a", "port": 1}], "colour": "blue"}
    )
    assert config.server == Server("there")
    assert config.others == [Server("a", 1)]
    assert config.colour is Colour.BLUE
    assert dict_to_config(Settings, config_to_dict(config)) == config
    assert dict_to_config(Settings, None) == Settings()


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        ({"colour2": 1, "x": 2}, ("colour2", "x"), "Settings: has no colour2, x; it has: model,"),
        ({"server": {}}, ("host",), "Server: lacks host"),
        ({"threshold": 7}, ("threshold",), "threshold: 7 is more than 1"),
        ({"colour": "green"}, (), "'green' is none of"),
    ],
)
def test_what_cannot_become_one_is_a_typed_error_that_names_it(
    data: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PluginConfigError, match=r".") as caught:
        dict_to_config(Settings, data, validate=True)
    assert caught.value.fields_invalid == names
    assert message in str(caught.value)
    assert caught.value.config_class


def test_unknown_keys_are_dropped_when_not_strict() -> None:
    assert dict_to_config(Settings, {"x": 1, "server": {"host": "a", "y": 2}}, strict=False).server == Server("a")


def test_what_is_no_dataclass_is_a_type_error() -> None:
    for use in (dataclass_to_jsonschema, extract_defaults, lambda cls: dict_to_config(cls, {})):
        with pytest.raises(TypeError, match="dataclass"):
            use(int)
