"""Delivers "drive this run" to some run worker of some node."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import procrastinate
import psycopg
from plm_shared.addresses import driver_dsn
from plm_shared.cancellation import kept_cancel
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException

from plm_backend.delivery import QUEUE, SCHEMA, TASK
from plm_backend.tasks import end

logger = logging.getLogger(__name__)

Drive = Callable[[UUID, UUID], Awaitable[object]]
"""Drives a run of a tenant."""

# The jobs that a killed worker left behind; its runs have long come back by recovery.
_FORGET_ABANDONED = "DELETE FROM procrastinate_jobs WHERE status = 'doing' AND worker_id IS NULL"
# Of jobs with one `queueing_lock` one at most may be waiting. The run is locked, so nobody comes between.
_LATER = """
SELECT delivery.procrastinate_defer_jobs_v1(ARRAY[ROW(%(queue)s, %(task)s, 0, NULL, %(waits)s,
    jsonb_build_object('tenant_id', %(tenant)s::uuid, 'run_id', %(run)s::uuid),
    clock_timestamp() + make_interval(secs => %(seconds)s))::delivery.procrastinate_job_to_defer_v1])
WHERE NOT EXISTS (SELECT FROM delivery.procrastinate_jobs WHERE queueing_lock = %(waits)s AND status = 'todo')
"""
_RECONNECT_SECONDS = 1.0
_GRACE_SECONDS = 3.0
_CANCEL_AGAIN_SECONDS = 10.0  # a plugin is given some seconds to end its call


class ProcrastinateDelivery:
    """Enqueues in the caller's transaction: the job exists exactly when the change it follows from does."""

    async def enqueue(self, connection: Any, tenant_id: UUID, run_id: UUID, *, after_seconds: float = 0.0) -> None:
        """Enqueue one drive job. Doubles are harmless: the run's lease decides.

        One that is for later is none beside another such job: a double of a run that waits would have a double, too.
        """
        if after_seconds <= 0:
            await connection.execute("SELECT delivery.enqueue_drive_v1(%s, %s)", [tenant_id, run_id])
            return
        named = {"tenant": tenant_id, "run": run_id, "waits": f"waits/{tenant_id}/{run_id}"}
        await connection.execute(_LATER, {**named, "queue": QUEUE, "task": TASK, "seconds": after_seconds})


async def deliver(dsn: str, drive: Drive, *, concurrency: int) -> None:
    """Receive drive jobs until cancelled, `concurrency` at once.

    A drive that fails is only logged: what was recorded stands, and recovery finds the run. When the database goes away
    the delivery engine ends, and is started anew until the database is back; the drives go on meanwhile.
    """
    async with _outliving(drive, concurrency) as start:
        while True:
            try:
                with kept_cancel():
                    await _deliver_while_connected(dsn, start, concurrency)
            except (ConnectorException, psycopg.Error) as error:
                reason = " ".join(str(error.__cause__ or error).split())
                logger.warning("the delivery of runs lost the database and starts anew: %s", reason)
            await asyncio.sleep(_RECONNECT_SECONDS)


async def _deliver_while_connected(dsn: str, start: Drive, concurrency: int) -> None:
    connector = _Connector(
        conninfo=driver_dsn(dsn),
        kwargs={"options": f"-c search_path={SCHEMA},pg_catalog"},
        min_size=1,
        max_size=4,
        timeout=_GRACE_SECONDS,
    )
    async with _engine(connector, start).open_async() as engine:
        await connector.execute_query_async(_FORGET_ABANDONED)
        working = asyncio.create_task(
            engine.run_worker_async(
                queues=[QUEUE],
                concurrency=concurrency,
                install_signal_handlers=False,
                delete_jobs="always",
                shutdown_graceful_timeout=0,
            )
        )
        try:
            await asyncio.wait({working, connector.deaf}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end([working], again_seconds=_CANCEL_AGAIN_SECONDS)
            if not working.cancelled():
                working.exception()  # nobody asks when the reason was another
        await (connector.deaf if connector.deaf.done() else working)


class _Connector(procrastinate.PsycopgConnector):
    """Says when its listening connection is gone for good: the engine would go on, and look for jobs now and then.

    `deaf` then holds the reason, and is how it is told: the engine itself would log it as an error of its own.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.deaf: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        """Listen until cancelled, or until the connection is lost and no other can be made."""
        try:
            await super().listen_notify(on_notification, channels)
        except ConnectorException as error:
            self.deaf.set_exception(error)
            self.deaf.exception()  # nobody asks any more when the engine is already ending


@asynccontextmanager
async def _outliving(drive: Drive, concurrency: int) -> AsyncIterator[Drive]:
    """Drives that outlive the delivery engine: a call in progress must not end because its job's connection did.

    At the end of the block they have a moment to come to theirs.
    """
    slots = asyncio.Semaphore(concurrency)
    drives: set[asyncio.Task[None]] = set()

    async def guarded(tenant_id: UUID, run_id: UUID) -> None:
        async with slots:
            try:
                await drive(tenant_id, run_id)
            except Exception:
                logger.exception("driving run %s failed; recovery will find it", run_id)

    async def start(tenant_id: UUID, run_id: UUID) -> None:
        task = asyncio.create_task(guarded(tenant_id, run_id), name=f"drive {run_id}")
        drives.add(task)
        task.add_done_callback(drives.discard)
        await asyncio.shield(task)

    try:
        yield start
    finally:
        if drives:
            await asyncio.wait(drives, timeout=_GRACE_SECONDS)
        await end(drives, again_seconds=_CANCEL_AGAIN_SECONDS)


def _engine(connector: _Connector, drive: Drive) -> procrastinate.App:
    engine = procrastinate.App(connector=connector)

    @engine.task(name=TASK, queue=QUEUE)
    async def drive_run(tenant_id: str, run_id: str) -> None:
        await drive(UUID(tenant_id), UUID(run_id))

    return engine
