"""Delivers "drive this run" to some run worker of some node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import procrastinate
from plm_shared.addresses import driver_dsn

from plm_backend.delivery import QUEUE, SCHEMA, TASK

logger = logging.getLogger(__name__)


class ProcrastinateDelivery:
    """Enqueues in the caller's transaction: the job exists exactly when the change it follows from does."""

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID) -> None:
        """Enqueue one drive job. Doubles are harmless: the run's lease decides."""
        await connection.execute("SELECT delivery.enqueue_drive_v1(%s, %s)", [tenant_id, run_id])


async def deliver(
    dsn: str, drive: Callable[[UUID, UUID], Awaitable[object]], *, concurrency: int, ready: asyncio.Event | None = None
) -> None:
    """Receive drive jobs until cancelled, `concurrency` at once.

    A job that fails is only logged: what was recorded stands, and recovery finds the run.
    """
    connector = procrastinate.PsycopgConnector(
        conninfo=driver_dsn(dsn),
        kwargs={"options": f"-c search_path={SCHEMA},pg_catalog"},
        min_size=1,
        max_size=4,
    )
    app = procrastinate.App(connector=connector)

    @app.task(name=TASK, queue=QUEUE)
    async def drive_run(tenant_id: str, run_id: str) -> None:
        try:
            await drive(UUID(tenant_id), UUID(run_id))
        except Exception:
            logger.exception("driving run %s failed; recovery will find it", run_id)
            raise

    async with app.open_async():
        if ready is not None:
            ready.set()
        await app.run_worker_async(
            queues=[QUEUE],
            concurrency=concurrency,
            install_signal_handlers=False,
            delete_jobs="always",
            shutdown_graceful_timeout=5.0,
        )
