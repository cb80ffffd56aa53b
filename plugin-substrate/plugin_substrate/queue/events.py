"""The events of one job: kept in order, replayed to whoever comes later, and pushed to whoever follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from plugin_substrate.queue.job import Job, JobEvent, JobEventType

MAX_KEPT_EVENTS = 200


class EventLog:
    """Numbered events, in bounded memory: of progress reports in a row the last is kept, of logs the newest.

    State transitions are never dropped, so a follower always sees the end.
    """

    def __init__(self) -> None:
        self._events: list[JobEvent] = []
        self._number = 0
        self._ended = False
        self._followers: set[asyncio.Event] = set()

    def append(self, job: Job, kind: JobEventType, payload: dict[str, Any]) -> None:
        """Add an event and wake the followers."""
        self._number += 1
        event = JobEvent(
            number=self._number,
            type=kind,
            job_id=job.id,
            plugin_instance_id=job.plugin_instance_id,
            payload=payload,
        )
        progress = JobEventType.PROGRESS_CHANGED
        if self._events and kind is progress and self._events[-1].type is progress:
            self._events.pop()
        self._events.append(event)
        if len(self._events) > MAX_KEPT_EVENTS:
            self._forget_one()
        self._ended = job.status.terminal
        for follower in self._followers:
            follower.set()

    async def follow(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the events numbered above ``after``, then those to come; end after the terminal one."""
        news = asyncio.Event()
        self._followers.add(news)
        try:
            while True:
                news.clear()
                for event in [event for event in self._events if event.number > after]:
                    after = event.number
                    yield event
                if after >= self._number:
                    if self._ended:
                        return
                    await news.wait()
        finally:
            self._followers.discard(news)

    def _forget_one(self) -> None:
        for index, event in enumerate(self._events):
            if event.type is not JobEventType.STATE_TRANSITION:
                del self._events[index]
                return
