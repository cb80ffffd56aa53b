"""Configurations as dataclasses: to and from dicts, checked, and as a JSON Schema.

Standard library only, as plugins use it. What a field must be stands in its metadata, under these names:

    threshold: float = field(default=0.5, metadata={SCHEMA_TITLE: "Threshold", SCHEMA_MIN: 0, SCHEMA_MAX: 1})
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from plugin_substrate.errors import PluginConfigError

SCHEMA_TITLE = "title"
SCHEMA_DESC = "description"
SCHEMA_MIN = "minimum"
SCHEMA_MAX = "maximum"
SCHEMA_ENUM = "enum"
SCHEMA_MIN_LEN = "minLength"
SCHEMA_MAX_LEN = "maxLength"
SCHEMA_PATTERN = "pattern"
SCHEMA_FORMAT = "format"

_KEYS = (
    SCHEMA_TITLE, SCHEMA_DESC, SCHEMA_MIN, SCHEMA_MAX, SCHEMA_ENUM, SCHEMA_MIN_LEN, SCHEMA_MAX_LEN, SCHEMA_PATTERN,
    SCHEMA_FORMAT,
)  # fmt: skip
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
_ARRAYS = (list, tuple, set, frozenset)

Config = TypeVar("Config")


def dataclass_to_jsonschema(cls: type) -> dict[str, Any]:
    """Return the schema of a dataclass: its fields with their types, rules and defaults; none of them is required.

    What the annotation does not say in JSON's words is a string. A default that is made by a factory is called once.
    """
    _check_dataclass(cls)
    hints = get_type_hints(cls)
    described = (cls.__doc__ or "").strip()
    return {
        "name": cls.__name__,
        "title": getattr(cls, "__schema_title__", cls.__name__),
        "description": getattr(cls, "__schema_description__", described.split("\n")[0]),
        "type": "object",
        "properties": {entry.name: _property(entry, hints[entry.name]) for entry in fields(cls)},
    }


def extract_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as JSON values, without the fields that have none."""
    _check_dataclass(cls)
    return dict(_defaults(cls))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass instance as a dict, also below."""
    if isinstance(config, type):
        raise TypeError(f"a configuration is an instance of a dataclass, not the class {config.__name__}")
    return asdict(config)


def dict_to_config(
    cls: type[Config], data: Mapping[str, Any] | None, validate: bool = False, strict: bool = True
) -> Config:
    """Return an instance made of a dict, with dataclasses below it too.

    A missing field without a default, an unknown key (dropped unless ``strict``) and, with ``validate``, a value that
    breaks its field's rules are a `PluginConfigError` that names them.
    """
    _check_dataclass(cls)
    given = dict(data or {})
    known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type] # it is a dataclass
    unknown = sorted(set(given) - set(known))
    if unknown and strict:
        raise _wrong(cls, f"has no {', '.join(unknown)}; it has: {', '.join(known) or 'nothing'}", unknown)
    missing = [name for name, entry in known.items() if name not in given and entry.init and not _has_default(entry)]
    if missing:
        raise _wrong(cls, f"lacks {', '.join(missing)}", missing)
    hints = get_type_hints(cls)
    values = {
        name: _converted(hints[name], given[name], validate, strict)
        for name, entry in known.items()
        if name in given and entry.init
    }
    config = cls(**values)
    if validate:
        valid, message = validate_config(config)
        if not valid:
            raise _wrong(cls, message, [message.partition(":")[0]])
    return config


def validate_config(config: Any) -> tuple[bool, str]:
    """Return whether an instance keeps the rules in its fields' metadata, and the first violation if not.

    A pattern has to match from the start on. Bounds are for numbers, which true and false are not. ``format`` is not
    enforced, and types are not checked: a host does that by the schema.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        problem = _broken_rule(entry.metadata, value)
        if problem:
            return False, f"{entry.name}: {problem}"
        if is_dataclass(value) and not isinstance(value, type):
            valid, message = validate_config(value)
            if not valid:
                return False, f"{entry.name}.{message}"
    return True, ""


def _broken_rule(rules: Mapping[Any, Any], value: Any) -> str:
    """Return what is wrong with a value, an empty text when nothing is."""
    if value is None:
        return ""
    if SCHEMA_ENUM in rules and value not in rules[SCHEMA_ENUM]:
        return f"{value!r:.80} is none of {rules[SCHEMA_ENUM]}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if SCHEMA_MIN in rules and value < rules[SCHEMA_MIN]:
            return f"{value} is less than {rules[SCHEMA_MIN]}"
        if SCHEMA_MAX in rules and value > rules[SCHEMA_MAX]:
            return f"{value} is more than {rules[SCHEMA_MAX]}"
    if isinstance(value, str):
        if SCHEMA_MIN_LEN in rules and len(value) < rules[SCHEMA_MIN_LEN]:
            return f"it has {len(value)} characters, fewer than {rules[SCHEMA_MIN_LEN]}"
        if SCHEMA_MAX_LEN in rules and len(value) > rules[SCHEMA_MAX_LEN]:
            return f"it has {len(value)} characters, more than {rules[SCHEMA_MAX_LEN]}"
        if SCHEMA_PATTERN in rules and not re.match(rules[SCHEMA_PATTERN], value):
            return f"{value!r:.80} does not match {rules[SCHEMA_PATTERN]!r}"
    return ""


def _property(entry: Field[Any], hint: Any) -> dict[str, Any]:
    schema = _schema_of(hint)
    schema |= {key: entry.metadata[key] for key in _KEYS if key in entry.metadata}
    if _has_default(entry):
        schema["default"] = _json(_default(entry))
    return schema


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return _optional([argument for argument in arguments if argument is not types.NoneType], arguments)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in _ARRAYS:
        items = [argument for argument in arguments if argument is not ...]
        return {"type": "array", "items": _schema_of(items[0])} if len(set(items)) == 1 else {"type": "array"}
    if hint is Any:
        return {}
    if isinstance(origin, type):
        if is_dataclass(origin):
            return dataclass_to_jsonschema(origin)
        if issubclass(origin, Enum):
            return {"enum": [member.value for member in origin]}
    return {"type": _TYPES.get(origin, "string")}


def _optional(others: list[Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_schema_of(other) for other in others]
    if len(schemas) > 1:
        return {"anyOf": [*schemas, *([{"type": "null"}] if len(others) < len(arguments) else [])]}
    (schema,) = schemas
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"enum": [*schema["enum"], None]} if "enum" in schema else schema


def _converted(hint: Any, value: Any, validate: bool, strict: bool) -> Any:
    """Return a value for a field: a dict becomes the dataclass that the annotation names, a list one of them."""
    candidates = [argument for argument in get_args(hint) if argument is not types.NoneType]
    if get_origin(hint) in (Union, types.UnionType) and len(candidates) == 1:
        return _converted(candidates[0], value, validate, strict)
    if isinstance(value, dict) and isinstance(hint, type) and is_dataclass(hint):
        return dict_to_config(hint, value, validate, strict)
    if get_origin(hint) in _ARRAYS and isinstance(value, list) and len(candidates) == 1:
        return [_converted(candidates[0], item, validate, strict) for item in value]
    if isinstance(hint, type) and issubclass(hint, Enum) and not isinstance(value, hint):
        try:
            return hint(value)
        except ValueError:
            raise PluginConfigError(
                f"{value!r:.80} is none of {[member.value for member in hint]}", config_class=hint.__name__
            ) from None
    return value


def _defaults(cls: Any) -> Iterator[tuple[str, Any]]:
    for entry in fields(cls):
        if _has_default(entry):
            yield entry.name, _json(_default(entry))


def _has_default(entry: Field[Any]) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _json(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _check_dataclass(cls: type) -> None:
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise TypeError(f"a configuration is described by a dataclass, not by {cls!r:.80}")


def _wrong(cls: type, problem: str, names: list[str]) -> PluginConfigError:
    return PluginConfigError(f"{cls.__name__}: {problem}", fields_invalid=names, config_class=cls.__name__)
