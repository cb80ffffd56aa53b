"""What evaluators look at: a field by path, and the texts within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from plm_engine_core.control_plane.policy import Facts, Proposed
from plm_engine_core.control_plane.policy.facts import described, document_of

MOST_TEXTS = 10_000


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
