"""Leases of named resources: one holder at a time, for as long as it says that it lives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from plm_engine_core.control_plane.errors import FencingLost, InvalidRequest

LONGEST_LEASE_SECONDS = 86_400.0
SURELY_OVER_SECONDS = 2 * LONGEST_LEASE_SECONDS
"""A lease of a resource that goes on for longer was given by a clock that was ahead, and holds nobody up."""
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class ResourceLease:
    """Who holds what until when, by the clock of the books.

    `fencing_token` is greater than that of every earlier holder of the name. Hand it to the resource where it can keep
    one: it then refuses a smaller one.
    """

    tenant_id: UUID
    name: str
    owner: str
    fencing_token: int
    expires_at: datetime


def check_terms(name: str, owner: str, seconds: float) -> None:
    """Refuse what cannot be a lease.

    Raises:
        InvalidRequest: names the field.
    """
    for field, text in (("name", name), ("owner", owner)):
        if not (isinstance(text, str) and text.strip() and text.isprintable() and len(text) <= _LONGEST_NAME):
            raise InvalidRequest(f"'{field}' must be 1 to {_LONGEST_NAME} printable characters", field=field)
    check_seconds(seconds)


def check_seconds(seconds: float) -> None:
    """Refuse a lease without an end.

    Raises:
        InvalidRequest: `seconds` is not more than 0 and at most a day.
    """
    if not (type(seconds) in (int, float) and 0 < seconds <= LONGEST_LEASE_SECONDS):
        raise InvalidRequest(
            f"a lease is for more than 0 and at most {LONGEST_LEASE_SECONDS:g} seconds, not {seconds!r:.80}",
            field="seconds",
        )


def lease_lost(lease: ResourceLease) -> FencingLost:
    """What a holder is told that is none any more."""
    return FencingLost(f"{lease.name!r} is no longer held with fencing token {lease.fencing_token}")
