"""JSON Schemas (draft 2020-12) as somebody else wrote them: references stay within, patterns take linear time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from plm_engine_core.control_plane.matching import Match, Matcher, matcher

_UNNAMED = "*"
"""In a path, a property that the schema has no name for."""


def schema_validator(schema: dict[str, Any]) -> Any:
    """A validator of `jsonschema` for a schema. Nothing is fetched, and a pattern is matched in linear time.

    Raises:
        ValueError: it is no schema, has a pattern that cannot be matched, or refers to what is not in it.
    """
    import jsonschema
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import extend
    from referencing.jsonschema import EMPTY_REGISTRY

    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is none: {error.message}") from error
    _check_below(schema)
    linear = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    return extend(jsonschema.Draft202012Validator, linear)(schema, registry=EMPTY_REGISTRY)


def first_problem(validator: Any, value: Any, *, root: str) -> str | None:
    """The first entry that breaks the schema, by its path from `root` and without its value; None where none does.

    A name that the schema does not have is part of the value too, and shown as `*`.
    A text that a pattern cannot be tried on breaks it, wherever that pattern stands: under `not` as well.
    """
    try:
        error = next(validator.iter_errors(_plain(value)), None)
    except _Undecided:
        return f"{root} holds a text that a pattern of its schema cannot be tried on"
    if error is None:
        return None
    place = ".".join([root, *map(str, error.absolute_path)])
    return f"{place} breaks {error.validator!r} of its schema"


class _Undecided(Exception):  # it is no error of the schema, nor of the value
    """A text is too long, or no text that can be encoded."""


def _matches(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text; to say no where nobody knows would be a yes under `not`."""
    answer = _search(pattern)(text)
    if answer is None:
        raise _Undecided
    return answer


# The keywords that `jsonschema` would try patterns for with `re`, or compare every item with every other.


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001  # its interface
    from jsonschema.exceptions import ValidationError

    if isinstance(instance, str) and not _matches(pattern, instance):
        yield ValidationError("the text does not match")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    if not isinstance(instance, dict):
        return
    for pattern, below in patterns.items():
        for name, value in instance.items():
            if _matches(pattern, name):
                yield from validator.descend(value, below, path=_UNNAMED, schema_path=pattern)


def _additional_properties(validator: Any, below: Any, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema.exceptions import ValidationError

    if not isinstance(instance, dict) or below is True:
        return
    named, patterns = schema.get("properties", ()), schema.get("patternProperties", ())
    for name, value in instance.items():
        if name in named or any(_matches(pattern, name) for pattern in patterns):
            continue
        if below is False:
            yield ValidationError("there is a property that the schema does not name")
            return
        yield from validator.descend(value, below, path=_UNNAMED)


def _unique_items(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    from jsonschema.exceptions import ValidationError

    if unique and isinstance(instance, list) and len(set(map(_comparable, instance))) < len(instance):
        yield ValidationError("an item stands twice")


def _comparable(value: Any) -> Any:
    """Equal and hashable where two JSON values are equal: 1 is 1.0, and neither is true."""
    if isinstance(value, dict):
        return dict, frozenset((name, _comparable(each)) for name, each in value.items())
    if isinstance(value, list):
        return list, tuple(map(_comparable, value))
    return isinstance(value, bool), value


@lru_cache(maxsize=1024)
def _search(pattern: str) -> Matcher:
    return matcher(pattern, Match.REGEX, anywhere=True, ignore_case=False)


def _check_below(schema: dict[str, Any]) -> None:
    """Refuse what only a value would meet: a bad pattern, and a reference to what is not in the schema.

    So is `unevaluatedProperties` beside patterns: `jsonschema` would try these with `re`, for as long as that takes.

    Raises:
        ValueError: naming it.
    """
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root = DRAFT202012.create_resource(schema)
    todo = [(root, REGISTRY.resolver_with_root(root))]
    seen: set[int] = set()
    used: set[str] = set()
    while todo:
        resource, resolver = todo.pop()
        below = resource.contents
        if id(below) in seen or not isinstance(below, Mapping):
            continue
        seen.add(id(below))
        used.update({"unevaluatedProperties", "patternProperties"} & below.keys())
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
    if len(used) > 1:
        raise ValueError(
            "the schema has unevaluatedProperties beside patternProperties, whose patterns would not be tried in "
            "linear time; use additionalProperties"
        )


def _plain(value: Any) -> Any:
    """The value in the types that the validator takes for objects and arrays."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
