"""Idempotency records in memory, as time takes them."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from typing import Any
from uuid import UUID

from plm_engine_core.control_plane.storage.memory.books import Books, Row
from plm_engine_core.control_plane.sweeping import ExpiredBatch
from plm_engine_core.control_plane.vocabulary import TERMINAL_RUN_STATES, RunState


class MemoryIdempotency:
    """The expiry of idempotency records in memory."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def expire(self, tenant_id: UUID, *, keep_seconds: float, limit: int) -> ExpiredBatch:
        """Remove one batch of the records of runs that ended long enough ago."""
        async with self._books.turn() as books:
            before = books.now() - timedelta(seconds=keep_seconds)
            ended = {
                str(run["run_id"])
                for run in books.run_states.rows(tenant_id)
                if RunState(run["state"]) in TERMINAL_RUN_STATES and run["finished_at"] <= before
            }
            records = books.idempotency_records.items(tenant_id)
            due = list(islice((name for name, record in records if _run_of(name, record) in ended), limit + 1))
            for name in due[:limit]:
                books.idempotency_records.remove(tenant_id, name)
            return ExpiredBatch(records=min(len(due), limit), more=len(due) > limit)


def _run_of(name: tuple[str, str], record: Row) -> Any:
    """The run whose command a record answers; None for one that stands by itself."""
    operation, command_id = name
    if operation == "admit":
        return command_id.partition("/")[0]
    return record["result"]["run_id"] if operation == "runs.create" else None
