"""Bookings that were sent together, and what was answered to them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import psycopg
from psycopg.pq.abc import PGresult

from plm_engine_core.control_plane.storage.postgres.calls import failure_of

Answer = asyncio.Future[PGresult]


@dataclass(slots=True)
class Round:
    """Some bookings, each a message, and where they wait for the disk together a last message for that."""

    answers: list[Answer]
    messages: int = 0  # that were sent
    results: list[PGresult] = field(default_factory=list)  # one for each message that was answered
    flushes: int = 0  # that came to nothing
    disturbed: bool = False  # by a cancel, which ends a wait for a standby with a mere warning

    @property
    def is_over(self) -> bool:
        """Whether every message was answered."""
        return len(self.results) == self.messages

    @property
    def books(self) -> bool:
        """Whether a booking is still to be answered, and not only the wait for the disk."""
        return len(self.results) < len(self.answers)

    def deliver(self, unflushed: psycopg.Error | None) -> None:
        """Answer those who wait; with a failure to write to disk, where there was one."""
        for answer, result in zip(self.answers, self.results, strict=True):
            failure = unflushed or failure_of(result)
            if answer.done():  # nobody waits for it any more
                continue
            if failure is not None:
                answer.set_exception(failure)
            else:
                answer.set_result(result)
