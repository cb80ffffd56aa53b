"""An event: one link of a stream's hash chain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.events.chain import Link, framed, link_hash

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event as stored. `payload` is the text that was hashed; `data` parses it."""

    tenant_id: UUID
    stream: str
    seq: int
    prev_hash: bytes
    hash: bytes
    kind: str
    actor: str
    occurred_at: datetime
    payload: str

    @property
    def data(self) -> dict[str, Any]:
        """The payload as a JSON object."""
        parsed: dict[str, Any] = json.loads(self.payload)
        return parsed

    @property
    def shown(self) -> dict[str, Any]:
        """The payload for readers; one that is no JSON object any more is the text `unreadable`, as it is stored."""
        try:
            data = self.data
        except (ValueError, RecursionError):
            data = None
        return data if isinstance(data, dict) else {"unreadable": self.payload}


def run_stream(run_id: UUID) -> str:
    """The stream of one run."""
    return f"run/{run_id}"


TENANT_STREAM = "tenant"
"""The stream of everything in a tenant that belongs to no run."""


def event_hash(event: Event) -> bytes:
    """What the hash of an event has to be; see `events.chain.link_hash`."""
    return link_hash(
        event.tenant_id,
        event.stream,
        event.seq,
        event.prev_hash,
        event.kind,
        event.actor,
        microseconds(event.occurred_at),
        event.payload,
    )


def link_of(event: Event) -> Link:
    """The event as a link of its chain."""
    return (
        event.stream,
        event.seq,
        event.prev_hash,
        event.hash,
        framed(event.kind) + framed(event.actor),
        microseconds(event.occurred_at),
        framed(event.payload),
    )


def microseconds(at: datetime) -> int:
    """A time as it is hashed: microseconds since 1970 UTC."""
    return (at - _EPOCH) // datetime.resolution
