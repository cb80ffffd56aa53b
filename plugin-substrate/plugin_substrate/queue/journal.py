"""The live jobs of a queue and what happens to them: numbered, kept in the store, and told to those who follow."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from plugin_substrate.errors import StoreError
from plugin_substrate.queue.folding import Folded, job_of
from plugin_substrate.queue.following import EVERYTHING, Following
from plugin_substrate.queue.job import Job, JobEvent, JobEventType, JobStatus
from plugin_substrate.queue.live import LiveJob, LiveJobs
from plugin_substrate.queue.store import (
    Change,
    ChangedJob,
    Ended,
    Forget,
    ForgetSequence,
    JobStore,
    KeptJob,
    Leftover,
    NewEvent,
    NewJob,
)

_logger = logging.getLogger(__name__)

#: Reports of progress become events as they come up to this many, then at most one in `_PROGRESS_SECONDS`, the latest.
_PROGRESS_BURST = 100
_PROGRESS_SECONDS = 0.1

_INSTANT = timedelta(microseconds=1)


class Journal:
    """Keeps what happens. Everything goes through here, so what a follower sees is what the store holds."""

    def __init__(
        self, store: JobStore, *, max_history: int, max_age_seconds: float | None, max_log_events: int
    ) -> None:
        self.store = store
        self.live = LiveJobs()
        self.failure: StoreError | None = None
        self._max_history = max_history
        self._max_age = None if max_age_seconds is None else timedelta(seconds=max_age_seconds)
        self._max_log_events = max_log_events
        self._order = 0
        self._position = 0
        self._history: deque[Ended] = deque()
        self._counts: Counter[JobStatus] = Counter()  # of the live that have not ended, and of the retained
        self._ended_sequences: deque[str] = deque()
        self._following = Following()
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
        """Return now, but always after the last submission: a clock that is set back changes no order."""
        self._last_submission = max(self._last_submission + _INSTANT, datetime.now(UTC))
        return self._last_submission

    def count(self, status: JobStatus) -> int:
        """Return how many jobs stand so; of ended ones the retained."""
        return self._counts[status]

    def add(self, live: LiveJob) -> None:
        """Have a job be live."""
        self.live.add(live)
        self._counts[live.job.status] += 1

    def discard(self, live: LiveJob) -> None:
        """Have a job be live no longer: it has ended, or was never kept."""
        self.live.remove(live.job.id)
        if not live.job.status.terminal:
            self._counts[live.job.status] -= 1

    def shown(self, live: LiveJob, **changes: Any) -> Job:
        """Return a live job as others may see it, with its arguments."""
        args, kwargs = self._arguments(live.arguments)
        return replace(live.job, args=args, kwargs=kwargs, **changes)

    def shown_folded(self, folded: Folded) -> tuple[Job, int]:
        """Return a job that only waits as others may see it, and its order."""
        *_, arguments, order, _, _ = folded
        return job_of(folded, *self._arguments(arguments)), order

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

    def new(self, live: LiveJob) -> NewJob:
        """Return a job that was submitted, as a change."""
        kept = KeptJob(job=live.job, request=live.request, order=live.order, idempotent=live.idempotent)
        return NewJob(kept, live.arguments)

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
        events = [change.event for change in changes if isinstance(change, NewEvent)]
        if kept is None:
            self._following.tell(events)
        else:
            kept.add_done_callback(partial(self._kept, events))
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
        read = partial(self.store.job_events, job_id)
        return self._following.events(job_id, after, read, lambda: job_id not in self.live, by_position=False)

    def follow_sequence(self, sequence_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Yield the events of a sequence's jobs with positions above ``after``; end with the sequence."""

        def ended() -> bool:
            sequence = self.store.sequence(sequence_id)
            return sequence is None or sequence.status.terminal

        read = partial(self.store.queue_events, sequence_id=sequence_id)
        return self._following.events(sequence_id, after, read, ended, by_position=True)

    def follow_all(self, after: int | None) -> AsyncIterator[JobEvent]:
        """Yield all events with positions above ``after``, None for those to come; never ends."""
        start = self._position if after is None else after
        return self._following.events(EVERYTHING, start, self.store.queue_events, lambda: False, by_position=True)

    # -- within

    def _arguments(self, packed: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a live job; none when it has ended and is still being kept."""
        return self.store.unpack(packed) if packed else ((), {})

    def _note(self, live: LiveJob, kind: JobEventType, payload: dict[str, Any]) -> None:
        if self.failure is None:
            self.write([self.event(live, kind, payload)])

    def _tell_progress(self, live: LiveJob) -> None:
        if self.failure is None and not live.job.status.terminal:
            self.write(self.last_progress(live))

    def _kept(self, events: list[JobEvent], kept: asyncio.Future[None]) -> None:
        error = kept.exception()
        if error is None:
            self._following.tell(events)
        elif self.failure is None:
            self.failure = error if isinstance(error, StoreError) else StoreError(f"jobs cannot be kept: {error!r}")
            _logger.error("jobs cannot be kept, so none is started any more: %s", error)
            self._following.fail(self.failure)
