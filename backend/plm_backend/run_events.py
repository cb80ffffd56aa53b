"""The events of a run as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID

from plm_engine_core.control_plane.errors import InvalidRequest
from plm_engine_core.control_plane.events import Event, run_stream
from plm_engine_core.control_plane.vocabulary import EventKind
from sse_starlette import ServerSentEvent

from plm_backend.wiring import Platform

HEARTBEAT_SECONDS = 15
"""Between comments on a silent stream; a lost wake-up delays an event by this at most."""

_ENDS = {EventKind.RUN_SUCCEEDED, EventKind.RUN_FAILED, EventKind.RUN_CANCELLED}
_BIGINT_DIGITS = 18


async def resume_after(platform: Platform, tenant_id: UUID, run_id: UUID, last_event_id: str | None) -> int:
    """The sequence after which a run's stream goes on for a client with this `Last-Event-ID`; 0 without one.

    Raises:
        InvalidRequest: it is not an id that this stream has given.
        NotFound: no such run in this tenant.
    """
    after = _sequence(last_event_id)
    storage = platform.control_plane.storage
    await storage.runs.get(tenant_id, run_id)
    if after and not await storage.events.read(tenant_id, run_stream(run_id), after=after - 1, limit=1):
        raise _refused(last_event_id)  # it would wait for events that are already there
    return after


def _sequence(last_event_id: str | None) -> int:
    if last_event_id is None or not last_event_id.strip():
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) <= _BIGINT_DIGITS):
        raise _refused(last_event_id)
    return int(last_event_id)


def _refused(last_event_id: str | None) -> InvalidRequest:
    return InvalidRequest(
        f"Last-Event-ID must be a number this stream gave, not {last_event_id!r:.80}; leave it out to begin anew",
        field="Last-Event-ID",
    )


async def follow(
    platform: Platform, tenant_id: UUID, run_id: UUID, *, after: int, until: datetime
) -> AsyncIterator[ServerSentEvent]:
    """Every event above `after`, once and in order, then those to come, until the run or the caller's token has ended.

    Progress reports pass between them; they carry no id, because they are news and not record.
    """
    storage = platform.control_plane.storage
    async with platform.hub.watch(tenant_id, run_id) as news:
        while True:
            # Asked first: a run that had ended before its events were read has no further ones.
            ended = (await storage.runs.get(tenant_id, run_id)).finished
            while batch := await storage.events.read(tenant_id, run_stream(run_id), after=after):
                for event in batch:
                    after = event.seq
                    yield _message(event)
                    if event.kind in _ENDS:
                        return
            left = (until - datetime.now(UTC)).total_seconds()
            if ended or left <= 0:
                return
            try:
                update = await asyncio.wait_for(news.get(), min(left, HEARTBEAT_SECONDS))
            except TimeoutError:
                continue
            if "progress" in update:
                yield ServerSentEvent(event="progress", data=json.dumps(update["progress"]))


def _message(event: Event) -> ServerSentEvent:
    document = {
        "seq": event.seq,
        "kind": event.kind,
        "actor": event.actor,
        "occurred_at": event.occurred_at.isoformat(),
        "hash": event.hash.hex(),
        "payload": event.shown,
    }
    return ServerSentEvent(id=str(event.seq), event=event.kind, data=json.dumps(document))
