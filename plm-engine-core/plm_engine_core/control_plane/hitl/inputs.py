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

_REFERRING = ("$ref", "$dynamicRef")  # with them a small schema could take for ever to check


def check_ask(question: object, schema: object) -> dict[str, Any]:
    """Refuse what no human can be asked for; answers what a ticket says of it.

    Raises:
        InvalidRequest: the question is no text of 1 to 2000 characters, or the schema no JSON Schema that can be
            checked within bounds, without references; names the field.
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
    if _refers(schema):
        raise InvalidRequest("'schema' must not refer to anything: write out what $ref stands for", field="schema")
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


def _refers(value: Any) -> bool:
    """Whether a reference stands anywhere, be it only as the name of a property."""
    if isinstance(value, Mapping):
        return any(name in value for name in _REFERRING) or any(map(_refers, value.values()))
    return any(map(_refers, value)) if isinstance(value, list | tuple) else False
