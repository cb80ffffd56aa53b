"""The feed: every event of a tenant, across its streams, so that a reader who keeps its cursor misses none.

Sequences are dense within a stream only, and transactions commit in another order than they began. So the feed is in
the order of transaction ids, which each event carries as its position, and ends below the oldest transaction that still
runs: what is not yet shown can only come after what is. Within a stream events keep their order.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from plm_engine_core.control_plane.errors import InvalidRequest

if TYPE_CHECKING:
    from plm_engine_core.control_plane.events.event import Event

_GREATEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class FeedCursor:
    """Where a reader stands: after this event. Its text is opaque to readers.

    `pruned` is the newest pruning of which the reader knows; whoever stands at the beginning asks for what there is.
    `tenant` is whose feed it is a place of, empty where nobody has said.
    """

    position: int
    stream: str
    seq: int
    pruned: int = 0
    tenant: str = ""

    def encode(self) -> str:
        """The text that a reader keeps."""
        return base64.urlsafe_b64encode(
            json.dumps([self.position, self.stream, self.seq, self.pruned, self.tenant]).encode()
        ).decode()

    def of(self, tenant_id: UUID) -> FeedCursor:
        """This place in the feed of a tenant.

        Raises:
            InvalidRequest: it is one of another tenant's feed, where other events stand before it.
        """
        if self.tenant not in ("", str(tenant_id)):
            problem = "this cursor is of the feed of another tenant; leave it out to begin anew"
            raise InvalidRequest(problem, field="cursor")
        return replace(self, tenant=str(tenant_id))

    @classmethod
    def decode(cls, text: str) -> FeedCursor:
        """Back from the text.

        Raises:
            InvalidRequest: no feed has given this text.
        """
        try:
            position, stream, seq, *more = json.loads(base64.urlsafe_b64decode(text.encode("ascii")))
            said: list[Any] = [*more, *(0, "")[len(more) :]]  # an older release said less
            pruned, tenant = said
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            raise _not_ours() from error
        numbers = (position, seq, pruned)
        if not all(type(each) is str and each.isprintable() for each in (stream, tenant)):
            raise _not_ours()
        if not all(type(each) is int and 0 <= each <= _GREATEST for each in numbers):
            raise _not_ours()
        return cls(position, stream, seq, pruned, tenant)


BEGINNING = FeedCursor(0, "", 0, -1)
"""Before the first event that there is."""


@dataclass(frozen=True, kw_only=True)
class HeldBack:
    """Committed events that the feed does not show yet, because an older transaction still runs somewhere.

    `events` is how many, at most 1000 are counted; `since` is when the oldest of them happened. `blocking_pid` is the
    server process of that transaction, None where it has none any more or is only prepared.
    """

    events: int
    since: datetime
    blocking_pid: int | None


@dataclass(frozen=True, kw_only=True)
class FeedPage:
    """Some events in the feed's order. `cursor` goes on after them, and is there even when there are none."""

    events: Sequence[Event]
    cursor: FeedCursor
    held_back: HeldBack | None = None


def _not_ours() -> InvalidRequest:
    return InvalidRequest("this is not a cursor of the feed; leave it out to begin anew", field="cursor")
