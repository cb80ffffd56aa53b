"""The keywords of JSON Schema within a budget: foreign schemas and patterns cannot make a check run on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

MAX_STEPS = 50_000
PATTERN_SECONDS = 0.1
ALL_PATTERNS_SECONDS = 1.0


class TooMuchError(Exception):
    """A check has used up its budget; the text says of what."""


class Budget:
    """What one check may take: steps, and time for its patterns."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._seconds = ALL_PATTERNS_SECONDS

    def take_step(self) -> None:
        """Take one step; a `TooMuchError` when none is left."""
        self._steps -= 1
        if self._steps < 0:
            raise TooMuchError(f"checking it takes more than {MAX_STEPS} steps; the schema is too involved")

    def found(self, pattern: str, text: str) -> bool:
        """Tell whether a pattern is found in a text; a `TooMuchError` when that takes too long."""
        import regex

        started, limit = time.perf_counter(), min(PATTERN_SECONDS, self._seconds)
        try:
            return regex.search(pattern, text, timeout=limit) is not None
        except TimeoutError:
            if limit < PATTERN_SECONDS:
                raise TooMuchError(f"its patterns together take longer than {ALL_PATTERNS_SECONDS} s") from None
            raise TooMuchError(f"the pattern {pattern!r:.80} takes longer than {limit} s") from None
        finally:
            self._seconds = max(self._seconds - (time.perf_counter() - started), 0.001)


def bounded_validator(schema: Mapping[str, Any], budget: Budget) -> Any:
    """Return a validator of draft 2020-12 that fetches nothing and whose every keyword is paid from a budget."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    keywords = _Keywords(budget)
    own: dict[str, Callable[..., Iterator[Any]]] = {
        "additionalProperties": keywords.additional_properties,
        "pattern": keywords.pattern,
        "patternProperties": keywords.pattern_properties,
        "required": _required,
        "uniqueItems": _unique_items,
    }
    paid = {name: _paid(function, budget) for name, function in {**Draft202012Validator.VALIDATORS, **own}.items()}
    return extend(Draft202012Validator, paid)(schema, registry=Registry())


def _paid(function: Callable[..., Iterable[Any] | None], budget: Budget) -> Callable[..., Iterable[Any] | None]:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterable[Any] | None:
        budget.take_step()
        return function(validator, value, instance, schema)

    return check


class _Keywords:
    """Those with patterns. They take validator, keyword's value, instance and schema, and yield the violations."""

    def __init__(self, budget: Budget) -> None:
        self._found = budget.found

    def pattern(self, _validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[Any]:
        from jsonschema import ValidationError

        if isinstance(instance, str) and not self._found(pattern, instance):
            yield ValidationError(f"{instance!r:.80} does not match {pattern!r}")

    def pattern_properties(self, validator: Any, patterns: Any, instance: Any, _schema: Any) -> Iterator[Any]:
        if not isinstance(instance, dict):
            return
        for pattern, below in patterns.items():
            for key, value in instance.items():
                if self._found(pattern, key):
                    yield from validator.descend(value, below, path=key, schema_path=pattern)

    def additional_properties(self, validator: Any, below: Any, instance: Any, schema: Any) -> Iterator[Any]:
        from jsonschema import ValidationError

        if not isinstance(instance, dict):
            return
        patterns, properties = schema.get("patternProperties", {}), schema.get("properties", {})
        for key, value in instance.items():
            if key in properties or any(self._found(pattern, key) for pattern in patterns):
                continue
            if below is False:
                yield ValidationError("is no setting", path=[key])
            else:
                yield from validator.descend(value, below, path=key)


def _required(_validator: Any, names: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    """Name what is missing by its own place."""
    from jsonschema import ValidationError

    for name in names if isinstance(instance, dict) else ():
        if name not in instance:
            yield ValidationError("is missing", path=[name])


def _unique_items(_validator: Any, wanted: Any, instance: Any, _schema: Any) -> Iterator[Any]:
    """Compare in one pass, where the library compares each item with each."""
    from jsonschema import ValidationError

    if wanted and isinstance(instance, list):
        texts = {json.dumps(_numbers_alike(item), sort_keys=True) for item in instance}
        if len(texts) < len(instance):
            yield ValidationError("has the same item twice")


def _numbers_alike(value: Any) -> Any:
    """Return a value in which 1.0 is written 1, as JSON Schema holds them equal."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_numbers_alike(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers_alike(item) for key, item in value.items()}
    return value
