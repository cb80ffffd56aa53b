"""News of runs between processes, by NOTIFY; a lost one loses nothing, because readers look at the stream itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import psycopg
from plm_shared.cancellation import kept_cancel

from plm_engine_core.control_plane.storage.postgres.gateway import Pool

logger = logging.getLogger(__name__)

RUN_NEWS = "plm_run_news"
"""The channel of news about runs; each is a JSON object with `tenant` and `run`."""

_LONGEST = 7000  # bytes; PostgreSQL refuses a NOTIFY payload of 8000 and more
_AT_MOST_EVERY = 0.1  # seconds between two reports of one run: a plugin must not flood the database


class PostgresSignals:
    """Publishes news; failures are logged, because news is never the record of anything."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._last: dict[UUID, float] = {}

    async def changed(self, tenant_id: UUID, run_id: UUID) -> None:
        """The run's stream has new events."""
        self._last.pop(run_id, None)
        await self._notify({"tenant": str(tenant_id), "run": str(run_id)})

    async def progress(self, tenant_id: UUID, run_id: UUID, report: Mapping[str, Any]) -> None:
        """A step reports progress; reports that follow too closely are dropped, the last one of a step never is."""
        now = asyncio.get_running_loop().time()
        if now - self._last.get(run_id, 0.0) < _AT_MOST_EVERY and report.get("fraction") != 1.0:
            return
        self._last[run_id] = now
        await self._notify({"tenant": str(tenant_id), "run": str(run_id), "progress": dict(report)})

    async def interrupt(self, tenant_id: UUID | None, run_id: UUID | None) -> None:
        """A cancel or a halt was committed: every node wakes the holders of the runs it concerns."""
        scope = {"tenant": str(tenant_id) if tenant_id else None, "run": str(run_id) if run_id else None}
        await self._notify({**scope, "interrupt": True})

    async def _notify(self, news: Mapping[str, Any]) -> None:
        payload = json.dumps(news)
        if len(payload) > _LONGEST:
            return
        try:
            with kept_cancel():
                async with self._pool.connection() as connection:
                    await connection.execute("SELECT pg_notify(%s, %s)", [RUN_NEWS, payload])
        except psycopg.Error:
            logger.warning("news of a run could not be published", exc_info=True)
