"""Orders calls: by priority, then by submission, in parallel up to the slots of each instance. In memory only."""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from plugin_substrate.errors import CallNotStartedError, JobError, PluginCancelledError, PluginNotLoadedError
from plugin_substrate.interface import CallContext
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import CallResult
from plugin_substrate.queue.events import EventLog
from plugin_substrate.queue.job import Job, JobEvent, JobEventType, JobStatus, QueueStats

BeforeStart = Callable[[], Awaitable[bool]]

_LaneKey = tuple[str, str]  # instance, and the tenant when it has a worker of its own


@dataclass(kw_only=True)
class _Record:
    """A job with what only the queue needs to know of it."""

    job: Job
    plugin_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: CallContext
    lane: _LaneKey
    before_start: BeforeStart | None
    on_progress: Callable[[float, str], object] | None
    events: EventLog = field(default_factory=EventLog)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


@dataclass
class _Lane:
    """The jobs of one worker: those that wait, as a heap, and those that hold a slot."""

    waiting: list[tuple[int, int, str]] = field(default_factory=list)
    holding: set[str] = field(default_factory=set)


class JobQueue:
    """Starts jobs as soon as their tenant's worker has a free slot. Belongs to the manager's event loop; nothing polls.

    Jobs are never repeated, and nothing survives the process. The last ``max_history`` ended jobs can be asked for.
    """

    def __init__(self, manager: PluginManager, *, max_history: int = 100) -> None:
        self._manager = manager
        self._max_history = max_history
        self._order = itertools.count()
        self._records: dict[str, _Record] = {}
        self._history: OrderedDict[str, None] = OrderedDict()
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._running = False

    async def start(self) -> None:
        """Begin to start jobs; those submitted before wait until now."""
        self._running = True
        for key in list(self._lanes):
            self._dispatch(key)

    async def stop(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - how long to be patient, not how long to take
        """Start no more jobs, wait for those that run, then cancel them. Pending jobs wait for a new `start`."""
        self._running = False
        tasks = [record.task for record in self._records.values() if record.task is not None]
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout)
        if late:
            await asyncio.gather(*(self.cancel(record.job.id) for record in self._unfinished(late)))
            await asyncio.wait(late)

    async def submit(
        self,
        plugin_instance_id: str,
        /,
        *args: Any,
        priority: int = 0,
        owner: str = "",
        call: CallContext | None = None,
        before_start: BeforeStart | None = None,
        on_progress: Callable[[float, str], object] | None = None,
        **kwargs: Any,
    ) -> str:
        """Queue a call of ``execute(*args, **kwargs)`` and return the job's id; higher priorities go first.

        An instance that is not loaded is a `PluginNotLoadedError` here. ``before_start`` is awaited when a slot is free
        and the call would be sent next: a false answer or an exception ends the job as ``not_started``.
        """
        instance = self._manager.get_instance(plugin_instance_id)
        job = Job(id=uuid.uuid4().hex, plugin_instance_id=plugin_instance_id, owner=owner, priority=priority)
        context = call or CallContext(call_id=job.id)
        key = (plugin_instance_id, "" if instance.stateless else context.tenant_id)
        self._records[job.id] = _Record(
            job=job,
            plugin_name=instance.plugin_name,
            args=args,
            kwargs=kwargs,
            call=context,
            lane=key,
            before_start=before_start,
            on_progress=on_progress,
        )
        lane = self._lanes.setdefault(key, _Lane())
        heapq.heappush(lane.waiting, (-priority, next(self._order), job.id))
        self._dispatch(key)
        return job.id

    async def wait_for_job(self, job_id: str, timeout: float | None = None) -> Job:  # noqa: ASYNC109 - a promised name
        """Return the job when it has ended; a TimeoutError when it takes longer, a ValueError when it is unknown."""
        record = self._record(job_id)
        async with asyncio.timeout(timeout):
            await record.done.wait()
        return record.job

    def get_job(self, job_id: str) -> Job:
        """Return the job as it stands, with the reason why it waits; a ValueError when it is unknown."""
        job = self._record(job_id).job
        return replace(job, block_reason=self._block_reason(job)) if job.status is JobStatus.PENDING else job

    async def cancel(self, job_id: str) -> bool:
        """End a job: at once when it waits, through the plugin and then by force when it runs; False when it has ended.

        Returns when the job has ended. A result that arrives after the request is kept, but the job is ``cancelled``.
        """
        record = self._record(job_id)
        if record.job.status.terminal:
            return False
        if record.job.cancel_requested_at is None:
            record.job = replace(record.job, cancel_requested_at=datetime.now(UTC))
        if record.job.status is JobStatus.RUNNING:
            with suppress(PluginNotLoadedError):  # it is being unloaded, which ends the job too
                await self._manager.cancel_call(record.job.plugin_instance_id, record.call.call_id)
        elif record.task is not None:
            record.task.cancel()
        else:
            self._end(
                record, JobStatus.CANCELLED, error=_error(record, PluginCancelledError("cancelled while waiting"))
            )
            self._dispatch(record.lane)
        await record.done.wait()
        return record.job.status is JobStatus.CANCELLED

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the job's events numbered above ``after`` and those to come; ends after the terminal one."""
        return self._record(job_id).events.follow(after)

    def get_stats(self) -> QueueStats:
        """Count the jobs that wait and run, and the retained ones by how they ended."""
        counts = Counter(record.job.status for record in self._records.values())
        return QueueStats(**{f"total_{status.value}": counts[status] for status in JobStatus})

    # -- how a job goes

    def _dispatch(self, key: _LaneKey) -> None:
        """Give every free slot of a worker to the job that comes first."""
        lane = self._lanes[key]
        while self._running and lane.waiting and len(lane.holding) < self._slots(key[0]):
            job_id = heapq.heappop(lane.waiting)[2]
            record = self._records.get(job_id)
            if record is None or record.job.status is not JobStatus.PENDING:
                continue
            lane.holding.add(job_id)
            record.task = asyncio.get_running_loop().create_task(self._run(record))
            # A callback, not a finally: a task that is cancelled before its first step never enters its body.
            record.task.add_done_callback(functools.partial(self._release, record))
        if not lane.waiting and not lane.holding:
            del self._lanes[key]

    def _slots(self, instance_id: str) -> int:
        """How many jobs a worker takes; one where the instance is gone, so that its jobs fail in their turn."""
        with suppress(PluginNotLoadedError):
            return self._manager.get_instance(instance_id).max_concurrent_requests
        return 1

    async def _run(self, record: _Record) -> None:
        job = record.job
        try:
            result = await self._manager.execute_call(
                job.plugin_instance_id,
                *record.args,
                call=record.call,
                before_start=record.before_start,
                on_started=lambda: self._on_started(record),
                on_progress=lambda progress, message: self._on_progress(record, progress, message),
                on_usage=lambda usage: self._on_usage(record, usage),
                on_log=lambda line: record.events.append(record.job, JobEventType.LOG_APPENDED, {"line": line}),
                **record.kwargs,
            )
        except CallNotStartedError as error:
            cause = error.__cause__
            self._end(record, JobStatus.NOT_STARTED, error=_error(record, cause) if cause else None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's end
            cancelled = isinstance(error, PluginCancelledError) or record.job.cancel_requested_at is not None
            self._end(record, JobStatus.CANCELLED if cancelled else JobStatus.FAILED, error=_error(record, error))
        else:
            self._complete(record, result)

    def _release(self, record: _Record, task: asyncio.Task[None]) -> None:
        """Free the slot of a job whose task is over, and end the job if the task was cancelled."""
        record.task = None
        if task.cancelled() and not record.job.status.terminal:
            sent = record.job.started_at is not None
            text = "given up while it was running" if sent else "cancelled before it was sent"
            error = PluginCancelledError(text, outcome_known=not sent)
            self._end(record, JobStatus.CANCELLED, error=_error(record, error))
        self._lanes[record.lane].holding.discard(record.job.id)
        self._dispatch(record.lane)

    def _complete(self, record: _Record, result: CallResult) -> None:
        record.job = replace(record.job, result=result.value, usage=dict(result.usage))
        if record.job.cancel_requested_at is None:
            record.job = replace(record.job, progress=1.0)
            self._end(record, JobStatus.COMPLETED)
        else:
            late = PluginCancelledError("the plugin finished before it noticed the request; its result is kept")
            self._end(record, JobStatus.CANCELLED, error=_error(record, late))

    def _on_started(self, record: _Record) -> None:
        record.job = replace(record.job, started_at=datetime.now(UTC))
        self._move(record, JobStatus.RUNNING)

    def _on_progress(self, record: _Record, progress: float, message: str) -> None:
        record.job = replace(record.job, progress=progress, status_message=message)
        payload = {"progress": progress, "status_message": message}
        record.events.append(record.job, JobEventType.PROGRESS_CHANGED, payload)
        if record.on_progress is not None:
            record.on_progress(progress, message)

    def _on_usage(self, record: _Record, usage: dict[str, float]) -> None:
        record.job = replace(record.job, usage=usage)

    def _move(self, record: _Record, status: JobStatus) -> None:
        before = record.job.status
        record.job = replace(record.job, status=status)
        record.events.append(record.job, JobEventType.STATE_TRANSITION, {"from": before.value, "to": status.value})

    def _end(self, record: _Record, status: JobStatus, *, error: JobError | None = None) -> None:
        record.job = replace(record.job, completed_at=datetime.now(UTC), error=error)
        record.args, record.kwargs = (), {}
        self._move(record, status)
        record.done.set()
        self._history[record.job.id] = None
        while len(self._history) > self._max_history:
            forgotten, _ = self._history.popitem(last=False)
            del self._records[forgotten]

    def _block_reason(self, job: Job) -> str:
        lane = self._lanes[self._record(job.id).lane]
        if not self._running:
            return "the queue is not started"
        if job.id in lane.holding:
            return f"{job.plugin_instance_id!r} is being made ready, or the call waits to be allowed"
        slots = self._slots(job.plugin_instance_id)
        mine = next(entry for entry in lane.waiting if entry[2] == job.id)
        ahead = sum(1 for entry in lane.waiting if entry < mine and self._is_pending(entry[2]))
        holders = ", ".join(sorted(lane.holding))
        return f"all {slots} slots of {job.plugin_instance_id!r} are held by {holders}; {ahead} jobs go first"

    def _is_pending(self, job_id: str) -> bool:
        return job_id in self._records and self._records[job_id].job.status is JobStatus.PENDING

    def _record(self, job_id: str) -> _Record:
        try:
            return self._records[job_id]
        except KeyError:
            raise ValueError(
                f"there is no job {job_id!r}; of ended jobs the last {self._max_history} are kept"
            ) from None

    def _unfinished(self, tasks: set[asyncio.Task[None]]) -> list[_Record]:
        return [record for record in self._records.values() if record.task in tasks]


def _error(record: _Record, error: BaseException) -> JobError:
    return JobError.from_exception(
        error, plugin_name=record.plugin_name, plugin_instance_id=record.job.plugin_instance_id
    )
