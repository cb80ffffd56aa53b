"""Which member of a record is of another type than it is annotated with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plm_engine_core.control_plane.errors import InvalidRequest


def wrong_type(record: object, what: str, kinds: Mapping[str, Any]) -> InvalidRequest:
    """Names the first member of a record, called `what`, that is none of its kind; one of them must not be.

    A whole number is an int and nothing derived from it, such as a bool.
    """

    def fits(value: object, kind: Any) -> bool:
        return type(value) is int if kind is int else isinstance(value, kind)

    name = next(name for name, kind in kinds.items() if not fits(getattr(record, name), kind))
    problem = f"{name!r} of {what} is of another type than it can be: {getattr(record, name)!r:.80}"
    return InvalidRequest(problem, field=name)
