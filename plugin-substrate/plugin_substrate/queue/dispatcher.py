"""How jobs go: they wait, begin, are freed of their slots, and end; and what becomes of those an earlier host left."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

from plugin_substrate.errors import (
    PluginCancelledError,
    PluginDisabledError,
    PluginNotLoadedError,
    PluginResourceError,
    PluginTimeoutError,
    StoreError,
    WorkerDiedError,
)
from plugin_substrate.manager import PluginManager
from plugin_substrate.metadata import CallTerms
from plugin_substrate.queue.demands import Demands
from plugin_substrate.queue.job import BlockReason, CancelPhase, Job, JobEventType, JobStatus, new_id
from plugin_substrate.queue.journal import Journal
from plugin_substrate.queue.live import LiveJob
from plugin_substrate.queue.request import JobRequest, RetryPolicy
from plugin_substrate.queue.resources import NO_DEMAND, Ledger, MachineResources
from plugin_substrate.queue.runner import Runner
from plugin_substrate.queue.sequencer import Sequencer
from plugin_substrate.queue.store import Change, KeptJob, NewEvent
from plugin_substrate.queue.waiting import LaneKey, Rank, WaitingJobs

_logger = logging.getLogger(__name__)

#: A job under which so many hosts died is not tried again: it may be what killed them.
_MAX_RECOVERIES = 3

_NOT_STARTED = BlockReason(resource="queue", text="the queue is not started")


class Dispatcher:
    """Owns the live jobs of one queue. Belongs to one event loop; nothing polls."""

    def __init__(
        self,
        manager: PluginManager,
        journal: Journal,
        *,
        resources: MachineResources,
        retry: RetryPolicy | None,
        ageing_seconds: float,
        patience_seconds: float,
        snapshot_seconds: float | None,
    ) -> None:
        self.journal = journal
        self.runner = Runner(manager, journal, self.end, retry=retry, snapshot_seconds=snapshot_seconds)
        self.sequencer = Sequencer(journal, self.make, self.check)
        ledger = Ledger(resources)
        self.waiting = WaitingJobs(ledger, self._slots, patience=patience_seconds)
        self._manager = manager
        self._ageing = ageing_seconds
        self._demands = Demands(manager, ledger)
        self._parked: dict[str, dict[str, None]] = {}  # by instance, the jobs in order
        self._opened = False
        self.running = False

    def begin(self) -> None:
        """Start jobs from now on."""
        self.open()
        for instance_id in list(self._parked):
            self._unpark(instance_id)
        self.running = True
        self._begin_all(self.waiting.start_any(self._now()))

    async def learn(self, instance_id: str) -> None:
        """Learn what the calls of an instance took so far."""
        await self._demands.measure(instance_id)

    def make(
        self, request: JobRequest, *, sequence_id: str | None = None, sequence_index: int | None = None
    ) -> tuple[LiveJob, list[Change]]:
        """Make a job of a request, or refuse it; it takes its place at once, and starts when its changes are written.

        `withdraw` undoes it.
        """
        terms, arguments = self.check(request)
        self._unpark(request.plugin_instance_id)
        submitted_at, order = self.journal.submission_time(), self.journal.next_order()
        job_id = new_id(submitted_at)
        tenant_id = request.call.tenant_id if request.call is not None else ""
        rank = self._rank(submitted_at, request.priority, order)
        self.waiting.add(job_id, _lane(terms, tenant_id), request.owner, rank, self._demands.of(terms))
        job = Job(
            id=job_id,
            plugin_instance_id=request.plugin_instance_id,
            plugin_name=terms.plugin_name,
            owner=request.owner,
            priority=request.priority,
            submitted_at=submitted_at,
            sequence_id=sequence_id,
            sequence_index=sequence_index,
            block_reason=self._first_reason(job_id),
        )
        live = LiveJob(job=job, request=request, arguments=arguments, order=order, idempotent=terms.idempotent)
        self.journal.add(live)
        changes: list[Change] = [self.journal.new(live)]
        if job.block_reason is not None:
            changes.append(self._told_reason(live, job.block_reason))
        return live, changes

    def withdraw(self, live: LiveJob) -> None:
        """Forget a job that could not be kept."""
        self.waiting.remove(live.job.id)
        self.journal.discard(live)

    def check(self, request: JobRequest) -> tuple[CallTerms, bytes]:
        """Refuse what cannot be kept, and what is of an instance that is not there, not enabled, or needs too much.

        Returns the instance's terms and the packed arguments.
        """
        instance_id = request.plugin_instance_id
        terms = self._manager.terms_of(instance_id)
        if not terms.enabled:
            raise PluginDisabledError(
                f"{instance_id!r} is disabled; enable_plugin({instance_id!r}) makes it take jobs again",
                plugin_name=terms.plugin_name,
            )
        short = self._demands.too_big(terms)
        if short is not None:
            raise PluginResourceError(
                f"a job of {instance_id!r} needs {short.needed:g} of {short.resource}, and this machine has "
                f"{short.available:g}: it could never start",
                resource_shortfall=short,
                retriable=False,
            )
        return terms, self.journal.store.pack(request.args, request.kwargs)

    async def submitted(self, live: LiveJob, changes: list[Change]) -> None:
        """Have a new job kept and wait its turn."""
        try:
            kept = self.journal.write(changes)
        except BaseException:
            self.withdraw(live)
            self.sequencer.running.pop(live.job.sequence_id or "", None)
            raise
        self._go_on(live)
        if kept is not None:
            await asyncio.shield(kept)

    def _enqueue(self, live: LiveJob) -> None:
        """Have a job wait once more, or start it at once."""
        self._wait(live)
        self._go_on(live)

    def _wait(self, live: LiveJob) -> None:
        """Have a job take its place; where its instance is gone, so that it fails in its turn."""
        lane, demand = (live.job.plugin_instance_id, live.tenant_id), NO_DEMAND
        with suppress(PluginNotLoadedError):
            terms = self._manager.terms_of(live.job.plugin_instance_id)
            lane, demand = _lane(terms, live.tenant_id), self._demands.of(terms)
        self.waiting.add(live.job.id, lane, live.job.owner, self.rank(live), demand)

    def _go_on(self, live: LiveJob) -> None:
        """Start a job that has taken its place, or let it wait."""
        self._watch_deadline(live)
        if self.running:
            self._begin_all(self.waiting.start_next(self.waiting.lane_of(live.job.id), self._now()))
        if live.job.id in self.waiting:
            if live.job.block_reason is None:
                self._tell_reason(live, self._reason(live))
            self.journal.live.let_wait(live)

    def _begin_all(self, job_ids: Iterable[str]) -> None:
        if not self.running or self.journal.failure is not None:
            return
        loop = asyncio.get_running_loop()
        for job_id in job_ids:
            live = self.journal.live[job_id]
            live.stop_timer("deadline")
            live.began, live.again_after, live.not_before = loop.time(), None, None
            live.task = loop.create_task(self.runner.attempt(live))
            # A callback, not a finally: a task that is cancelled before its first step never enters its body.
            live.task.add_done_callback(functools.partial(self._release, live))

    def _release(self, live: LiveJob, task: asyncio.Task[None]) -> None:
        """Free the slot of a job whose attempt is over, and end the job if the task was cancelled."""
        live.task = None
        live.stop_all()
        if not live.job.status.terminal and (task.cancelled() or task.exception() is not None):
            self._end_broken(live, task)
        lane = self.waiting.end(live.job.id, self._now() - live.began)
        if live.again_after is not None and not live.job.status.terminal:
            self._watch_deadline(live)
            live.set_timer("again", live.again_after, functools.partial(self._enqueue, live))
        self._next(lane)

    def _next(self, lane: LaneKey) -> None:
        if not self.running:
            return
        self._begin_all(self.waiting.start_next(lane, self._now()))
        for job_id in self.waiting.heads():
            live = self.journal.live[job_id]
            self._tell_reason(live, self.waiting.reason(job_id))
            self.journal.live.let_wait(live)

    def _end_broken(self, live: LiveJob, task: asyncio.Task[None]) -> None:
        """End a job whose attempt did not end it: its task was cancelled, or met a fault of the queue."""
        if task.cancelled():
            text = "given up while it was running" if live.sent else "cancelled before it was sent"
            error: BaseException = PluginCancelledError(text, outcome_known=not live.sent)
            status = JobStatus.CANCELLED
        else:
            error, status = task.exception() or RuntimeError("unknown"), JobStatus.FAILED
            _logger.error("job %s met a fault of the queue", live.job.id, exc_info=error)
        self.end(live, status, error=self.runner.error_of(live, error))

    def end(self, live: LiveJob, status: JobStatus, **changes: Any) -> None:
        """Have a job end, and with it in one write what follows in its sequence."""
        live.stop_all()
        if live.job.status.terminal:
            return
        if not (live.sent or live.met_shortage or status is JobStatus.INTERRUPTED):
            changes["started_at"] = None
        journal = self.journal
        told = journal.last_progress(live)
        if live.job.cancel_phase is not None:
            reloading = (CancelPhase.RELOADING,) if live.forced else ()
            told += self.runner.phases(live, *reloading, CancelPhase.COMPLETED)
        told += journal.transition(live, status, completed_at=datetime.now(UTC), block_reason=None, **changes)
        following: LiveJob | None = None
        if live.job.sequence_id is not None:
            following, more = self.sequencer.after(live.job)
            told += more
        live.arguments = b""
        try:
            kept = journal.write(told)
        except StoreError:
            live.done.set()  # who waits is told of the store
            if following is not None:
                self.withdraw(following)
            return
        if kept is None:
            self._ended(live, None)
        else:
            kept.add_done_callback(functools.partial(self._ended, live))
        if following is not None:
            self._go_on(following)

    def _ended(self, live: LiveJob, kept: asyncio.Future[None] | None) -> None:
        """An end is kept: from here on the store is asked."""
        live.done.set()
        if kept is not None and kept.exception() is not None:
            return
        self.journal.discard(live)
        sequence_id = live.job.sequence_id
        if sequence_id is None:
            self.journal.retain(live.job)
        elif sequence_id not in self.sequencer.running:
            self._sequence_ended(sequence_id)

    def _sequence_ended(self, sequence_id: str) -> None:
        """From here on its jobs, which later steps could need, may be forgotten as others are."""
        sequence = self.journal.store.sequence(sequence_id)
        for step in sequence.results if sequence is not None else ():
            if (kept := self.journal.store.job(step.job_id)) is not None:
                self.journal.retain(kept.job)
        self.journal.retain_sequence(sequence_id)

    # -- while it waits

    def take_out(self, live: LiveJob) -> None:
        """Have a job wait no longer."""
        self.waiting.remove(live.job.id)
        self._parked.get(live.job.plugin_instance_id, {}).pop(live.job.id, None)

    def _watch_deadline(self, live: LiveJob) -> None:
        deadline = live.deadline
        if deadline is not None:
            left = max(0.0, deadline - datetime.now(UTC).timestamp())
            live.set_timer("deadline", left, functools.partial(self._too_late, live))

    def _too_late(self, live: LiveJob) -> None:
        if live.task is None and not live.job.status.terminal:
            self.take_out(live)
            seconds = (live.deadline or 0.0) - live.job.submitted_at.timestamp()
            error = PluginTimeoutError(f"it waited until its deadline, {seconds:.3f} s", timeout_seconds=seconds)
            self.end(live, JobStatus.FAILED, error=self.runner.error_of(live, error))

    def _tell_reason(self, live: LiveJob, reason: BlockReason) -> None:
        """Tell why a job waits, unless that is what was told last."""
        before = live.job.block_reason
        if self.journal.failure is not None or (before is not None and before.resource == reason.resource):
            return
        live.job = replace(live.job, block_reason=reason)
        self.journal.write([self._told_reason(live, reason), self.journal.changed(live)])

    def _told_reason(self, live: LiveJob, reason: BlockReason) -> NewEvent:
        return self.journal.event(live, JobEventType.BLOCK_REASON_CHANGED, reason.payload())

    def _first_reason(self, job_id: str) -> BlockReason | None:
        """Why a job waits that has just taken its place; None when it starts as soon as it is kept."""
        if not self.running:
            return _NOT_STARTED
        return None if self.waiting.would_start(job_id, self._now()) else self.waiting.reason(job_id)

    def why(self, live: LiveJob) -> BlockReason:
        """Say why a job waits, with how many go before it."""
        if self.journal.failure is None and self.running and live.job.id in self.waiting:
            return self.waiting.why(live.job.id)
        return self._reason(live)

    def _reason(self, live: LiveJob) -> BlockReason:
        """Why a job waits, in constant time."""
        name = live.job.plugin_instance_id
        if self.journal.failure is not None:
            return BlockReason(resource="queue", text=str(self.journal.failure))
        if not self.running:
            return _NOT_STARTED
        if live.job.id in self.waiting:
            return self.waiting.reason(live.job.id)
        if live.not_before is not None:
            when = live.not_before.isoformat(timespec="seconds")
            return BlockReason(resource="retry", text=f"attempt {live.job.retry_count + 1} begins at {when}")
        if live.task is not None:
            return BlockReason(resource="start", text=f"{name!r} is being made ready, or the call waits to be allowed")
        return BlockReason(resource="plugin", text=f"{name!r} is not loaded")

    def rank(self, live: LiveJob) -> Rank:
        """Return a job's place among those of its owner: priority is worth waiting time."""
        return self._rank(live.job.submitted_at, live.job.priority, live.order)

    def _rank(self, submitted_at: datetime, priority: int, order: int) -> Rank:
        return submitted_at.timestamp() - priority * self._ageing, order

    def pending(self) -> list[Job]:
        """Return the jobs that wait, in the order of their ranks, with their arguments."""
        found = [
            (self.rank(live), self.journal.shown(live))
            for live in self.journal.live.awake()
            if live.job.status is JobStatus.PENDING
        ]
        for folded in self.journal.live.folded():
            job, order = self.journal.shown_folded(folded)
            found.append((self._rank(job.submitted_at, job.priority, order), job))
        return [job for _, job in sorted(found, key=itemgetter(0))]

    def _slots(self, instance_id: str) -> int:
        """How many jobs a worker takes; one where the instance is gone, so that its jobs fail in their turn."""
        try:
            return self._manager.slots_of(instance_id)
        except PluginNotLoadedError:
            return 1

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- what an earlier host left

    def open(self) -> None:
        """Claim the store, once, and go on with what an earlier host left in it."""
        if self._opened:
            return
        left = self.journal.open()
        self._opened = True
        for sequence in left.sequences:
            self.sequencer.take_up(sequence)
        for kept in left.live:
            self._recover(kept)

    def _recover(self, kept: KeptJob) -> None:
        """Go on with a job: one that waited waits, one that ran is tried again or interrupted."""
        live = LiveJob(
            job=kept.job,
            request=kept.request,
            arguments=self.journal.store.pack(kept.job.args, kept.job.kwargs),
            order=kept.order,
            idempotent=kept.idempotent,
            events=kept.events,
            recoveries=kept.recoveries,
            not_before=kept.not_before,
        )
        self.journal.add(live)
        if kept.job.status is JobStatus.RUNNING:
            live.recoveries += 1
            error = self.runner.error_of(
                live, WorkerDiedError("the host ended while this job was running; what it did is not known")
            )
            cancelled = kept.job.cancel_requested_at is not None
            if not self._may_repeat(live) or cancelled or live.recoveries > _MAX_RECOVERIES:
                self.end(live, JobStatus.INTERRUPTED, error=error)
                return
            self.runner.again(live, error, 0.0)
            live.again_after = None
        self._watch_deadline(live)
        self._parked.setdefault(live.job.plugin_instance_id, {})[live.job.id] = None
        self.journal.live.let_wait(live)

    def _may_repeat(self, live: LiveJob) -> bool:
        """Whether the plugin declared itself idempotent then, and does so now if it is loaded."""
        try:
            return live.idempotent and self._manager.terms_of(live.job.plugin_instance_id).idempotent
        except PluginNotLoadedError:
            return live.idempotent

    def _unpark(self, instance_id: str) -> None:
        """Have jobs of an earlier host wait for their turn, if their instance is there."""
        if instance_id not in self._parked or not self._is_loaded(instance_id):
            return
        for job_id in self._parked.pop(instance_id):
            live = self.journal.live[job_id]
            pause = 0.0
            if live.not_before is not None:
                pause = (live.not_before - datetime.now(UTC)).total_seconds()
            if pause > 0:
                self._watch_deadline(live)
                live.set_timer("again", pause, functools.partial(self._enqueue, live))
            else:
                self._wait(live)
                self._watch_deadline(live)
                self.journal.live.let_wait(live)
        if self.running:
            self._begin_all(self.waiting.start_any(self._now()))

    def _is_loaded(self, instance_id: str) -> bool:
        try:
            self._manager.slots_of(instance_id)
        except PluginNotLoadedError:
            return False
        return True


def _lane(terms: CallTerms, tenant_id: str) -> LaneKey:
    """Whose slots a job takes: those of its tenant's worker, or of the one that all share."""
    return terms.instance_id, "" if terms.stateless else tenant_id
