"""The Executor port over plugins: the only place where the engine and plugin_substrate meet."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

from plm_engine_core.agent_runtime import Call, Progress
from plm_engine_core.control_plane import ArtifactRecord, Begun, Grant, Outcome
from plm_engine_core.control_plane.errors import ControlPlaneError
from plm_engine_core.control_plane.registry import CapabilityDescriptor
from plm_engine_core.control_plane.storage.ports import RunStore
from plm_engine_core.control_plane.vocabulary import OutcomeStatus
from plugin_substrate.errors import JobError, PluginError
from plugin_substrate.interface import CallContext, InputFile, OutputFile
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import PluginMeta
from plugin_substrate.queue import Job, JobQueue, JobStatus

from plm_backend.artifacts import REFERENCE, Artifacts, is_reference, reference

_MOST_USAGE = Decimal(10) ** 9
_MOST_UNITS = 100


class PluginExecutor:
    """Carries granted calls out through the JobQueue.

    `begin` is awaited by the queue when a slot is free, as the last act before the call's frame is written. Artifact
    references become files on the way in; files become artifacts on the way out.
    """

    def __init__(
        self,
        *,
        manager: PluginManager,
        queue: JobQueue,
        artifacts: Artifacts,
        runs: RunStore,
        concurrency: int = 1,
    ) -> None:
        self._manager = manager
        self._queue = queue
        self._artifacts = artifacts
        self._runs = runs
        self._concurrency = concurrency
        self._jobs: dict[UUID, str] = {}
        self._cancelled: set[UUID] = set()

    def offers(self, capability: CapabilityDescriptor) -> bool:
        """Whether this node has the plugin and the plugin serves the capability."""
        meta = self._manager.get_discovered_meta(capability.plugin)
        return meta is not None and capability.id in meta.capabilities

    async def execute(self, call: Call, grant: Grant, progress: Progress) -> Outcome:
        """Load the plugin if need be, queue the call, and say what became of it."""
        meta = self._manager.get_discovered_meta(call.capability.plugin)
        if meta is None:
            return _not_started("plugin_missing", f"plugin {call.capability.plugin} is not installed on this node")
        try:
            arguments = await self._files_in(call)
            instance_id = await self._instance(meta, call.tenant_id)
        except (PluginError, ControlPlaneError, OSError, ValueError) as error:
            return _not_started("plugin_not_ready", str(error))
        reports: asyncio.Queue[tuple[float, str]] = asyncio.Queue()
        relay = asyncio.create_task(_relay(reports, progress))
        refusals: list[Begun] = []
        try:
            job = await self._run(call, grant, instance_id, arguments, refusals, reports)
        finally:
            relay.cancel()
            self._jobs.pop(grant.id, None)
            self._cancelled.discard(grant.id)
        return await self._outcome(call, job, refusals, instance_id)

    async def cancel(self, grant: Grant) -> None:
        """Cancel the job of a grant: at once while it waits, through the plugin and then by force while it runs."""
        self._cancelled.add(grant.id)
        job_id = self._jobs.get(grant.id)
        if job_id is not None:
            await self._queue.cancel(job_id)

    async def _run(
        self,
        call: Call,
        grant: Grant,
        instance_id: str,
        arguments: Mapping[str, Any],
        refusals: list[Begun],
        reports: asyncio.Queue[tuple[float, str]],
    ) -> Job:
        async def before_start() -> bool:
            if grant.id in self._cancelled:
                return False
            begun = await call.begin()
            if not begun.accepted:
                refusals.append(begun)
            return begun.accepted

        job_id = await self._queue.submit(
            instance_id,
            owner=str(call.tenant_id),
            call=CallContext(
                call_id=str(grant.id),
                tenant_id=str(call.tenant_id),
                run_id=str(call.run_id),
                step_key=call.step_key,
                traceparent=call.traceparent,
            ),
            before_start=before_start,
            on_progress=lambda fraction, message: reports.put_nowait((fraction, message)),
            action=call.capability.id,
            **arguments,
        )
        self._jobs[grant.id] = job_id
        try:
            return await self._queue.wait_for_job(job_id, timeout=call.capability.timeout_seconds)
        except TimeoutError:
            await self._queue.cancel(job_id)
            return self._queue.get_job(job_id)

    async def _instance(self, meta: PluginMeta, tenant_id: UUID) -> str:
        """A worker serves one tenant, unless its plugin keeps nothing between calls."""
        instance_id = meta.name if meta.stateless else f"{meta.name[:31]}-{tenant_id.hex}"
        await self._manager.load_plugin_async(meta, instance_id=instance_id, max_concurrent_requests=self._concurrency)
        return instance_id

    async def _files_in(self, call: Call) -> dict[str, Any]:
        """The arguments with every artifact reference of this run replaced by its file."""

        async def walk(value: Any) -> Any:
            if is_reference(value):
                return await self._file(call, value)
            if isinstance(value, Mapping):
                return {key: await walk(each) for key, each in value.items()}
            if isinstance(value, list):
                return [await walk(each) for each in value]
            return value

        return {key: await walk(value) for key, value in call.arguments.items()}

    async def _file(self, call: Call, value: Mapping[str, Any]) -> InputFile:
        row = await self._runs.artifact(call.tenant_id, UUID(value[REFERENCE]))
        if row.run_id != call.run_id:
            raise ValueError(f"artifact {row.id} belongs to another run")
        data = await self._artifacts.fetch(call.tenant_id, row)
        if hashlib.sha256(data).hexdigest() != value.get("sha256"):
            raise ValueError(f"artifact {row.id} is not what was decided upon: its content hash differs")
        return InputFile(name=str(value.get("name", row.id)), mime_type=row.mime_type, data=data)

    async def _files_out(self, call: Call, value: Any, stored: list[ArtifactRecord]) -> Any:
        if isinstance(value, OutputFile):
            record = await self._artifacts.store(
                call.tenant_id, call.trace_id, name=value.name, mime_type=value.mime_type, data=value.data
            )
            stored.append(record)
            return reference(record)
        if isinstance(value, Mapping):
            return {str(key): await self._files_out(call, each, stored) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [await self._files_out(call, each, stored) for each in value]
        return value

    async def _outcome(self, call: Call, job: Job, refusals: list[Begun], instance_id: str) -> Outcome:
        usage = _usage(job.usage)
        layers = self._layers(instance_id)
        if job.status is JobStatus.NOT_STARTED or job.started_at is None:
            begun = refusals[0] if refusals else None
            if begun is not None:
                return _not_started(begun.reason.value if begun.reason else "refused", begun.message)
            return _not_started("not_started", job.error.message if job.error else "the call never left the host")
        if job.status is JobStatus.COMPLETED or job.result is not None:
            stored: list[ArtifactRecord] = []
            output = await self._files_out(call, job.result, stored)
            return Outcome(
                status=OutcomeStatus.SUCCEEDED, output=output, usage=usage, artifacts=tuple(stored), layers=layers
            )
        status = OutcomeStatus.CANCELLED if job.status is JobStatus.CANCELLED else OutcomeStatus.FAILED
        if job.error is not None and not job.error.outcome_known:
            status = OutcomeStatus.SUPERSEDED if call.capability.idempotent else OutcomeStatus.OUTCOME_UNKNOWN
        return Outcome(status=status, error=_error(job.error), usage=usage, layers=layers)

    def _layers(self, instance_id: str) -> tuple[str, ...]:
        for instance in self._manager.list_instances():
            if instance.instance_id == instance_id:
                return instance.layers
        return ()


async def _relay(reports: asyncio.Queue[tuple[float, str]], progress: Progress) -> None:
    """Pass reports on in order, only the newest of those that piled up."""
    while True:
        fraction, message = await reports.get()
        while not reports.empty():
            fraction, message = reports.get_nowait()
        await progress(fraction, message)


def _usage(reported: Mapping[str, float]) -> dict[str, Decimal] | None:
    """What the plugin measured, or None when it reports what cannot be: then the reservation is charged."""
    usage = {str(unit)[:100]: Decimal(str(amount)) for unit, amount in reported.items()}
    sane = all(amount.is_finite() and 0 <= amount <= _MOST_USAGE for amount in usage.values())
    return usage if sane and len(usage) <= _MOST_UNITS else None


def _not_started(category: str, message: str) -> Outcome:
    return Outcome(status=OutcomeStatus.NOT_STARTED, error={"category": category, "message": message})


def _error(error: JobError | None) -> dict[str, Any]:
    if error is None:
        return {"category": "fatal", "message": "the plugin gave no reason"}
    return {
        "category": str(getattr(error.category, "value", error.category)),
        "message": error.message,
        "plugin": error.plugin_name,
        "retriable": error.retriable,
        "fields_invalid": list(error.fields_invalid or ()),
    }
