"""One attempt at one job: the call, what it tells meanwhile, and what its end means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from plugin_substrate.errors import (
    CallNotStartedError,
    JobError,
    PluginCancelledError,
    PluginError,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    WireValueError,
)
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import CallResult
from plugin_substrate.queue.job import CancelPhase, JobEventType, JobStatus
from plugin_substrate.queue.journal import Journal
from plugin_substrate.queue.live import LiveJob
from plugin_substrate.queue.request import RetryPolicy

End = Callable[..., None]


class Runner:
    """Carries out attempts. ``end(live, status, **changes)`` is told how a job ends."""

    def __init__(
        self,
        manager: PluginManager,
        journal: Journal,
        end: End,
        *,
        retry: RetryPolicy | None,
        snapshot_seconds: float | None,
    ) -> None:
        self._manager = manager
        self._journal = journal
        self._end = end
        self._retry = retry
        self._snapshot_seconds = snapshot_seconds
        self._cancels: set[asyncio.Task[Any]] = set()

    async def attempt(self, live: LiveJob) -> None:
        """Send a job's call, once, or after a shortage twice; then it has ended, or is to be tried again."""
        while True:
            live.sent = live.stalled = live.forced = False
            try:
                args, kwargs = self._journal.store.unpack(live.arguments)
                result = await self._manager.execute_call(
                    live.job.plugin_instance_id,
                    *args,
                    call=live.context,
                    before_start=partial(self._may_start, live),
                    on_started=partial(self._on_started, live),
                    on_progress=partial(self._on_progress, live),
                    on_usage=partial(self._on_usage, live),
                    on_log=partial(self._journal.log, live),
                    **kwargs,
                )
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this attempt's end
                live.stop_all()
                if await self._room_was_made(live, error):
                    continue
                self._on_error(live, error)
            else:
                live.stop_all()
                self._on_result(live, result)
            return

    async def cancel(self, live: LiveJob) -> None:
        """Have a job that was sent end: through its plugin, and by force when that takes too long."""
        self.phase(live, CancelPhase.COOPERATIVE)
        await self._cancel_call(live)

    def phase(self, live: LiveJob, phase: CancelPhase) -> None:
        """Note how far cancelling is; where nothing can be kept any more, it goes on all the same."""
        if self._journal.failure is None:
            self._journal.write(self.phases(live, phase))

    def phases(self, live: LiveJob, *phases: CancelPhase) -> list[Any]:
        """Return the changes that take cancelling through some phases."""
        changes: list[Any] = []
        for phase in phases:
            before = live.job.cancel_phase
            if before is phase:
                continue
            live.job = replace(live.job, cancel_phase=phase)
            payload = {"from": before.value if before else None, "to": phase.value}
            changes.append(self._journal.event(live, JobEventType.CANCEL_PHASE_CHANGED, payload))
        return [*changes, self._journal.changed(live)] if changes else []

    def error_of(self, live: LiveJob, error: BaseException) -> JobError:
        """Return an error as the job's record of it."""
        return JobError.from_exception(
            error, plugin_name=live.job.plugin_name, plugin_instance_id=live.job.plugin_instance_id
        )

    # -- while it runs

    async def _may_start(self, live: LiveJob) -> bool:
        """Ask whoever must allow it; where jobs outlive the host, have it known to run before it can do anything."""
        if live.request.before_start is not None and not await live.request.before_start():
            return False
        if self._journal.store.durable:
            kept = self._journal.write(self._started(live))
            if kept is not None:
                await asyncio.shield(kept)
        return live.job.cancel_requested_at is None

    def _on_started(self, live: LiveJob) -> None:
        live.sent = True
        if live.job.status is not JobStatus.RUNNING:
            self._journal.write(self._started(live))
        self._watch_silence(live)
        if self._snapshot_seconds is not None:
            live.snapshots = asyncio.get_running_loop().create_task(self._take_snapshots(live, self._snapshot_seconds))

    def _started(self, live: LiveJob) -> list[Any]:
        if live.job.status is JobStatus.RUNNING:  # it is sent once more after a shortage
            return []
        return self._journal.transition(
            live, JobStatus.RUNNING, started_at=datetime.now(UTC), block_reason=None, progress=0.0, status_message=""
        )

    def _on_progress(self, live: LiveJob, progress: float, message: str) -> None:
        self._watch_silence(live)
        self._journal.progress(live, progress, message)
        if live.request.on_progress is not None:
            live.request.on_progress(progress, message)

    def _on_usage(self, live: LiveJob, usage: dict[str, float]) -> None:
        live.job = replace(live.job, usage=usage)

    def _watch_silence(self, live: LiveJob) -> None:
        seconds = live.request.no_progress_seconds
        if seconds is not None:
            live.set_timer("silence", seconds, partial(self._on_silence, live))

    def _on_silence(self, live: LiveJob) -> None:
        live.stalled = True
        task = asyncio.get_running_loop().create_task(self._cancel_call(live))
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _cancel_call(self, live: LiveJob) -> None:
        def on_force() -> None:
            live.forced = True
            if live.job.cancel_phase is not None:
                self.phase(live, CancelPhase.FORCE)

        with suppress(PluginNotLoadedError):  # it is being unloaded, which ends the job too
            await self._manager.cancel_call(live.job.plugin_instance_id, live.context.call_id, on_force)

    async def _take_snapshots(self, live: LiveJob, seconds: float) -> None:
        with suppress(PluginError):  # it is being unloaded
            while True:
                await asyncio.sleep(seconds)
                self._journal.snapshot(
                    live, await self._manager.get_resource_snapshot_async(live.job.plugin_instance_id)
                )

    # -- how it ends

    def _on_result(self, live: LiveJob, result: CallResult) -> None:
        live.job = replace(live.job, usage=dict(result.usage))
        try:
            self._journal.store.check_result(result.value)
        except WireValueError as error:
            self._on_error(live, error)
            return
        if live.job.cancel_requested_at is None:
            self._end(live, JobStatus.COMPLETED, result=result.value, progress=1.0)
        else:
            late = PluginCancelledError("the plugin finished before it noticed the request; its result is kept")
            self._end(live, JobStatus.CANCELLED, result=result.value, error=self.error_of(live, late))

    def _on_error(self, live: LiveJob, error: Exception) -> None:
        cancelled = live.job.cancel_requested_at is not None
        if isinstance(error, CallNotStartedError) and not cancelled:
            cause = error.__cause__
            self._end(live, JobStatus.NOT_STARTED, error=self.error_of(live, cause) if cause else None)
            return
        if live.stalled and not cancelled:
            error = self._silent(live, error)
        record = self.error_of(live, error)
        if cancelled or isinstance(error, PluginCancelledError):
            self._end(live, JobStatus.CANCELLED, error=record)
        elif not self._try_again(live, record):
            self._end(live, JobStatus.FAILED, error=record)

    def _silent(self, live: LiveJob, error: Exception) -> PluginTimeoutError:
        seconds = live.request.no_progress_seconds
        silent = PluginTimeoutError(
            f"no progress was reported for {seconds} s (last: {live.job.progress:.0%} {live.job.status_message})",
            timeout_seconds=seconds,
            outcome_known=getattr(error, "outcome_known", False),
        )
        silent.__cause__ = error
        return silent

    def _try_again(self, live: LiveJob, error: JobError) -> bool:
        policy = live.request.retry or self._retry
        if policy is None:
            return False
        pause = policy.pause(error, live.job.retry_count, idempotent=live.idempotent or not live.sent)
        deadline = live.deadline
        if pause is None or (deadline is not None and datetime.now(UTC).timestamp() + pause >= deadline):
            return False
        self.again(live, error, pause)
        return True

    def again(self, live: LiveJob, error: JobError, pause: float) -> None:
        """Have a job wait for another attempt."""
        told = self._journal.last_progress(live)
        live.again_after = pause
        live.not_before = datetime.fromtimestamp(datetime.now(UTC).timestamp() + pause, UTC)
        count = live.job.retry_count + 1
        payload = {
            "attempt": count,
            "exception_repr": error.original_exc_repr,
            "exception_category": error.category.value,
            "wait_seconds": pause,
        }
        told.append(self._journal.event(live, JobEventType.RETRY_STARTED, payload))
        self._journal.write(
            [*told, *self._journal.transition(live, JobStatus.PENDING, started_at=None, retry_count=count)]
        )

    async def _room_was_made(self, live: LiveJob, error: Exception) -> bool:
        """After a shortage evict idle workers and replace this one, once, if the call may be repeated at all."""
        policy = live.request.retry or self._retry
        if (
            policy is None
            or not policy.on_shortage
            or live.met_shortage
            or not live.idempotent
            or live.job.cancel_requested_at is not None
            or not isinstance(error, PluginResourceError)
        ):
            return False
        live.met_shortage = True
        resource = error.resource_shortfall.resource if error.resource_shortfall else ""
        await self._manager.make_room(live.job.plugin_instance_id, resource, tenant_id=live.tenant_id)
        record = self.error_of(live, error)
        payload = {
            "attempt": live.job.retry_count + 1,
            "exception_repr": record.original_exc_repr,
            "exception_category": record.category.value,
            "wait_seconds": 0.0,
        }
        live.job = replace(live.job, retry_count=live.job.retry_count + 1)
        self._journal.write(
            [self._journal.event(live, JobEventType.RETRY_STARTED, payload), self._journal.changed(live)]
        )
        return True
