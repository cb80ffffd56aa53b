"""Delegation: a principal hands part of what it may do to another, never more, never for longer, never in a circle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_DOWN, Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from plm_engine_core.control_plane.amounts import SMALLEST
from plm_engine_core.control_plane.errors import Forbidden, InvalidRequest

if TYPE_CHECKING:
    from plm_engine_core.control_plane.admission.proposal import Principal


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """What is handed on: to whom, which OAuth scopes, which share of what is left to spend, and until when.

    `delegations` is how many hands it may pass through after that.
    """

    to: UUID
    scopes: frozenset[str]
    share: Decimal
    expires_at: datetime
    delegations: int = 0


def narrowed(delegator: Principal, delegation: Delegation, *, depth: int, now: datetime) -> Principal:
    """The principal that acts under a delegation; `depth` is how far the delegator's agent may hand on at all.

    Raises:
        Forbidden: it would be wider than the delegator in any way, or come back to one who is in it already.
        InvalidRequest: the time has no zone, or the number of further hands is none.
    """
    for name, good, form in (
        ("to", isinstance(delegation.to, UUID), "the UUID of whom it is for"),
        ("scopes", isinstance(delegation.scopes, frozenset | set), "a set of OAuth scopes"),
        ("expires_at", isinstance(delegation.expires_at, datetime), "the datetime of its end"),
    ):
        if not good:
            raise InvalidRequest(f"'{name}' must be {form}, not {getattr(delegation, name)!r:.80}", field=name)
    if type(delegation.delegations) is not int or delegation.delegations < 0:
        words = f"'delegations' must be a whole number from 0 up, not {delegation.delegations!r}"
        raise InvalidRequest(words, field="delegations")
    if delegation.expires_at.tzinfo is None:
        raise InvalidRequest("the end of a delegation needs a time zone", field="expires_at")
    left = depth if delegator.delegations_left is None else min(depth, delegator.delegations_left)
    until = delegator.expires_at
    for wrong, words in (
        (left < 1, "the delegator may not delegate further"),
        (delegation.delegations >= max(left, 1), f"it may be handed on {max(left - 1, 0)} more times at most"),
        (
            not delegation.scopes <= delegator.scopes,
            f"the delegator lacks {', '.join(sorted(delegation.scopes - delegator.scopes))}",
        ),
        (delegation.expires_at <= now, "it has ended already"),
        (until is not None and delegation.expires_at > until, f"the delegator's own delegation ends at {until}"),
        (
            delegation.to in (delegator.user_id, *delegator.delegated_by),
            f"{delegation.to} delegated this itself",
        ),
    ):
        if wrong:
            raise Forbidden(f"the delegation is refused: {words}", reason="delegation_too_wide")
    return type(delegator)(
        user_id=delegation.to,
        actor_kind="agent",
        scopes=delegation.scopes,
        delegated_by=(*delegator.delegated_by, delegator.user_id),
        expires_at=delegation.expires_at,
        delegations_left=delegation.delegations,
    )


def share_of(left: Mapping[str, Decimal], delegation: Delegation) -> dict[str, Decimal]:
    """What the run of a delegation may spend: its share of what the delegator's run has left, never rounded up.

    Raises:
        InvalidRequest: the share is no part of a whole.
    """
    share = delegation.share
    if not (isinstance(share, Decimal) and share.is_finite() and 0 < share <= 1):
        words = f"'share' must be a Decimal of more than 0 and at most 1, not {share!r}"
        raise InvalidRequest(words, field="share")
    return {
        unit: (max(amount, Decimal(0)) * share).quantize(SMALLEST, rounding=ROUND_DOWN) for unit, amount in left.items()
    }
