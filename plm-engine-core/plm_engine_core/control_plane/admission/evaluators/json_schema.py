"""Checks the arguments of a call, or any field, against a JSON Schema (draft 2020-12)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from plm_engine_core.control_plane.admission.evaluators.evaluator import EvaluatorResult
from plm_engine_core.control_plane.admission.evaluators.values import seen_by_paths
from plm_engine_core.control_plane.matching import Match, Matcher, matcher
from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.fields import MISSING, FieldPath, check_path, lookup, shown


class JsonSchemaConfig(BaseModel):
    """The schema must hold for `field`. References stay within the schema; nothing is fetched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    json_schema: Mapping[str, Any] = Field(alias="schema")
    field: FieldPath = "arguments"

    _path_known = field_validator("field")(check_path)


class JsonSchemaEvaluator:
    """Kind `json_schema`; `pattern` is matched in linear time, as everything here is."""

    kind: ClassVar[str] = "json_schema"
    config_schema: ClassVar[type[BaseModel]] = JsonSchemaConfig

    def __init__(self, config: JsonSchemaConfig) -> None:
        self._name = shown(config.field)
        self._find = lookup(config.field)
        self._validator = _validator(dict(config.json_schema))

    def evaluate(self, proposal: Proposed, facts: Facts) -> EvaluatorResult:
        """Name the first entry that breaks the schema, without its value."""
        value = self._find(seen_by_paths(proposal, facts))
        if value is MISSING:
            return EvaluatorResult(allow=False, reason=f"{self._name} is missing")
        error = next(self._validator.iter_errors(_plain(value)), None)
        if error is None:
            return EvaluatorResult(allow=True)
        place = ".".join([self._name, *map(str, error.absolute_path)])
        return EvaluatorResult(allow=False, reason=f"{place} breaks {error.validator!r} of its schema")


def _validator(schema: dict[str, Any]) -> Any:
    import jsonschema
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import extend
    from referencing.jsonschema import EMPTY_REGISTRY

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is none: {error.message}") from error
    _check_below(schema)
    linear = extend(jsonschema.Draft202012Validator, {"pattern": _pattern, "patternProperties": _pattern_properties})
    return linear(schema, registry=EMPTY_REGISTRY)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001  # its interface
    from jsonschema.exceptions import ValidationError

    if isinstance(instance, str) and not _search(pattern)(instance):
        yield ValidationError("the text does not match")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    if not isinstance(instance, dict):
        return
    for pattern, below in patterns.items():
        for name, value in instance.items():
            if _search(pattern)(name) is not False:
                yield from validator.descend(value, below, path=name, schema_path=pattern)


@lru_cache(maxsize=1024)
def _search(pattern: str) -> Matcher:
    return matcher(pattern, Match.REGEX, anywhere=True, ignore_case=False)


def _check_below(schema: dict[str, Any]) -> None:
    """Refuse what only a proposal would meet: a bad pattern, and a reference to what is not in the schema.

    Raises:
        ValueError: naming it.
    """
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root = DRAFT202012.create_resource(schema)
    todo = [(root, REGISTRY.resolver_with_root(root))]
    seen: set[int] = set()
    while todo:
        resource, resolver = todo.pop()
        below = resource.contents
        if id(below) in seen or not isinstance(below, Mapping):
            continue
        seen.add(id(below))
        for pattern in (below.get("pattern"), *(below.get("patternProperties") or ())):
            if isinstance(pattern, str):
                _search(pattern)
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in below:
                try:
                    found = resolver.lookup(below[keyword])
                except (Unresolvable, ValueError) as error:
                    raise ValueError(
                        f"the schema refers to {below[keyword]!r:.120}, which is not in it; nothing is fetched, so put "
                        "it under $defs"
                    ) from error
                todo.append((DRAFT202012.create_resource(found.contents), found.resolver))
        todo += [(each, resolver.in_subresource(each)) for each in resource.subresources()]


def _plain(value: Any) -> Any:
    """The value in the types that the validator takes for objects and arrays."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
