"""Delivers "drive this run" to some run worker of some node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import procrastinate
import psycopg
from plm_shared.addresses import driver_dsn
from procrastinate.exceptions import ConnectorException

from plm_backend.delivery import QUEUE, SCHEMA, TASK

logger = logging.getLogger(__name__)

# The jobs that a killed worker left behind; its runs have long come back by recovery.
_FORGET_ABANDONED = "DELETE FROM procrastinate_jobs WHERE status = 'doing' AND worker_id IS NULL"
_RECONNECT_SECONDS = 1.0
_GRACE_SECONDS = 3.0


class ProcrastinateDelivery:
    """Enqueues in the caller's transaction: the job exists exactly when the change it follows from does."""

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID) -> None:
        """Enqueue one drive job. Doubles are harmless: the run's lease decides."""
        await connection.execute("SELECT delivery.enqueue_drive_v1(%s, %s)", [tenant_id, run_id])


async def deliver(dsn: str, drive: Callable[[UUID, UUID], Awaitable[object]], *, concurrency: int) -> None:
    """Receive drive jobs until cancelled, `concurrency` at once.

    A job that fails is only logged: what was recorded stands, and recovery finds the run. When the database goes away
    the delivery engine ends; it is started anew until the database is back.
    """
    while True:
        try:
            async with _engine(dsn, drive).open_async() as engine:
                await engine.connector.execute_query_async(_FORGET_ABANDONED)
                await engine.run_worker_async(
                    queues=[QUEUE],
                    concurrency=concurrency,
                    install_signal_handlers=False,
                    delete_jobs="always",
                    shutdown_graceful_timeout=_GRACE_SECONDS,
                )
        except (ConnectorException, psycopg.Error) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            logger.warning("the delivery of runs lost the database and starts anew: %s", reason)
        await asyncio.sleep(_RECONNECT_SECONDS)


def _engine(dsn: str, drive: Callable[[UUID, UUID], Awaitable[object]]) -> procrastinate.App:
    connector = procrastinate.PsycopgConnector(
        conninfo=driver_dsn(dsn),
        kwargs={"options": f"-c search_path={SCHEMA},pg_catalog"},
        min_size=1,
        max_size=4,
    )
    engine = procrastinate.App(connector=connector)

    @engine.task(name=TASK, queue=QUEUE)
    async def drive_run(tenant_id: str, run_id: str) -> None:
        try:
            await drive(UUID(tenant_id), UUID(run_id))
        except Exception:
            logger.exception("driving run %s failed; recovery will find it", run_id)
            raise

    return engine
