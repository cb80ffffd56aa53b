"""Checks a plugin's configuration against its JSON Schema, in full, before anything is started for it.

The schema was written by the plugin, so it is foreign: references stay inside it, nothing is fetched, a pattern has a
time limit, and the whole check has a limit of steps. A schema that does not keep to that is refused, never skipped.
Needs the ``host`` extra; a plugin without a schema does not.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from plugin_substrate.errors import PluginConfigError
from plugin_substrate.schema_keywords import Budget, TooMuchError, bounded_validator

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MAX_PATTERN_CHARACTERS = 1000
MAX_VIOLATIONS = 100
MAX_CONFIG_BYTES = 1 << 20

# These look again at what other keywords did, by ways of the library's own, which take no steps and no limits of ours.
_LOOKING_BACK = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_UNCOUNTED_BESIDE = frozenset({"$ref", "$dynamicRef", "patternProperties"})

_logger = logging.getLogger(__name__)


def effective_config(
    plugin_name: str, schema: Mapping[str, Any], config: Mapping[str, Any], *, strict: bool = True
) -> dict[str, Any]:
    """Return the configuration with the schema's defaults where it is silent.

    Everything that is wrong with it is one `PluginConfigError`, whose ``fields_invalid`` are the places. A top-level
    key that the schema does not know is wrong too, unless ``strict`` is false: then it is dropped, with a warning.
    """
    given = _plain(plugin_name, config)
    if not schema:
        return given
    checker = checker_of(plugin_name, schema)
    unknown = checker.unknown_keys(given)
    if unknown and not strict:
        _logger.warning("plugin %s has no setting %s: dropped", plugin_name, ", ".join(unknown))
        given = {key: value for key, value in given.items() if key not in unknown}
        unknown = []
    whole = with_defaults(schema, given)
    violations = [(key, checker.unknown_text()) for key in unknown]
    violations += [found for found in checker.violations(whole) if found[0] not in unknown]
    violations.sort()
    if violations:
        raise PluginConfigError(
            f"the configuration of plugin {plugin_name!r} is wrong: "
            + "; ".join(f"{place or 'it'}: {reason}" for place, reason in violations),
            fields_invalid=[place for place, _ in violations],
        )
    return whole


def with_defaults(schema: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with the defaults of the properties it leaves out, also in objects below it."""
    properties = schema.get("properties")
    whole = dict(config)
    for name, below in properties.items() if isinstance(properties, dict) else ():
        if not isinstance(below, dict):
            continue  # true and false are schemas too
        if name not in whole and "default" in below:
            whole[name] = copy.deepcopy(below["default"])
        elif isinstance(whole.get(name), dict):
            whole[name] = with_defaults(below, whole[name])
    return whole


def checker_of(plugin_name: str, schema: Mapping[str, Any]) -> SchemaChecker:
    """Return what checks by a schema; one that cannot be used is a `PluginConfigError` that says why."""
    try:
        return _checker(json.dumps(schema, sort_keys=True, allow_nan=False))
    except (_RefusedError, TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise PluginConfigError(
            f"the config_schema of plugin {plugin_name!r} cannot be used: {reason}", fields_invalid=["config_schema"]
        ) from error


class SchemaChecker:
    """A schema that may be used, ready to check."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._bounded = _without_dialect(schema)
        _refuse_what_is_unbounded(schema)
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise _RefusedError(f"{_place(error.absolute_path) or 'it'}: {error.message[:200]}") from error

    def violations(self, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return every violation, as place and reason."""
        from referencing.exceptions import Unresolvable

        found: dict[tuple[str, str], None] = {}
        try:
            for error in bounded_validator(self._bounded, Budget()).iter_errors(config):
                found[_violation(error)] = None
                if len(found) >= MAX_VIOLATIONS:
                    break
        except TooMuchError as error:
            found["", str(error)] = None
        except RecursionError:
            found["", "the schema refers to itself without end"] = None
        except Unresolvable as error:
            found["", f"the schema refers to what it does not have: {error.ref!r:.80}"] = None
        return sorted(found)

    def unknown_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Return the top-level keys that no property and no pattern of the schema names.

        Those that no pattern can be asked about in time are not among them: `violations` says so.
        """
        schema, budget = self._schema, Budget()
        properties = schema.get("properties")
        open_end = schema.get("additionalProperties", schema.get("unevaluatedProperties", False))
        if not isinstance(properties, dict) or open_end is not False:
            return []  # it says itself what else may stand there, and is believed
        patterns = schema.get("patternProperties", {})
        others = [key for key in config if key not in properties]
        try:
            return sorted(key for key in others if not any(budget.found(pattern, key) for pattern in patterns))
        except TooMuchError:
            return []

    def unknown_text(self) -> str:
        """Return why an unknown key is wrong, naming those there are."""
        return f"is no setting; there are: {', '.join(sorted(self._schema['properties'])) or 'none'}"


class _RefusedError(Exception):
    """The schema cannot be used; the text says why."""


@lru_cache(maxsize=64)
def _checker(schema_text: str) -> SchemaChecker:
    return SchemaChecker(json.loads(schema_text))


def _plain(plugin_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration of JSON values; tuples count as lists, anything else is a `PluginConfigError`."""
    try:
        text = json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginConfigError(f"the configuration of plugin {plugin_name!r} is not JSON: {error}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise PluginConfigError(
            f"the configuration of plugin {plugin_name!r} has {len(text)} bytes, more than {MAX_CONFIG_BYTES}"
        )
    plain: dict[str, Any] = json.loads(text)
    return plain


def _refuse_what_is_unbounded(schema: Mapping[str, Any]) -> None:
    """Walk all of a schema, data in it included: too strict for none that is meant."""
    used: set[str] = set()
    for place, node in _objects(schema, "config_schema"):
        used |= node.keys()
        dialect = node.get("$schema")
        if isinstance(dialect, str) and dialect.rstrip("#") != DIALECT:
            raise _RefusedError(f"{place}.$schema is {dialect!r:.80}; only {DIALECT} is understood")
        for key in ("$ref", "$dynamicRef"):
            target = node.get(key)
            if isinstance(target, str) and not target.startswith("#"):
                raise _RefusedError(
                    f"{place}.{key} leads to {target!r:.80}; only places inside the schema are followed"
                )
        patterns = node.get("patternProperties")
        texts = [node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]
        for text in texts:
            if isinstance(text, str):
                _refuse_wrong_pattern(text, place)
    if used & _LOOKING_BACK and used & _UNCOUNTED_BESIDE:
        beside = ", ".join(sorted(used & _UNCOUNTED_BESIDE))
        raise _RefusedError(f"{', '.join(sorted(used & _LOOKING_BACK))} cannot be used beside {beside}")


def _refuse_wrong_pattern(text: str, place: str) -> None:
    import regex

    if len(text) > MAX_PATTERN_CHARACTERS:
        raise _RefusedError(f"{place} has a pattern of {len(text)} characters, more than {MAX_PATTERN_CHARACTERS}")
    try:
        regex.compile(text)
    except regex.error as error:
        raise _RefusedError(f"{place} has a wrong pattern {text!r:.80}: {error}") from error


def _without_dialect(value: Any) -> Any:
    """Return a schema in which no part names its dialect, for the library would check that part without our bounds."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "$schema" or not isinstance(item, str)}
        return {key: _without_dialect(item) for key, item in kept.items()}
    return [_without_dialect(item) for item in value] if isinstance(value, list) else value


def _objects(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield place, value
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _objects(below, f"{place}.{key}" if isinstance(key, str) else f"{place}[{key}]")


def _violation(error: Any) -> tuple[str, str]:
    """Return place and reason of an error, without the value where the schema says that it is not for showing."""
    place = _place(error.absolute_path)
    schema = error.schema if isinstance(error.schema, dict) else {}
    if schema.get("writeOnly") is True or schema.get("format") == "password":
        return place, f"breaks the rule {error.validator!r}"
    return place, error.message[:200]


def _place(path: Iterable[str | int]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
