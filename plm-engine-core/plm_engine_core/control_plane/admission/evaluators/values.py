"""What evaluators look at and answer with: a field by path, the texts within it, and metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from plm_shared.canonical_json import JsonRefused, storable_json
from pydantic import ValidationInfo

from plm_engine_core.control_plane.admission.evaluators.evaluator import Examined
from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.facts import described, document_of
from plm_engine_core.control_plane.policy.fields import FieldPath, check_path_of, lookup, parts, shown
from plm_engine_core.control_plane.vocabulary import EvaluationPhase

MOST_TEXTS = 10_000

PHASE = "phase"
"""In the context of a configuration that is checked: the phase that it is for; without one, `call`."""

_LARGEST_METADATA = 4_000  # bytes of JSON text
_DEEPEST_METADATA = 8
_LEAVES = (str, int, float, bool, type(None))


class TooLarge(ValueError):
    """The field holds more texts than an evaluator looks at."""


def seen_by_paths(proposal: Proposed, facts: Facts) -> dict[str, Any]:
    """The roots that paths start from; of a capability that is not registered, its id."""
    known = facts.capability
    return document_of(proposal, facts, described(known) if known is not None else {"id": proposal.capability})


def texts_in(value: Any) -> Iterator[str]:
    """Every text and number within a JSON value, names of members included, in order.

    Raises:
        TooLarge: there are more than 10 000.
    """
    open_values, count = [value], 0
    while open_values:
        each = open_values.pop()
        count += 1
        if count > MOST_TEXTS:
            raise TooLarge(f"it holds more than {MOST_TEXTS} values")
        if isinstance(each, Mapping):
            open_values.extend(reversed([part for pair in each.items() for part in pair]))
        elif isinstance(each, list | tuple):
            open_values.extend(reversed(each))
        elif isinstance(each, str):
            yield each
        elif isinstance(each, int | float) and not isinstance(each, bool):
            yield str(each)


class Found(NamedTuple):
    """A value, and how messages call it."""

    name: str
    value: Any


class _LooksAtField(Protocol):
    """A configuration that names a field."""

    @property
    def field(self) -> FieldPath:
        """Its path."""
        ...

    @property
    def model_fields_set(self) -> set[str]:
        """What stands in the policy."""
        ...


def check_field(path: FieldPath, info: ValidationInfo) -> FieldPath:
    """Refuse a field that there is none of in the phase that the configuration is for.

    Raises:
        ValueError: naming the paths there are.
    """
    return check_path_of((info.context or {}).get(PHASE, EvaluationPhase.CALL), path)


class LooksAt:
    """What an evaluator looks at: the field that its configuration names, or else what its phase is about."""

    def __init__(self, config: _LooksAtField) -> None:
        self._name = shown(config.field)
        self._root = parts(config.field)[0]
        self._find = lookup(config.field)
        self._named = "field" in config.model_fields_set

    def of_call(self, proposal: Proposed, facts: Facts) -> Found:
        """The field of a proposal."""
        return Found(self._name, self._find(seen_by_paths(proposal, facts)))

    def of(self, examined: Examined, *, whole: bool = False) -> Found | None:
        """The field in another phase; None where it is of something that is not there, as the output of a failed call.

        With `whole`, where the configuration names no field, everything that a call gave back: `error` and `artifacts`
        count as well.
        """
        document, phase = examined.document, examined.phase.value
        if self._named:
            return Found(self._name, self._find(document)) if self._root in document else None
        if whole and examined.phase is EvaluationPhase.OUTPUT:
            given = [document[root] for root in ("output", "error", "artifacts") if root in document]
            return Found("what it gave back", given)
        return Found(phase, document[phase]) if phase in document else None


def apart(value: Any, *, root: str) -> Any:
    """A copy of a JSON value, out of reach of who holds it.

    Raises:
        InvalidRequest: it is no JSON; names the path, from `root`.
    """
    try:
        return json.loads(storable_json(value, root=root))
    except JsonRefused as error:
        raise InvalidRequest(str(error), field=error.path) from error
    except ValueError as error:
        raise InvalidRequest(f"{root} holds a number of too many digits", field=root) from error


def kept_metadata(metadata: object) -> dict[str, Any]:
    """A copy of what an evaluator told beside its answer, without running any code of its objects.

    Raises:
        ValueError: it is no JSON object of plain values, or a large one; the message does not repeat it.
    """
    if type(metadata) is not dict:
        raise ValueError(f"its metadata is {type(metadata).__name__:.80}, not a dict")
    todo: list[tuple[Any, int]] = [(metadata, 1)]
    left = _LARGEST_METADATA  # every value and every character takes a byte at least
    while todo:
        value, depth = todo.pop()
        left -= 1
        if type(value) in (dict, list):
            if depth > _DEEPEST_METADATA:
                raise ValueError(f"its metadata is more than {_DEEPEST_METADATA} deep")
            left -= len(value)
            if left >= 0:
                below = [part for pair in value.items() for part in pair] if type(value) is dict else value
                todo.extend((each, depth + 1) for each in below)
        elif type(value) is str:
            left -= len(value)
        elif type(value) is int and value.bit_length() > 64:
            raise ValueError("its metadata holds a number of more than 64 bits")
        elif type(value) not in _LEAVES:
            raise ValueError(f"its metadata holds a {type(value).__name__:.80}, which is no JSON value")
        if left < 0:
            raise _too_large()
    try:
        text = storable_json(metadata)
    except ValueError:
        raise ValueError("its metadata holds what JSON has not, or the books cannot") from None
    if len(text.encode()) > _LARGEST_METADATA:
        raise _too_large()
    kept: dict[str, Any] = json.loads(text)
    return kept


def _too_large() -> ValueError:
    return ValueError(f"its metadata has more than {_LARGEST_METADATA} bytes")
