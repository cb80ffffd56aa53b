"""What an agent may ask for, and what may be given: bounded, and checked against a schema that nobody trusts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from plm_shared.canonical_json import JsonRefused, storable_json

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.json_schemas import first_problem, schema_validator
from plm_engine_core.control_plane.texts import check_text

LONGEST_QUESTION: Final = 2_000
LARGEST_SCHEMA: Final = 4_000
"""How many bytes the JSON text of a schema may have."""
LARGEST_INPUT: Final = 16_000
"""How many bytes the JSON text of an input may have; more goes into an artifact."""
MOST_IN_SCHEMA: Final = 200
MOST_IN_INPUT: Final = 300
"""How many JSON values either may hold: to hold one against the other takes their product in steps."""

_WITHOUT_BOUND: Final = {
    "$ref": "write out what it stands for",
    "$dynamicRef": "write out what it stands for",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
}
"""Keywords with which a small schema could take for ever to check, and what to write instead."""


def check_ask(question: object, schema: object) -> dict[str, Any]:
    """Refuse what no human can be asked for; answers what a ticket says of it.

    Raises:
        InvalidRequest: the question is no text of 1 to 2000 characters, or the schema no JSON Schema that can be
            checked within bounds, so without `$ref` and `unevaluated...`; names the field.
    """
    check_text(question, field="question", longest=LONGEST_QUESTION)  # type: ignore[arg-type]  # it looks
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"'schema' must be a JSON Schema, an object, not {type(schema).__name__}", field="schema")
    plain = dict(schema)
    _check_size(plain, field="schema", largest=LARGEST_SCHEMA, most=MOST_IN_SCHEMA)
    _validator(plain)
    return {"question": question, "schema": plain}


def check_input(value: Any, asked: Mapping[str, Any]) -> None:
    """Refuse an input that is not what its ticket asks for. No message has a part of it: it may be a secret.

    Raises:
        InvalidRequest: it is no JSON, too large, or breaks the schema; names the path.
    """
    _check_size(value, field="input", largest=LARGEST_INPUT, most=MOST_IN_INPUT)
    schema = asked.get("schema")
    if not isinstance(schema, Mapping):
        raise InvalidRequest("the ticket has no schema, so no input can be held against it; deny it", field="input")
    try:
        problem = first_problem(_validator(dict(schema)), value, root="input")
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        words = f"the input cannot be held against its schema ({type(error).__name__}); deny the ticket"
        raise InvalidRequest(words, field="input") from None
    if problem is not None:
        raise InvalidRequest(problem, field=problem.partition(" ")[0])


def _validator(schema: dict[str, Any]) -> Any:
    keyword = _without_bound(schema)
    if keyword is not None:
        instead = _WITHOUT_BOUND[keyword]
        raise InvalidRequest(f"'schema' must not have {keyword}: {instead}", field="schema")
    try:
        return schema_validator(schema)
    except (RecursionError, ValueError) as error:
        words = " ".join(str(error).split())
        raise InvalidRequest(f"'schema' cannot be used: {words:.200}", field="schema") from None


def _check_size(value: Any, *, field: str, largest: int, most: int) -> None:
    try:
        size = len(storable_json(value, root=field).encode())
    except JsonRefused as error:
        raise InvalidRequest(f"{error.path}: {error.problem}", field=error.path) from None
    if size > largest:
        raise InvalidRequest(f"'{field}' has {size} bytes of JSON and may have {largest}", field=field)
    values = _count(value)
    if values > most:
        raise InvalidRequest(f"'{field}' holds {values} values and may hold {most}", field=field)


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + sum(map(_count, value.values()))
    return 1 + sum(map(_count, value)) if isinstance(value, list | tuple) else 1


def _without_bound(value: Any) -> str | None:
    """The first of these keywords that stands anywhere, be it only as the name of a property."""
    if isinstance(value, Mapping):
        found = next((name for name in _WITHOUT_BOUND if name in value), None)
        return found or next(filter(None, map(_without_bound, value.values())), None)
    return next(filter(None, map(_without_bound, value)), None) if isinstance(value, list | tuple) else None
