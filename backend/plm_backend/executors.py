"""The Executor port over plugins: the only place where the engine and plugin_substrate meet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from plm_engine_core.agent_runtime import Call, Progress
from plm_engine_core.agent_runtime.executor import ARGUMENTS_REFUSED
from plm_engine_core.control_plane import Begun, Grant, Outcome
from plm_engine_core.control_plane.errors import NotFound, StorageUnavailable
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.storage.ports import RunStore
from plugin_substrate.errors import PluginError, PluginNotLoadedError
from plugin_substrate.interface import CallContext
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.queue import Job, JobQueue

from plm_backend.artifacts import Artifacts
from plm_backend.file_exchange import FileExchange
from plm_backend.outcomes import not_started, outcome_of, result_lost

logger = logging.getLogger(__name__)

Reports = asyncio.Queue[tuple[float, str] | None]


@dataclass(kw_only=True, eq=False)
class _Attempt:
    """One granted call on its way: what its job, its canceller and its outcome need to know of each other."""

    job_id: str = ""
    cancelled: bool = False
    refusal: Begun | None = None
    timed_out: bool = False
    left_host: asyncio.Event = field(default_factory=asyncio.Event)


class PluginExecutor:
    """Carries granted calls out through the JobQueue.

    `begin` is awaited by the queue when a slot is free, as the last act before the call's frame is written; from then
    on the capability's time runs. Artifact references become files on the way in; files become artifacts on the way
    out.
    """

    def __init__(
        self,
        *,
        manager: PluginManager,
        queue: JobQueue,
        artifacts: Artifacts,
        runs: RunStore,
        concurrency: int = 1,
        confidential: frozenset[str] = frozenset(),
    ) -> None:
        self._manager = manager
        self._queue = queue
        self._files = FileExchange(artifacts=artifacts, runs=runs)
        self._concurrency = concurrency
        self._confidential = confidential
        self._attempts: dict[UUID, _Attempt] = {}

    def offers(self, capability: CapabilityDescriptor) -> bool:
        """Whether this node has the plugin and the plugin serves the capability."""
        meta = self._manager.get_discovered_meta(capability.plugin)
        return meta is not None and capability.id in meta.capabilities

    async def execute(self, call: Call, grant: Grant, progress: Progress) -> Outcome:
        """Load the plugin if need be, queue the call, and say what became of it."""
        meta = self._manager.get_discovered_meta(call.capability.plugin)
        if meta is None:
            return not_started("plugin_missing", f"plugin {call.capability.plugin} is not installed on this node")
        attempt = self._attempts[grant.id] = _Attempt()
        try:
            try:
                arguments = await self._files.inward(call)
            except (NotFound, FileNotFoundError, ValueError) as error:
                return not_started(ARGUMENTS_REFUSED, str(error))
            except (StorageUnavailable, OSError) as error:
                return not_started("files_not_ready", str(error))
            try:
                instance_id = await self._instance(meta, call.tenant_id)
            except (PluginError, OSError) as error:
                return not_started("plugin_not_ready", str(error))
            async with _relay(progress) as reports:
                job = await self._run(call, grant, instance_id, arguments, attempt, reports)
        finally:
            del self._attempts[grant.id]
        layers = self._layers(instance_id, str(call.tenant_id))
        outcome = outcome_of(call.capability, job, refusal=attempt.refusal, timed_out=attempt.timed_out, layers=layers)
        try:
            return await self._files.outward(call, outcome)
        except (OSError, ValueError) as error:
            return result_lost(call.capability, outcome, error)

    async def cancel(self, grant: Grant) -> None:
        """Cancel the call of a grant: at once while it waits, through the plugin and then by force while it runs."""
        attempt = self._attempts.get(grant.id)
        if attempt is None:
            return
        attempt.cancelled = True
        if attempt.job_id:
            await self._queue.cancel(attempt.job_id)

    async def _run(
        self,
        call: Call,
        grant: Grant,
        instance_id: str,
        arguments: Mapping[str, Any],
        attempt: _Attempt,
        reports: Reports,
    ) -> Job:
        async def before_start() -> bool:
            if attempt.cancelled:
                return False
            begun = await call.begin()
            if begun.accepted:
                attempt.left_host.set()
            else:
                attempt.refusal = begun
            return begun.accepted

        attempt.job_id = await self._queue.submit(
            instance_id,
            owner=str(call.tenant_id),
            call=CallContext(
                call_id=str(grant.id),
                tenant_id=str(call.tenant_id),
                run_id=str(call.run_id),
                step_key=call.step_key,
                traceparent=call.traceparent,
                confidential=call.capability.plugin in self._confidential,
            ),
            before_start=before_start,
            on_progress=lambda fraction, message: reports.put_nowait((fraction, message)),
            action=call.capability.id,
            **arguments,
        )
        try:
            return await self._ended(attempt, call.capability.timeout_seconds)
        except asyncio.CancelledError:
            await self._queue.cancel(attempt.job_id)
            raise

    async def _ended(self, attempt: _Attempt, seconds: float) -> Job:
        """The job when it has ended; its time runs from when the call left the host, not while it waited for a slot."""
        ended = asyncio.create_task(self._queue.wait_for_job(attempt.job_id))
        left_host = asyncio.create_task(attempt.left_host.wait())
        try:
            await asyncio.wait({ended, left_host}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({ended}, timeout=seconds)
            if not ended.done():
                attempt.timed_out = True
                await self._queue.cancel(attempt.job_id)
            return await ended
        finally:
            ended.cancel()
            left_host.cancel()

    async def _instance(self, meta: PluginMeta, tenant_id: UUID) -> str:
        """The plugin, loaded; its manager gives each tenant a worker of its own, unless the plugin is stateless."""
        loaded = await self._manager.load_plugin_async(
            meta, tenant_id=str(tenant_id), max_concurrent_requests=self._concurrency
        )
        return loaded.instance_id

    def _layers(self, instance_id: str, tenant_id: str) -> tuple[str, ...]:
        """What confines the worker that serves a tenant; nothing is claimed of one that is gone."""
        try:
            workers = self._manager.get_instance(instance_id).workers
        except PluginNotLoadedError:
            return ()
        return next((each.layers for each in workers if each.shared or each.tenant_id == tenant_id), ())


@asynccontextmanager
async def _relay(progress: Progress) -> AsyncIterator[Reports]:
    """A queue whose reports are passed on in order, only the newest of those that piled up; the last one always is."""
    reports: Reports = asyncio.Queue()

    async def pass_on() -> None:
        while (newest := await reports.get()) is not None:
            ended = False
            while not (ended or reports.empty()):
                later = reports.get_nowait()
                newest, ended = (newest, True) if later is None else (later, False)
            try:
                await progress(*newest)
            except Exception:
                logger.exception("a progress report could not be passed on")
            if ended:
                return

    relay = asyncio.create_task(pass_on())
    try:
        yield reports
        reports.put_nowait(None)
        await relay
    finally:
        relay.cancel()
