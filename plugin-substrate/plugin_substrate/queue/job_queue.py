"""Orders calls and starts them as slots and resources allow: the public verbs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from plugin_substrate.arguments import any_files, with_paths
from plugin_substrate.errors import PluginCancelledError, PluginInputError
from plugin_substrate.interface import CallContext
from plugin_substrate.manager import PluginManager
from plugin_substrate.queue.desk import Desk
from plugin_substrate.queue.dispatcher import Dispatcher
from plugin_substrate.queue.job import Job, JobEvent, JobStatus, QueueStats
from plugin_substrate.queue.journal import Journal
from plugin_substrate.queue.memory_store import InMemoryJobStore
from plugin_substrate.queue.request import BeforeStart, JobRequest, OnProgress, RetryPolicy, check_priority
from plugin_substrate.queue.resources import MachineResources
from plugin_substrate.queue.sequences import JobSequence, SequenceStep
from plugin_substrate.queue.store import Answered, JobFilter, JobStore, KeptJob
from plugin_substrate.telemetry import ResourceSnapshot


class JobQueue:
    """Starts jobs as soon as their tenant's worker has a free slot and the machine what they need.

    Belongs to the manager's event loop. The last ``max_history`` ended jobs, none older than ``max_age_seconds``, can
    be asked for; what happens is kept in ``store``, which is in memory unless another is given. A level of priority
    counts as much as ``ageing_seconds`` of waiting. ``retry`` is for jobs that bring no policy of their own: without
    one no job is ever sent twice. With ``snapshot_seconds`` running jobs are measured that often.
    """

    def __init__(
        self,
        manager: PluginManager,
        *,
        store: JobStore | None = None,
        resources: MachineResources | None = None,
        retry: RetryPolicy | None = None,
        max_history: int = 100,
        max_age_seconds: float | None = None,
        max_log_events: int = 1000,
        ageing_seconds: float = 60.0,
        patience_seconds: float = 30.0,
        snapshot_seconds: float | None = None,
    ) -> None:
        if ageing_seconds <= 0 or max_history < 0:
            raise ValueError(
                f"ageing_seconds {ageing_seconds} must be over 0, and max_history {max_history} at least 0"
            )
        self._manager = manager
        self._max_history = max_history
        self._journal = Journal(
            store or InMemoryJobStore(),
            max_history=max_history,
            max_age_seconds=max_age_seconds,
            max_log_events=max_log_events,
        )
        self._jobs = Dispatcher(
            manager,
            self._journal,
            resources=resources or MachineResources.of_this_machine(),
            retry=retry,
            ageing_seconds=ageing_seconds,
            patience_seconds=patience_seconds,
            snapshot_seconds=snapshot_seconds,
        )

        self._desk = Desk(self, self._journal.store)

    # -- from start to stop

    async def start(self) -> None:
        """Begin to start jobs; those submitted before, or left by an earlier host, wait until now.

        What that host was running is tried again where its plugin declares itself ``idempotent``, and ``interrupted``
        where not. Jobs of instances that are not loaded wait until one is submitted for them, or for the next `start`.
        """
        self._jobs.begin()
        self._desk.open()

    async def stop(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - how long to be patient, not how long to take
        """Start no more jobs, wait for those that run, then cancel them. Pending jobs wait for a new `start`."""
        self._jobs.running = False
        tasks = {live.task: live for live in self._journal.live.awake() if live.task is not None}
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=timeout)
        if late:
            await asyncio.gather(*(self.cancel(tasks[task].job.id) for task in late))
            await asyncio.wait(late)

    async def close(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - as above
        """Stop, and give the store up. Pending jobs stay pending in it, if it outlives this process."""
        await self._desk.close()
        await self.stop(timeout)
        for live in self._journal.live.awake():
            live.stop_all()
        self._journal.stop()
        await self._journal.store.close()

    async def __aenter__(self) -> JobQueue:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- asking for work

    async def submit(
        self,
        plugin_instance_id: str,
        /,
        *args: Any,
        priority: int = 0,
        owner: str = "",
        call: CallContext | None = None,
        before_start: BeforeStart | None = None,
        on_progress: OnProgress | None = None,
        **kwargs: Any,
    ) -> str:
        """Queue a call of ``execute(*args, **kwargs)`` and return the job's id, see `submit_request`."""
        request = JobRequest(
            plugin_instance_id=plugin_instance_id,
            args=args,
            kwargs=kwargs,
            priority=priority,
            owner=owner,
            call=call,
            before_start=before_start,
            on_progress=on_progress,
        )
        return await self.submit_request(request)

    async def submit_request(self, request: JobRequest) -> str:
        """Queue a call and return the job's id, once the job is kept.

        Refused are an instance that is not loaded (`PluginNotLoadedError`) or is disabled (`PluginDisabledError`), a
        job that is too big for this machine (`PluginResourceError`, with the numbers), and arguments that the store
        cannot keep (`WireValueError`).

        ``before_start`` is awaited when a slot is free and the call would be sent next: a false answer or an exception
        ends the job as ``not_started``. A permission cannot be asked for after a restart, so a store that outlives the
        process takes no such job (`PluginInputError`).
        """
        self._jobs.open()
        if self._journal.store.durable and request.before_start is not None:
            raise PluginInputError("before_start needs a store in memory", fields_invalid=["before_start"])
        if any_files(request.args, request.kwargs):
            args, kwargs = await with_paths(request.args, request.kwargs)
            request = replace(request, args=args, kwargs=kwargs)
        await self._jobs.learn(request.plugin_instance_id)
        live, changes = self._jobs.make(request)
        await self._jobs.submitted(live, changes)
        return live.job.id

    async def submit_asked(self, request: JobRequest, request_id: str) -> None:
        """Queue a call that somebody outside asked for, and keep the answer, ``{"job_id": …}``, together with it."""
        await self._jobs.learn(request.plugin_instance_id)
        live, changes = self._jobs.make(request)
        await self._jobs.submitted(live, [*changes, Answered(request_id, {"job_id": live.job.id})])

    async def submit_sequence(
        self, steps: Sequence[SequenceStep], *, priority: int = 0, owner: str = "", fail_fast: bool = True
    ) -> str:
        """Queue calls that go one after another, and return the sequence's id.

        A step may use what earlier ones gave, see `FromStep`. With ``fail_fast`` none follows one that failed, else all
        are tried; none ever follows one that was cancelled. Every step is checked now as `submit_request` does, and a
        step that cannot be submitted when its turn comes has failed. No step is a completed sequence.
        """
        self._jobs.open()
        steps = [await _with_paths(step) for step in steps]
        sequence, live, changes = self._jobs.sequencer.begin(
            tuple(steps), priority=priority, owner=owner, fail_fast=fail_fast
        )
        if live is not None:
            await self._jobs.submitted(live, changes)
        elif (kept := self._journal.write(changes)) is not None:
            await asyncio.shield(kept)
        return sequence.id

    async def submit_uniform_sequence(
        self,
        plugin_instance_id: str,
        args_list: Sequence[Sequence[Any]] | None = None,
        kwargs_list: Sequence[Mapping[str, Any]] | None = None,
        *,
        priority: int = 0,
        owner: str = "",
        fail_fast: bool = True,
    ) -> str:
        """Queue calls of one instance, one after another; a ValueError when the lists differ in length."""
        count = len(args_list if args_list is not None else kwargs_list or ())
        all_args = [()] * count if args_list is None else args_list
        all_kwargs: Sequence[Mapping[str, Any]] = [{}] * count if kwargs_list is None else kwargs_list
        if len(all_args) != len(all_kwargs):
            raise ValueError(f"args_list has {len(all_args)} entries, and kwargs_list {len(all_kwargs)}")
        steps = [
            SequenceStep(plugin_instance_id=plugin_instance_id, args=tuple(args), kwargs=kwargs)
            for args, kwargs in zip(all_args, all_kwargs, strict=True)
        ]
        return await self.submit_sequence(steps, priority=priority, owner=owner, fail_fast=fail_fast)

    async def reorder(self, job_id: str, priority: int) -> bool:
        """Give a job another priority; False when it waits no longer, a ValueError as of `JobRequest`."""
        check_priority(priority)
        live = self._journal.live.get(job_id)
        if live is None:
            self._kept(job_id)
            return False
        if job_id not in self._jobs.waiting:
            return False
        live.job = replace(live.job, priority=priority)
        self._jobs.waiting.reorder(job_id, self._jobs.rank(live))
        kept = self._journal.write([self._journal.changed(live)])
        self._journal.live.let_wait(live)
        if kept is not None:
            await asyncio.shield(kept)
        return True

    async def retry(self, job_id: str) -> str:
        """Submit an ended job again, as a new one whose id is returned.

        A ValueError when it is unknown, has not ended, or its arguments are kept no longer.
        """
        return await self.submit_request(self.again(job_id))

    def again(self, job_id: str) -> JobRequest:
        """Return the request of an ended job, as a new one; errors as of `retry`."""
        kept = self._kept(job_id)
        if not kept.job.status.terminal:
            raise ValueError(f"job {job_id!r} has not ended: it is {kept.job.status.value}")
        if not self._journal.store.keeps_arguments:
            raise ValueError(f"the arguments of job {job_id!r} are no longer kept; submit it anew")
        call = kept.request.call
        if call is not None:
            call = replace(call, call_id=uuid.uuid4().hex)
        return replace(kept.request, call=call, priority=kept.job.priority)

    async def cancel(self, job_id: str) -> bool:
        """End a job: at once when it waits, through the plugin and then by force when it runs; False when it has ended.

        Returns when the job has ended. A result that arrives after the request is kept, but the job is ``cancelled``.
        """
        live = self._journal.live.get(job_id)
        if live is None or live.job.status.terminal:
            self._kept(job_id)
            return False
        if live.job.cancel_requested_at is None:
            live.job = replace(live.job, cancel_requested_at=datetime.now(UTC))
        if live.sent and live.task is not None:
            await self._jobs.runner.cancel(live)
        elif live.task is not None:
            live.task.cancel()
        else:
            self._jobs.take_out(live)
            error = PluginCancelledError("cancelled while waiting")
            self._jobs.end(live, JobStatus.CANCELLED, error=self._jobs.runner.error_of(live, error))
        await live.done.wait()
        return live.job.status is JobStatus.CANCELLED

    async def cancel_sequence(self, sequence_id: str) -> bool:
        """End a sequence with its current step; False when it has ended."""
        if sequence_id not in self._jobs.sequencer.running:
            self.get_sequence(sequence_id)
            return False
        current = self._jobs.sequencer.ask_to_cancel(sequence_id)
        if current in self._journal.live:
            await self.cancel(current)
        return True

    # -- asking what happens

    async def wait_for_job(self, job_id: str, timeout: float | None = None) -> Job:  # noqa: ASYNC109 - a promised name
        """Return the job when it has ended; a TimeoutError when it takes longer, a ValueError when it is unknown."""
        live = self._journal.live.get(job_id)
        if live is None:
            return self._kept(job_id).job
        async with asyncio.timeout(timeout):
            await live.done.wait()
        if self._journal.failure is not None:
            raise self._journal.failure
        kept = self._journal.store.job(job_id)
        return live.job if kept is None else kept.job

    async def wait_for_sequence(self, sequence_id: str, timeout: float | None = None) -> JobSequence:  # noqa: ASYNC109
        """Return the sequence when it has ended; errors as of `wait_for_job`."""
        async with asyncio.timeout(timeout):
            while not (sequence := self.get_sequence(sequence_id)).status.terminal:
                await self.wait_for_job(sequence.current_job_id or "")
        return sequence

    def get_job(self, job_id: str) -> Job:
        """Return the job as it stands, with the reason why it waits; a ValueError when it is unknown."""
        live = self._journal.live.get(job_id)
        if live is None:
            return self._kept(job_id).job
        if live.job.status is JobStatus.PENDING:
            shown = self._journal.shown(live, block_reason=self._jobs.why(live))
            self._journal.live.let_wait(live)
            return shown
        return self._journal.shown(live)

    def get_sequence(self, sequence_id: str) -> JobSequence:
        """Return the sequence as it stands; a ValueError when it is unknown."""
        sequence = self._jobs.sequencer.running.get(sequence_id) or self._journal.store.sequence(sequence_id)
        if sequence is None:
            raise ValueError(f"there is no sequence {sequence_id!r:.80}; as many are kept as jobs")
        return sequence

    def get_pending(self) -> list[Job]:
        """Return the jobs that wait, the order of their ranks; between owners the shares decide."""
        return self._jobs.pending()

    def get_running(self) -> list[Job]:
        """Return the jobs whose calls are in a worker."""
        return [
            self._journal.shown(live) for live in self._journal.live.awake() if live.job.status is JobStatus.RUNNING
        ]

    def get_history(self, limit: int | None = None) -> list[Job]:
        """Return ended jobs, those submitted last first."""
        ended = [status for status in JobStatus if status.terminal]
        return self._journal.store.jobs(JobFilter(statuses=ended), self._max_history if limit is None else limit)

    def get_stats(self) -> QueueStats:
        """Count the jobs that wait and run, and the retained ones by how they ended."""
        return QueueStats(**{f"total_{status.value}": self._journal.count(status) for status in JobStatus})

    def get_state(self) -> dict[str, Any]:
        """Return what a user interface shows: running and pending jobs, the last 20 that ended, and the counts."""
        return {
            "running": self.get_running(),
            "pending": self.get_pending(),
            "history": self.get_history(20),
            "stats": self.get_stats(),
        }

    def get_job_logs(self, job_id: str, lines: int = 100) -> str:
        """Return the last lines that the plugin wrote in a job, as far as its instance's log still has them."""
        kept = self._kept(job_id)
        call_id, tenant = kept.job.id, ""
        if kept.request.call is not None:
            call_id, tenant = kept.request.call.call_id, kept.request.call.tenant_id
        text = self._manager.get_plugin_logs(kept.job.plugin_instance_id, 100_000, tenant_id=tenant)
        found = [line for line in text.splitlines() if line.partition(" | ")[0].endswith(f" {call_id}")]
        return "\n".join(found[-lines:])

    def get_resource_snapshot(self, job_id: str) -> ResourceSnapshot | None:
        """Return what the job's instance took when it was measured last, None when it was not."""
        return self.get_job(job_id).last_resource_snapshot

    def events(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the job's events numbered above ``after`` and those to come; ends after the terminal one.

        They are read from the store: who is slow loses none. A ValueError when the job is unknown.
        """
        self._kept(job_id)
        return self._journal.follow_job(job_id, after)

    def events_for_sequence(self, sequence_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield the events of a sequence's jobs whose position is above ``after``; ends with the sequence."""
        self.get_sequence(sequence_id)
        return self._journal.follow_sequence(sequence_id, after)

    def all_events(self, after: int | None = None) -> AsyncIterator[JobEvent]:
        """Yield the events of all jobs whose position is above ``after``, or those to come; never ends."""
        self._jobs.open()
        return self._journal.follow_all(after)

    # -- within

    def _kept(self, job_id: str) -> KeptJob:
        """Return a job from the store; a ValueError when there is none."""
        self._jobs.open()
        kept = self._journal.store.job(job_id)
        if kept is None:
            raise ValueError(f"there is no job {job_id!r:.80}; of ended jobs the last {self._max_history} are kept")
        return kept


async def _with_paths(step: SequenceStep) -> SequenceStep:
    """Return a step whose arguments can be kept, see `with_paths`."""
    if not any_files(step.args, step.kwargs):
        return step
    args, kwargs = await with_paths(step.args, step.kwargs)
    return replace(step, args=args, kwargs=kwargs)
