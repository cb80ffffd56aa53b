"""The live jobs of a queue and what happens to them: numbered, kept in the store, and told to those who follow."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from plugin_substrate.errors import StoreError
from plugin_substrate.interface import CallContext
from plugin_substrate.queue.job import Job, JobEvent, JobEventType, JobStatus
from plugin_substrate.queue.request import JobRequest
from plugin_substrate.queue.resources import NO_DEMAND, Demand
from plugin_substrate.queue.store import (
    Change,
    ChangedJob,
    Ended,
    Forget,
    ForgetSequence,
    JobStore,
    Leftover,
    NewEvent,
)
from plugin_substrate.queue.waiting import LaneKey

_logger = logging.getLogger(__name__)

#: Reports of progress become events as they come up to this many, then at most one in `_PROGRESS_SECONDS`, the latest.
_PROGRESS_BURST = 100
_PROGRESS_SECONDS = 0.1
_BATCH = 200
_ALL = ""  # the key of those who follow everything

Follow = Callable[[int, int], list[JobEvent]]


def context_of(job: Job, request: JobRequest) -> CallContext:
    """Return what the calls of a job are told of themselves."""
    call = request.call or CallContext(call_id=job.id, step_key=job.id)
    if request.deadline_seconds is None:
        return call
    deadline = job.submitted_at.timestamp() + request.deadline_seconds
    return replace(call, deadline=min(deadline, call.deadline or deadline))


@dataclass(kw_only=True, eq=False, slots=True)
class LiveJob:
    """A job that has not ended, with what only the queue needs to know of it.

    A long queue is many of these, and the collector of garbage goes over each: what a waiting job has no use for yet is
    made when it is needed, and what many can share is shared.
    """

    job: Job
    request: JobRequest
    lane: LaneKey
    order: int
    demand: Demand = NO_DEMAND
    idempotent: bool = False
    events: int = 0
    recoveries: int = 0
    sent: bool = False
    stalled: bool = False
    forced: bool = False
    met_shortage: bool = False
    began: float = 0.0
    again_after: float | None = None
    not_before: datetime | None = None
    log_lines: int = 0
    reports: int = 0
    untold_progress: bool = False
    task: asyncio.Task[None] | None = None
    snapshots: asyncio.Task[None] | None = None
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _done: asyncio.Event | None = field(default=None, init=False)

    @property
    def done(self) -> asyncio.Event:
        """Set when it has ended and its end is kept."""
        if self._done is None:
            self._done = asyncio.Event()
        return self._done

    @property
    def context(self) -> CallContext:
        """What its calls are told of themselves: the same for each attempt, under whichever host."""
        return context_of(self.job, self.request)

    def set_timer(self, name: str, seconds: float, what: Callable[[], object]) -> None:
        """Do something later, once, unless it is set anew or stopped."""
        self.stop_timer(name)
        self.timers[name] = asyncio.get_running_loop().call_later(seconds, what)

    def stop_timer(self, name: str) -> None:
        """Give up a timer, if there is one."""
        if (timer := self.timers.pop(name, None)) is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Give up every timer and the snapshots."""
        for name in list(self.timers):
            self.stop_timer(name)
        if self.snapshots is not None:
            self.snapshots.cancel()


class Journal:
    """Keeps what happens. Everything goes through here, so what a follower sees is what the store holds."""

    def __init__(
        self, store: JobStore, *, max_history: int, max_age_seconds: float | None, max_log_events: int
    ) -> None:
        self.store = store
        self.live: dict[str, LiveJob] = {}
        self.failure: StoreError | None = None
        self._max_history = max_history
        self._max_age = None if max_age_seconds is None else timedelta(seconds=max_age_seconds)
        self._max_log_events = max_log_events
        self._order = 0
        self._position = 0
        self._history: deque[Ended] = deque()
        self._counts: Counter[JobStatus] = Counter()  # of the live that have not ended, and of the retained
        self._ended_sequences: deque[str] = deque()
        self._followers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._last_submission = datetime.min.replace(tzinfo=UTC)
        self._age_timer: asyncio.TimerHandle | None = None

    def open(self) -> Leftover:
        """Claim the store and return what an earlier host left in it."""
        left = self.store.open()
        self._order, self._position = left.last_order, left.last_position
        self._history.extend(left.ended)
        self._counts.update(each.status for each in left.ended)
        self._ended_sequences.extend(left.ended_sequences)
        return left

    def next_order(self) -> int:
        """Number a submission."""
        self._order += 1
        return self._order

    def submission_time(self) -> datetime:
        """Return now, but never before the last submission: a clock that is set back changes no order."""
        self._last_submission = max(self._last_submission, datetime.now(UTC))
        return self._last_submission

    def count(self, status: JobStatus) -> int:
        """Return how many jobs stand so; of ended ones the retained."""
        return self._counts[status]

    def add(self, live: LiveJob) -> None:
        """Have a job be live."""
        self.live[live.job.id] = live
        self._counts[live.job.status] += 1

    def discard(self, live: LiveJob) -> None:
        """Have a job be live no longer: it has ended, or was never kept."""
        del self.live[live.job.id]
        if not live.job.status.terminal:
            self._counts[live.job.status] -= 1

    # -- what happens

    def event(self, live: LiveJob, kind: JobEventType, payload: dict[str, Any]) -> NewEvent:
        """Number an event; it has happened when it is written."""
        live.events += 1
        self._position += 1
        job = live.job
        return NewEvent(
            JobEvent(
                number=live.events,
                position=self._position,
                type=kind,
                job_id=job.id,
                plugin_instance_id=job.plugin_instance_id,
                payload=payload,
                sequence_id=job.sequence_id,
                sequence_index=job.sequence_index,
            )
        )

    def changed(self, live: LiveJob) -> ChangedJob:
        """Return how a job stands now, as a change."""
        return ChangedJob(live.job, live.recoveries, live.not_before)

    def transition(self, live: LiveJob, status: JobStatus, **changes: Any) -> list[Change]:
        """Have a job stand otherwise, and return the changes to write."""
        before = live.job.status
        self._counts[before] -= 1
        if not status.terminal:
            self._counts[status] += 1
        live.job = replace(live.job, status=status, **changes)
        payload = {"from": before.value, "to": status.value}
        return [self.event(live, JobEventType.STATE_TRANSITION, payload), self.changed(live)]

    def write(self, changes: Sequence[Change]) -> asyncio.Future[None] | None:
        """Keep changes and tell the followers once they are kept; a `StoreError` when an earlier write failed."""
        if self.failure is not None:
            raise self.failure
        kept = self.store.write(changes)
        told = {
            event.job_id: event.sequence_id
            for change in changes
            if isinstance(change, NewEvent)
            for event in [change.event]
        }
        if kept is None:
            self._tell(told)
        else:
            kept.add_done_callback(partial(self._kept, told))
        return kept

    def log(self, live: LiveJob, line: str) -> None:
        """A line of the plugin becomes an event, unless the job has had its share."""
        live.log_lines += 1
        if live.log_lines <= self._max_log_events:
            self._note(live, JobEventType.LOG_APPENDED, {"line": line})
        elif live.log_lines == self._max_log_events + 1:
            self._note(live, JobEventType.EVENTS_LIMITED, {"limit": self._max_log_events})

    def progress(self, live: LiveJob, progress: float, message: str) -> None:
        """A report of progress becomes an event, at once or, where they come fast, with those that follow it."""
        live.job = replace(live.job, progress=progress, status_message=message)
        live.untold_progress = True
        live.reports += 1
        if live.reports <= _PROGRESS_BURST:
            self._tell_progress(live)
        elif "progress" not in live.timers:
            live.set_timer("progress", _PROGRESS_SECONDS, partial(self._tell_progress, live))

    def last_progress(self, live: LiveJob) -> list[Change]:
        """Return the change that tells what was not told yet."""
        live.stop_timer("progress")
        if not live.untold_progress:
            return []
        live.untold_progress = False
        payload = {"progress": live.job.progress, "status_message": live.job.status_message}
        return [self.event(live, JobEventType.PROGRESS_CHANGED, payload), self.changed(live)]

    def snapshot(self, live: LiveJob, snapshot: Any) -> None:
        """Note what the instance takes."""
        live.job = replace(live.job, last_resource_snapshot=snapshot)
        payload = {"snapshot": {**asdict(snapshot), "timestamp": snapshot.timestamp.isoformat()}}
        self._note(live, JobEventType.RESOURCE_SNAPSHOT, payload)

    # -- retention

    def retain(self, *jobs: Job) -> None:
        """Take note of ended jobs, and forget what is beyond count and age."""
        for job in jobs:
            ended = Ended(job_id=job.id, status=job.status, completed_at=job.completed_at or datetime.now(UTC))
            self._history.append(ended)
            self._counts[ended.status] += 1
        self._forget()

    def retain_sequence(self, sequence_id: str) -> None:
        """Take note of an ended sequence; as many are kept as jobs."""
        self._ended_sequences.append(sequence_id)
        while len(self._ended_sequences) > self._max_history and self.failure is None:
            self.write([ForgetSequence(self._ended_sequences.popleft())])

    def _forget(self) -> None:
        if self.failure is not None:
            return
        oldest = None if self._max_age is None else datetime.now(UTC) - self._max_age
        gone: list[Change] = []
        while self._history and (
            len(self._history) > self._max_history or (oldest is not None and self._history[0].completed_at <= oldest)
        ):
            ended = self._history.popleft()
            self._counts[ended.status] -= 1
            gone.append(Forget(ended.job_id))
        if gone:
            self.write(gone)
        if self._max_age is not None and self._history and self._age_timer is None:
            seconds = (self._history[0].completed_at + self._max_age - datetime.now(UTC)).total_seconds()
            self._age_timer = asyncio.get_running_loop().call_later(max(0.1, seconds), self._aged)

    def _aged(self) -> None:
        self._age_timer = None
        self._forget()

    def stop(self) -> None:
        """Give up the timer."""
        if self._age_timer is not None:
            self._age_timer.cancel()
            self._age_timer = None

    # -- following

    def follow_job(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Yield a job's events with numbers above ``after``, those to come too; end with the job, or if forgotten."""

        def read(last: int, limit: int) -> list[JobEvent]:
            return self.store.job_events(job_id, last, limit)

        return self._follow(
            job_id,
            after,
            read,
            lambda: job_id not in self.live,
            by_position=False,
        )

    def follow_sequence(self, sequence_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Yield the events of a sequence's jobs with positions above ``after``; end with the sequence."""

        def ended() -> bool:
            sequence = self.store.sequence(sequence_id)
            return sequence is None or sequence.status.terminal

        return self._follow(
            sequence_id, after, lambda last, limit: self.store.queue_events(last, limit, sequence_id), ended
        )

    def follow_all(self, after: int | None) -> AsyncIterator[JobEvent]:
        """Yield all events with positions above ``after``, None for those to come; never ends."""
        start = self._position if after is None else after
        return self._follow(_ALL, start, self.store.queue_events, lambda: False)

    async def _follow(
        self, key: str, after: int, read: Follow, ended: Callable[[], bool], *, by_position: bool = True
    ) -> AsyncIterator[JobEvent]:
        """Read on from the store whenever there is news: who is slow finds everything there."""
        news = asyncio.Event()
        self._followers[key].add(news)
        try:
            while True:
                news.clear()
                over = ended()  # asked before reading: what happened up to the end is then read
                while events := read(after, _BATCH):
                    for event in events:
                        after = event.position if by_position else event.number
                        yield event
                if over:
                    return
                if self.failure is not None:
                    raise self.failure
                await news.wait()
        finally:
            self._followers[key].discard(news)
            if not self._followers[key]:
                del self._followers[key]

    def _note(self, live: LiveJob, kind: JobEventType, payload: dict[str, Any]) -> None:
        if self.failure is None:
            self.write([self.event(live, kind, payload)])

    def _tell_progress(self, live: LiveJob) -> None:
        if self.failure is None and not live.job.status.terminal:
            self.write(self.last_progress(live))

    def _kept(self, told: dict[str, str | None], kept: asyncio.Future[None]) -> None:
        error = kept.exception()
        if error is None:
            self._tell(told)
            return
        if self.failure is None:
            self.failure = error if isinstance(error, StoreError) else StoreError(f"jobs cannot be kept: {error!r}")
            _logger.error("jobs cannot be kept, so none is started any more: %s", error)
        for followers in self._followers.values():
            for news in followers:
                news.set()

    def _tell(self, told: dict[str, str | None]) -> None:
        if not self._followers or not told:
            return
        for key in {_ALL, *told, *filter(None, told.values())}:
            for news in self._followers.get(key, ()):
                news.set()
